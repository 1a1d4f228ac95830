"""What can be wrong with a tree of a release: each is one clear line, and never a wrong data set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import release_trees
from conftest import empty_folders
from release_trees import MNI152_AFFINE, SRI24_AFFINE, make_release, own_label, patient

from nnunetv2_mstkd import cli
from nnunetv2_mstkd.dataset_conversion import conversion, writing

NAMES = release_trees.case_names("brats2021")


@pytest.fixture(autouse=True)
def nnunet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    release_trees.use_small_grids(monkeypatch)
    return empty_folders(tmp_path, monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """BraTS 2021."""
    make_release(tmp_path / "source", "brats2021")
    return tmp_path / "source"


def convert(source: Path, *options: str, release: str = "brats2021") -> int:
    return cli.main(["convert", release, str(source), "-d", "7", "--name", "Toy", "--workers", "1", *options])


def file(source: Path, part: str, number: int = 1) -> Path:
    return source / NAMES[number] / f"{NAMES[number]}_{part}.nii.gz"


def refused(capsys: pytest.CaptureFixture, nnunet: Path) -> str:
    """The one line of a refusal that wrote nothing."""
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    assert not list((nnunet / "raw").glob("Dataset*")) and not list((nnunet / "preprocessed").iterdir())
    return err


def left_out(capsys: pytest.CaptureFixture) -> list[str]:
    """The lines about cases that were left out."""
    first, *lines = capsys.readouterr().err.rstrip("\n").split("\n")
    assert first.endswith("left out:")
    return [line.removeprefix("  ") for line in lines]


def only_line(capsys: pytest.CaptureFixture, number: int = 1) -> str:
    (line,) = left_out(capsys)
    assert line.startswith(f"{NAMES[number]}: ")
    return line.removeprefix(f"{NAMES[number]}: ")


# ---- the wrong tree ------------------------------------------------------------------------------------------------


def test_wrong_release(source, nnunet, capsys):
    assert convert(source, release="brats2020") == 2
    assert refused(capsys, nnunet).endswith(
        "expected names such as BraTS20_Training_001; it holds cases of another release: 4 of brats2021 such as "
        "BraTS2021_00000\n"
    )


def test_mixed_releases(source, nnunet, capsys):
    make_release(source / "more", "brats2023_gli")
    assert convert(source) == 2
    line = refused(capsys, nnunet)
    assert "mixes 4 cases of brats2021 with 4 of brats2023_gli or" in line and "such as BraTS-GLI-00005-100" in line


def test_no_release_at_all(tmp_path, nnunet, capsys):
    (tmp_path / "source" / "somebody").mkdir(parents=True)
    assert convert(tmp_path / "source") == 2
    assert "no case folder of brats2021 in" in refused(capsys, nnunet)
    assert convert(tmp_path / "nowhere") == 2
    assert refused(capsys, nnunet) == f"mstkd convert: no folder {tmp_path / 'nowhere'}\n"


def test_releases_with_equal_names_differ_by_grid(tmp_path, capsys, nnunet, monkeypatch):
    make_release(tmp_path / "source", "brats2024_gli")
    for path in (tmp_path / "source").rglob("*.nii.gz"):
        array = np.asarray(release_trees.nibabel.load(path).dataobj)
        release_trees.write(path, array[:, :-1], MNI152_AFFINE)
    assert convert(tmp_path / "source", release="brats2023_gli") == 2
    lines = capsys.readouterr().err.split("\n")
    assert sum("is it of another release than brats2023_gli?" in line for line in lines) == 4


def test_label_4_in_a_tree_of_2023(tmp_path, capsys):
    names = make_release(tmp_path / "source", "brats2023_gli")
    label = tmp_path / "source" / names[0] / f"{names[0]}-seg.nii.gz"
    release_trees.write(label, own_label("brats2021", 0), SRI24_AFFINE)
    assert convert(tmp_path / "source", release="brats2023_gli") == 1
    (line,) = left_out(capsys)
    assert line.startswith(
        f"{names[0]}: label ({label.name}) holds the undeclared values [4], brats2023_gli has [0, 1, 2, 3]; 4 is ET in "
        "brats2018, brats2019, brats2020, brats2021 and others, RC in brats2024_gli, brats2025_met"
    )


def test_label_3_in_a_tree_of_2021(source, capsys):
    release_trees.write(file(source, "seg"), own_label("brats2023_gli", 1), SRI24_AFFINE)
    assert convert(source) == 1
    assert "holds the undeclared values [3], brats2021 has [0, 1, 2, 4]; 3 is ET in" in only_line(capsys)


def test_wrong_order_of_stacked_channels(tmp_path, nnunet, capsys):
    make_release(tmp_path / "source", "msd_task01")
    other = {"modality": {"0": "T1w", "1": "T1gd", "2": "T2w", "3": "FLAIR"}}
    (tmp_path / "source" / "dataset.json").write_text(json.dumps(other))
    assert convert(tmp_path / "source", release="msd_task01") == 2
    assert "says that the channels are T1, T1ce, T2, FLAIR, but in msd_task01 they are FLAIR, T1, T1ce, T2" in refused(
        capsys, nnunet
    )


def test_synonyms_of_one_modality(source, nnunet, capsys):
    options = ["--modality", "t1c=*_t1ce.nii.gz", "--modality", "T1Gd=*_t1.nii.gz", "--label", "*_seg.nii.gz"]
    assert convert(source, *options, "--class", "edema=1", release="generic") == 2
    assert "the modalities t1c and T1Gd are both T1ce, expected" in refused(capsys, nnunet)


def test_second_run_with_another_channel_order(source, capsys):
    names = {"T1": "*_t1.nii.gz", "FLAIR": "*_flair.nii.gz"}
    options = ["--label", "*_seg.nii.gz", "--class", "a=1", "--class", "b=2", "--class", "c=3", "--class", "d=4"]
    for order in (("T1", "FLAIR"), ("FLAIR", "T1")):
        modalities = [text for name in order for text in ("--modality", f"{name}={names[name]}")]
        code = convert(source, *modalities, *options, release="generic")
    assert code == 2
    assert "already exists with another description; --overwrite replaces it" in capsys.readouterr().err


def test_validation_sets_are_refused(source, nnunet, capsys):
    for path in source.rglob("*_seg.nii.gz"):
        path.unlink()
    assert convert(source) == 2
    assert "none of the 4 cases" in (line := refused(capsys, nnunet)) and "is it a validation set?" in line


# ---- the wrong files -----------------------------------------------------------------------------------------------


def test_missing_label(source, capsys):
    file(source, "seg").unlink()
    assert convert(source) == 1
    assert only_line(capsys) == f"label: no file matches '{NAMES[1]}_seg.nii*'"


def test_missing_modality(source, capsys):
    file(source, "t1ce").rename(file(source, "t1gd"))
    assert convert(source) == 1
    assert only_line(capsys) == (
        f"T1ce: no file matches '{NAMES[1]}_t1ce.nii*'; not used: {NAMES[1]}_t1gd.nii.gz; --allow-missing fills an "
        "absent modality with zeros"
    )


def test_duplicate_modality(source, capsys):
    shutil.copy(file(source, "t2"), file(source, "t2").with_suffix(""))
    assert convert(source) == 1
    assert only_line(capsys).startswith(f"T2: {NAMES[1]}_t2.nii, {NAMES[1]}_t2.nii.gz match")


@pytest.mark.parametrize("name", ["BraTS2021_00002 (1)", "BraTS2021_0000ü", "BraTS2021-00002"])
def test_strange_folder_names_of_a_release(source, capsys, name):
    (source / NAMES[1]).rename(source / name)
    assert convert(source) == 1
    (line,) = left_out(capsys)
    assert line.startswith(f"{name}: this folder holds images, but its name is not as in brats2021 (BraTS2021_00000)")


@pytest.mark.parametrize("name", ["case 2", "fällig"])
def test_strange_folder_names_of_own_data(source, capsys, name):
    (source / NAMES[1]).rename(source / name)
    options = ["--modality", "T1=*_t1.nii.gz", "--label", "*_seg.nii.gz"]
    classes = [text for value in (1, 2, 3, 4) for text in ("--class", f"c{value}={value}")]
    assert convert(source, *options, *classes, release="generic") == 1
    (line,) = left_out(capsys)
    assert line.startswith(f"{name}: the name of the folder has a space or a sign other than ASCII letters")


def test_file_name_with_a_space(source, capsys):
    file(source, "t2").rename(file(source, "t2 (1)"))
    assert convert(source) == 1
    assert f"T2: no file matches '{NAMES[1]}_t2.nii*'; not used: {NAMES[1]}_t2 (1).nii.gz" in only_line(capsys)


def test_link_out_of_the_source(source, tmp_path, capsys):
    outside = tmp_path / "elsewhere.nii.gz"
    file(source, "t2").rename(outside)
    file(source, "t2").symlink_to(outside)
    assert convert(source) == 1
    line = only_line(capsys)
    assert line == f"T2: {NAMES[1]}_t2.nii.gz is a link to {outside}, outside {source}; --follow-links accepts it"
    assert convert(source, "--follow-links", "--overwrite") == 0


def test_case_folder_linked_from_outside(source, tmp_path, capsys):
    (source / NAMES[1]).rename(tmp_path / NAMES[1])
    (source / NAMES[1]).symlink_to(tmp_path / NAMES[1])
    assert convert(source) == 1
    lines = left_out(capsys)
    assert len(lines) == 5 and all("outside" in line for line in lines)


def test_link_within_the_source(source):
    (source / "store").mkdir()
    file(source, "t2").rename(source / "store" / "t2")
    file(source, "t2").symlink_to(source / "store" / "t2")
    assert convert(source) == 0


def test_broken_link(source, capsys):
    file(source, "t2").unlink()
    file(source, "t2").symlink_to(source / "nowhere")
    assert convert(source) == 1
    assert only_line(capsys) == f"T2: {NAMES[1]}_t2.nii.gz is a link to {source / 'nowhere'}, which is not a file"


@pytest.mark.parametrize("level", ["full", "header"])
@pytest.mark.parametrize(("part", "role"), [("t2", "T2"), ("seg", "label")])
def test_truncated_file(source, capsys, level, part, role):
    path = file(source, part)
    path.write_bytes(path.read_bytes()[:-9])
    assert convert(source, "--verify", level) == 1
    assert only_line(capsys).startswith(f"{role} ({path.name}) is truncated")


def test_damaged_file(source, capsys):
    path = file(source, "t2")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert convert(source) == 1
    assert only_line(capsys).startswith(f"T2 ({path.name}) is ")


@pytest.mark.parametrize("level", ["full", "header"])
def test_file_that_is_no_image(source, capsys, level):
    file(source, "t2").write_bytes(b"<html>sign in</html>")
    assert convert(source, "--verify", level) == 1
    assert only_line(capsys).startswith(f"T2 ({NAMES[1]}_t2.nii.gz) cannot be read: ")


# ---- the wrong content ---------------------------------------------------------------------------------------------


def test_image_of_zeros(source, capsys):
    release_trees.write(file(source, "t2"), np.zeros(release_trees.SHAPE, np.int16), SRI24_AFFINE)
    assert convert(source) == 1
    assert only_line(capsys) == f"T2 ({NAMES[1]}_t2.nii.gz) is zero everywhere; --allow-missing keeps such a case"


@pytest.mark.parametrize("level", ["full", "header"])
def test_one_image_under_two_names(source, capsys, level):
    shutil.copy(file(source, "t1"), file(source, "t1ce"))
    assert convert(source, "--verify", level) == 1
    assert only_line(capsys) == "T1 and T1ce hold the same image"


def test_one_image_saved_twice(source, capsys):
    """A copy with another header, or without compression, is still a copy."""
    image = release_trees.nibabel.load(file(source, "t1"))
    image.header["descrip"] = b"saved again"
    release_trees.nibabel.save(image, file(source, "t1ce"))
    assert file(source, "t1").read_bytes() != file(source, "t1ce").read_bytes()
    assert convert(source) == 1
    assert only_line(capsys) == "T1 and T1ce hold the same image"
    uncompressed = file(source, "t2").with_name(file(source, "t2").name.removesuffix(".gz"))
    release_trees.nibabel.save(image, uncompressed)
    file(source, "t2").unlink()
    assert convert(source, "--overwrite") == 1
    assert only_line(capsys) == "T1 and T1ce and T2 hold the same image"


def test_bad_cases_that_leave_no_folds_are_named(source, nnunet, capsys):
    """The data set must not appear without folds: nnU-Net would make its own."""
    release_trees.write(file(source, "t2"), np.zeros(release_trees.SHAPE, np.int16), SRI24_AFFINE)
    for options in (["--val-cases", NAMES[1]], ["--folds", "4"]):
        assert convert(source, *options) == 2
        err = capsys.readouterr().err
        assert f"\n  {NAMES[1]}: T2 ({NAMES[1]}_t2.nii.gz) is zero everywhere" in err
        assert not list((nnunet / "raw").glob("Dataset*"))
    assert convert(source) == 1  # with folds of what is left


def test_label_with_fractions(source, capsys):
    release_trees.write(file(source, "seg"), own_label("brats2021", 1) * np.float32(0.3), SRI24_AFFINE)
    assert convert(source) == 1
    assert "expected integers only" in only_line(capsys)


def test_shifted_label(source, capsys):
    label = np.zeros(release_trees.SHAPE, np.uint8)
    label[:4, :4, :4] = 1
    release_trees.write(file(source, "seg"), label, SRI24_AFFINE)
    assert convert(source) == 1
    assert "lies to 100 % where every image is zero: it is shifted, or belongs to another case" in only_line(capsys)
    assert convert(source, "--max-outside", "1", "--overwrite") == 0


def test_label_on_another_grid(source, capsys):
    moved = SRI24_AFFINE.copy()
    moved[2, 3] = 3
    release_trees.write(file(source, "seg"), own_label("brats2021", 1), moved)
    assert convert(source) == 1
    assert only_line(capsys) == (
        "label has origin (0, -239, 3) instead of (0, -239, 0) as in T1; resample it to the same grid"
    )


@pytest.mark.parametrize("code", [1, 2])
def test_contradicting_sform_and_qform(source, capsys, code):
    """ITK takes an sform of code 1 and ignores one of code 2, nibabel takes both."""
    image = release_trees.nibabel.load(file(source, "seg"))
    image.set_sform(np.diag([1.0, -1, 1, 1]) @ SRI24_AFFINE, code=code)
    release_trees.nibabel.save(image, file(source, "seg"))
    assert convert(source) == 1
    lines = left_out(capsys)
    if code == 1:
        assert [line.split(" (")[0] for line in lines] == [
            f"{NAMES[1]}: label has {it}" for it in ("origin", "direction")
        ]
    else:
        assert len(lines) == 1
        assert (
            "label lies elsewhere than T1 for readers that prefer the sform to the qform, though not for ITK"
            in lines[0]
        )


def test_unusual_origin_is_only_noted(source, capsys):
    for path in (source / NAMES[1]).iterdir():
        image = release_trees.nibabel.load(path)
        moved = SRI24_AFFINE.copy()
        moved[1, 3] = 0
        release_trees.write(path, np.asarray(image.dataobj), moved)
    assert convert(source) == 0
    assert f"note: origin or direction other than in SRI24 (1 case: {NAMES[1]})" in capsys.readouterr().out


# ---- interrupted, repeated -----------------------------------------------------------------------------------------


def test_interrupted_conversion_is_invisible_and_resumes(source, nnunet, capsys, monkeypatch):
    copy, copied = shutil.copyfile, []

    def stop_at_the_third_case(path: Path, target: Path) -> None:
        if NAMES[2] in str(path):
            raise KeyboardInterrupt
        copied.append(path)
        copy(path, target)

    monkeypatch.setattr(writing.shutil, "copyfile", stop_at_the_third_case)
    assert convert(source) == 130
    assert not list((nnunet / "raw").glob("Dataset*"))
    there = len(copied)
    assert there in (8, 12)  # the last case may have been at work already
    monkeypatch.setattr(writing.shutil, "copyfile", lambda path, target: copied.append(path) or copy(path, target))
    assert convert(source) == 0
    assert (
        "4 training cases" in (out := capsys.readouterr().out) and f"{there // 4} cases from an interrupted run" in out
    )
    assert len(copied) == 16
    assert [path.name for path in (nnunet / "raw").iterdir()] == ["Dataset007_Toy"]


def test_a_closer_look_is_not_answered_by_an_interrupted_run(source, nnunet, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_record", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
        assert convert(source, "--verify", "header") == 2
        assert convert(source, "--verify", "header") == 2
    capsys.readouterr()
    assert convert(source, "--verify", "full") == 0
    assert "interrupted" not in capsys.readouterr().out


def test_other_options_start_afresh(source, nnunet, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_record", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
        assert convert(source) == 2
    assert convert(source, "--labels", "--link") == 0
    out = capsys.readouterr().out
    assert "interrupted" not in out
    assert (nnunet / "raw" / "Dataset007_Toy" / "imagesTr" / f"{NAMES[0]}_0000.nii.gz").is_symlink()


def test_changed_files_are_converted_again(source, nnunet, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_record", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
        assert convert(source) == 2
    release_trees.write(file(source, "t1"), patient(7)[0][0], SRI24_AFFINE)
    assert convert(source) == 0
    assert "3 cases from an interrupted run" in capsys.readouterr().out
    written = release_trees.nibabel.load(nnunet / "raw" / "Dataset007_Toy" / "imagesTr" / f"{NAMES[1]}_0000.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), patient(7)[0][0])


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["lost", "empty"])
def test_files_that_a_crash_has_lost_are_written_again(source, nnunet, capsys, monkeypatch, damage):
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_record", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
        assert convert(source) == 2
    name = f"{NAMES[1]}_0000.nii.gz"
    damage(nnunet / "raw" / ".Dataset007_Toy.unfinished" / "new" / "imagesTr" / name)
    assert convert(source) == 0
    assert "3 cases from an interrupted run" in capsys.readouterr().out
    written = nnunet / "raw" / "Dataset007_Toy" / "imagesTr" / name
    assert written.read_bytes() == file(source, "t1").read_bytes()


def test_concurrent_conversion_is_refused(source, nnunet, capsys):
    with conversion.locked(nnunet / "raw" / ".Dataset007_Toy.unfinished"):
        assert convert(source) == 2
    assert "another process is writing" in capsys.readouterr().err
    assert convert(source) == 0


@pytest.mark.parametrize("level", [[], ["--verify", "header"], ["--verify", "full"]])
def test_second_run_only_verifies(source, nnunet, capsys, level):
    convert(source)
    before = {path: path.stat().st_mtime_ns for path in nnunet.glob("raw/*/*/*")}
    assert convert(source, *level) == 0
    assert "already complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in nnunet.glob("raw/*/*/*")}


def test_second_run_finds_damage(source, nnunet, capsys):
    convert(source)
    images = nnunet / "raw" / "Dataset007_Toy" / "imagesTr"
    (images / f"{NAMES[0]}_0000.nii.gz").unlink()
    content = (images / f"{NAMES[1]}_0000.nii.gz").read_bytes()
    (images / f"{NAMES[1]}_0000.nii.gz").write_bytes(content[:-1])
    assert convert(source) == 2
    err = capsys.readouterr().err
    assert f"{NAMES[0]}: {images / NAMES[0]}_0000.nii.gz no longer exists" in err
    assert f"{NAMES[1]}: {images / NAMES[1]}_0000.nii.gz has changed since it was written" in err
    assert NAMES[2] not in err
    middle = bytearray((images / f"{NAMES[2]}_0001.nii.gz").read_bytes())
    middle[6000] ^= 0xFF
    (images / f"{NAMES[2]}_0001.nii.gz").write_bytes(middle)
    assert convert(source) == 2
    assert NAMES[2] not in capsys.readouterr().err  # only reading all of it shows that
    assert convert(source, "--verify", "full") == 2
    assert f"{NAMES[2]}: T1ce ({NAMES[2]}_0001.nii.gz) is " in capsys.readouterr().err


def test_second_run_with_other_cases(source, capsys):
    convert(source)
    shutil.rmtree(source / NAMES[3])
    assert convert(source) == 2
    assert f"other cases (0 new, 1 gone, such as {NAMES[3]})" in capsys.readouterr().err


def test_second_run_repeats_the_problems(source, capsys):
    file(source, "seg").unlink()
    assert convert(source) == convert(source) == 1
    assert left_out(capsys)[-1].startswith(f"{NAMES[1]}: label: no file matches")


def test_repaired_cases_are_named(source, capsys):
    file(source, "t1").rename(file(source, "t1old"))
    convert(source)
    file(source, "t1old").rename(file(source, "t1"))
    assert convert(source) == 2
    assert f"{NAMES[1]}: it was left out, but has no problems now" in capsys.readouterr().err
    assert convert(source, "--overwrite") == 0


def test_dollar_in_the_path_is_refused(source, nnunet, capsys):
    source.rename(source.with_name("so$urce"))
    assert convert(source.with_name("so$urce"), "--reference") == 2
    assert "has a $" in refused(capsys, nnunet)
