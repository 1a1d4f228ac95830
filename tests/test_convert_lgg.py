"""The LGG MRI segmentation set: slices in TIFF files become volumes, and predictions slices again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import release_trees
import SimpleITK as sitk
import tifffile
from conftest import empty_folders, in_this_process
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
from release_trees import lgg_patient, write_slices

from nnunetv2_mstkd import cli

NAMES = release_trees.case_names("lgg")
T1, FLAIR, T1CE = 0, 1, 2  # in the files
ORDER = (T1, T1CE, FLAIR)  # in the data set
CASE = NAMES[2]
SLICES = len(lgg_patient(0)[0])


@pytest.fixture(autouse=True)
def nnunet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_folders(tmp_path, monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    release_trees.make_release(tmp_path / "source", "lgg")
    return tmp_path / "source"


def convert(source: Path, *options: str) -> int:
    return cli.main(["convert", "lgg", str(source), "-d", "7", "--workers", "1", *options])


def dataset(nnunet: Path) -> tuple[Path, dict]:
    folder = nnunet / "raw" / "Dataset007_LGG"
    return folder, json.loads((folder / "dataset.json").read_text())


def image_file(source: Path, number: int, case: str = CASE) -> Path:
    return source / "kaggle_3m" / case / f"{case}_{number}.tif"


def mask_file(source: Path, number: int, case: str = CASE) -> Path:
    return source / "kaggle_3m" / case / f"{case}_{number}_mask.tif"


def replace_case(source: Path, images: np.ndarray, masks: np.ndarray | None) -> None:
    shutil.rmtree(source / "kaggle_3m" / CASE)
    write_slices(source / "kaggle_3m" / CASE, images, masks)


def problems(capsys: pytest.CaptureFixture) -> list[str]:
    """The lines about the one case that was left out."""
    first, *lines = capsys.readouterr().err.rstrip("\n").split("\n")
    assert first == "1 case left out:"
    assert all(line.startswith(f"  {CASE}: ") for line in lines), lines
    return [line.removeprefix(f"  {CASE}: ") for line in lines]


def test_slices_become_volumes(nnunet, source, monkeypatch, capsys):
    assert convert(source) == 0
    out = capsys.readouterr().out
    assert "4 training cases of 3 patients, 0 test cases, channels T1, T1ce, FLAIR" in out
    assert "note: the files have no spacing: 1 x 1 x 5 mm is assumed, --spacing changes it" in out
    folder, content = dataset(nnunet)
    assert content["channel_names"] == {"0": "T1", "1": "T1ce", "2": "FLAIR"}
    assert content["labels"] == {"background": 0, "tumor": 1} and "regions_class_order" not in content
    assert SLICES > 9  # 10 comes after 9, not after 1
    for number, name in enumerate(NAMES):
        images, masks = lgg_patient(number)
        for channel, position in enumerate(ORDER):
            image = sitk.ReadImage(str(folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz"))
            np.testing.assert_array_equal(sitk.GetArrayFromImage(image), images[..., position])
            assert image.GetSpacing() == (1.0, 1.0, 5.0)
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTr" / f"{name}.nii.gz")))
        np.testing.assert_array_equal(label, masks // 255)
    with in_this_process(monkeypatch):
        verify_dataset_integrity(str(folder), num_processes=1)
    splits = json.loads((nnunet / "preprocessed" / "Dataset007_LGG" / "splits_final.json").read_text())
    assert sorted(NAMES[:2]) in [fold["val"] for fold in splits]  # two studies of a patient
    for level in ("header", "full"):
        assert convert(source, "--verify", level) == 0
        assert "already complete" in capsys.readouterr().out


def test_labels_become_mask_slices_again(nnunet, source, capsys):
    convert(source)
    folder, _ = dataset(nnunet)
    out = nnunet / "restored"
    for _ in range(2):  # a second time over the files of the first
        assert cli.main(["restore-labels", "-i", str(folder / "labelsTr"), "-o", str(out), "-d", "7"]) == 0
    assert "4 segmentations restored (values changed: 1 -> 255)" in capsys.readouterr().out
    published = sorted(path.relative_to(source / "kaggle_3m") for path in source.rglob("*_mask.tif"))
    assert sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file()) == published
    for path in published:
        mask, restored = tifffile.imread(source / "kaggle_3m" / path), tifffile.imread(out / path)
        assert restored.dtype == mask.dtype == np.uint8
        np.testing.assert_array_equal(restored, mask)


def test_predictions_with_other_values_are_left_out(nnunet, source, capsys):
    convert(source)
    folder, _ = dataset(nnunet)
    label = sitk.ReadImage(str(folder / "labelsTr" / f"{CASE}.nii.gz"))
    sitk.WriteImage(label * 2, str(folder / "labelsTr" / f"{CASE}.nii.gz"))
    out = nnunet / "restored"
    assert cli.main(["restore-labels", "-i", str(folder / "labelsTr"), "-o", str(out), "-d", "7"]) == 1
    assert f"{CASE}.nii.gz holds 2, expected the data set's values [0, 1]" in capsys.readouterr().err
    assert not (out / CASE).exists()
    assert cli.main(["restore-labels", "-i", str(folder / "labelsTr"), "-o", str(out), "-d", "7", "--min-et", "9"]) == 2
    assert "no class ET" in capsys.readouterr().err


def test_spacing(nnunet, source, capsys):
    assert convert(source, "--spacing", "0.9", "0.9", "3") == 0
    assert "0.9 x 0.9 x 3 mm is assumed" in capsys.readouterr().out
    image = sitk.ReadImage(str(dataset(nnunet)[0] / "imagesTr" / f"{CASE}_0000.nii.gz"))
    np.testing.assert_allclose(image.GetSpacing(), (0.9, 0.9, 3.0))
    assert convert(source) == 2
    assert "already exists with another description; --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("spacing", [("1", "1", "0"), ("1", "-1", "5"), ("1", "1", "nan"), ("inf", "1", "1")])
def test_impossible_spacings(source, capsys, spacing):
    assert convert(source, "--spacing", *spacing) == 2
    assert f"--spacing is {' '.join(spacing)}, expected three lengths in mm" in capsys.readouterr().err


# ---- absent sequences ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("copied", "missing"), [((T1, T1CE), ["T1", "T1ce"]), ((T1CE,), ["T1ce"])])
def test_copies_of_flair_are_absent_sequences(nnunet, source, capsys, copied, missing):
    images, masks = lgg_patient(2)
    for position in copied:
        images[..., position] = images[..., FLAIR]
    replace_case(source, images, masks)
    assert convert(source) == 1
    assert problems(capsys) == [
        f"{name} ({CASE}) is absent: a copy of FLAIR in every slice; --allow-missing keeps such a case"
        for name in missing
    ]
    assert convert(source, "--allow-missing", "--overwrite") == 0
    out = capsys.readouterr().out
    assert "4 training cases of 3 patients (1 incomplete)" in out
    assert f"note: no {', no '.join(missing)}: zero images (1 case: {CASE})" in out
    folder, content = dataset(nnunet)
    assert content["mstkd_conversion"]["missing"] == {CASE: missing}
    for channel, position in enumerate(ORDER):
        written = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "imagesTr" / f"{CASE}_{channel:04d}.nii.gz")))
        expected = np.zeros_like(written) if position in copied else images[..., position]
        np.testing.assert_array_equal(written, expected)


def test_copies_in_some_slices(source, capsys):
    images, masks = lgg_patient(2)
    images[:2] = 0  # equal, but empty
    images[4:7, ..., T1CE] = images[4:7, ..., FLAIR]
    assert images[4:7, ..., FLAIR].any(axis=(1, 2)).all()
    replace_case(source, images, masks)
    assert convert(source, "--allow-missing") == 1
    assert problems(capsys) == [f"T1ce equals FLAIR in 3 of {SLICES} slices, expected all or none"]


def test_empty_slices_are_no_copies(source):
    images, masks = lgg_patient(2)
    images[:2] = 0
    replace_case(source, images, masks)
    assert convert(source) == 0


# ---- names of files ------------------------------------------------------------------------------------------------


def test_missing_slices(source, capsys):
    for number in (3, 4):
        image_file(source, number).unlink()
        mask_file(source, number).unlink()
    assert convert(source) == 1
    assert problems(capsys) == [f"slices 3, 4: no image, expected slices 1 to {SLICES}"]


def test_one_slice_under_two_names(source, capsys):
    shutil.copy(image_file(source, 2), image_file(source, 2).with_name(f"{CASE}_02.tif"))
    assert convert(source) == 1
    assert problems(capsys) == [f"{CASE}_02.tif and {CASE}_2.tif are one slice, expected one file"]


def test_slices_without_masks_and_masks_without_slices(source, capsys):
    mask_file(source, 5).unlink()
    shutil.copy(mask_file(source, 2), mask_file(source, SLICES + 1))
    shutil.copy(image_file(source, 2), image_file(source, 0))
    assert convert(source) == 1
    assert problems(capsys) == [
        "slice 0: expected numbers from 1",
        "slices 0, 5: no mask",
        f"mask {SLICES + 1}: no image",
    ]


def test_other_files(source, capsys):
    image_file(source, 2).with_name("montage.tif").write_bytes(b"")
    (source / "kaggle_3m" / CASE / ".DS_Store").write_bytes(b"")
    assert convert(source) == 1
    names = f"{CASE}_1.tif and {CASE}_1_mask.tif"
    assert problems(capsys) == [f"montage.tif is not a slice, expected names such as {names}"]


def test_no_slice_at_all(source, capsys):
    for path in (source / "kaggle_3m" / CASE).iterdir():
        path.unlink()
    assert convert(source) == 1
    assert problems(capsys) == [f"it has no image: no file matches '{CASE}_{{slice}}.tif'"]


def test_strange_folder_names(source, capsys):
    (source / "kaggle_3m" / CASE).rename(source / "kaggle_3m" / "patient 3")
    assert convert(source) == 1
    assert "kaggle_3m/patient 3: this folder holds images, but its name is not as in lgg" in capsys.readouterr().err


def test_archive_with_two_copies(source, capsys):
    shutil.copytree(source / "kaggle_3m", source / "lgg-mri-segmentation" / "kaggle_3m")
    assert convert(source) == 2
    err = capsys.readouterr().err
    assert f"holds 4 cases more than once, such as {NAMES[0]} in" in err and err.count("\n") == 1
    assert convert(source / "lgg-mri-segmentation") == 0


def test_link_out_of_the_source(source, tmp_path, capsys):
    (source / "kaggle_3m" / CASE).rename(tmp_path / CASE)
    (source / "kaggle_3m" / CASE).symlink_to(tmp_path / CASE)
    assert convert(source) == 1
    (line,) = problems(capsys)
    assert "--follow-links accepts it" in line
    assert convert(source, "--follow-links", "--overwrite") == 0


# ---- content of files ----------------------------------------------------------------------------------------------


def write_at(path: Path, array: np.ndarray) -> None:
    tifffile.imwrite(path, array)


def test_slices_of_other_forms(source, capsys):
    images, masks = lgg_patient(2)
    height, width = masks.shape[1:]
    for number in (2, 3):
        write_at(image_file(source, number), images[number - 1, :-1])
    write_at(image_file(source, 4), images[3, ..., :2])
    write_at(image_file(source, 5), images[4].astype(np.uint16))
    write_at(mask_file(source, 6), masks[5, :, :-2])
    write_at(mask_file(source, 7), np.where(masks[6] > 0, 128, 1).astype(np.uint8))
    assert convert(source) == 1
    form = "expected height x width x 3 of uint8"
    values = ", ".join(map(str, np.unique(np.where(masks[6] > 0, 128, 1))))
    assert problems(capsys) == [
        f"slices 2, 3: {width} x {height - 1} pixels, expected {width} x {height} as in the others",
        f"slice 4: {height} x {width} x 2 values of uint8, {form}",
        f"slice 5: {height} x {width} x 3 values of uint16, {form}",
        f"mask 6: {width - 2} x {height} pixels, expected {width} x {height} as in the others",
        f"mask 7: it holds {values}, expected 0 and 255",
    ]


@pytest.mark.parametrize("content", [b"", b"<html>sign in</html>", None])
def test_damaged_slices(source, capfd, content):
    path = image_file(source, 3)
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    assert convert(source) == 1
    lines = capfd.readouterr().err.rstrip("\n").split("\n")
    assert len(lines) == 2 and lines[1].startswith(f"  {CASE}: slice 3: {path.name} cannot be read: "), lines


def test_links_are_refused(source, capsys):
    assert convert(source, "--link") == 2
    assert "so its cases must be written: use --copy" in capsys.readouterr().err


# ---- cases without masks -------------------------------------------------------------------------------------------


def test_cases_without_masks(nnunet, source, capsys):
    images, _ = lgg_patient(2)
    replace_case(source, images, None)
    assert convert(source) == 1
    assert problems(capsys) == [f"label: no file matches '{CASE}_{{slice}}_mask.tif'"]
    assert convert(source, "--unlabelled", "--overwrite") == 0
    folder, content = dataset(nnunet)
    assert content["labels"] == {"background": 0, "tumor": 1, "ignore": 2}
    assert content["mstkd_conversion"]["unlabelled"] == [CASE]
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTr" / f"{CASE}.nii.gz")))
    np.testing.assert_array_equal(label, np.full(images.shape[:3], 2))
    assert convert(source, "--unlabelled-as-test", "--overwrite") == 0
    assert len(list((folder / "imagesTs").iterdir())) == 3 and not (folder / "labelsTs").exists()


def test_changed_slices_are_noticed(source, capsys):
    convert(source)
    write_at(mask_file(source, 2), np.zeros_like(lgg_patient(2)[1][0]))
    assert convert(source) == 2
    assert f"{CASE}: its files have changed since it was converted" in capsys.readouterr().err
