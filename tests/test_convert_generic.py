from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import empty_folders

from nnunetv2_mstkd import cli
from nnunetv2_mstkd.dataset_conversion import conversion, generic, writing
from nnunetv2_mstkd.dataset_conversion.checks import label_values
from nnunetv2_mstkd.dataset_conversion.description import Description, read_description
from nnunetv2_mstkd.errors import InputError

SHAPE = (4, 5, 6)  # z, y, x
T1, T2 = 10, 20  # what fills the images of the two modalities, but for a corner
DESCRIPTION = {
    "modalities": {"T2": "t2.nii.gz", "T1": "t1.nii.gz"},
    "label": "seg.nii.gz",
    "labels": {"background": 0, "edema": 1, "core": 2},
}


@pytest.fixture
def nnunet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set nnU-Net's three folders and return their parent."""
    return empty_folders(tmp_path, monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Make a data set of three cases, a, b and c."""
    folder = tmp_path / "source"
    for case in "abc":
        make_case(folder / case)
    (folder / "README.md").write_text("not a case")
    return folder


def write(path: Path, array: np.ndarray, *, spacing=(1.0, 1.0, 2.0), origin=(5.0, -3.0, 7.0), direction=None) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    if direction is not None:
        image.SetDirection(direction)
    sitk.WriteImage(image, str(path))


def image_array(value: int) -> np.ndarray:
    array = np.full(SHAPE, value, np.int16)
    array[0, 0, 0] += 1
    return array


def label_array(*values: float, dtype: type = np.uint8) -> np.ndarray:
    array = np.zeros(SHAPE, dtype)
    array.flat[: len(values)] = values
    return array


def make_case(folder: Path) -> None:
    folder.mkdir(parents=True)
    write(folder / "t1.nii.gz", image_array(T1))
    write(folder / "t2.nii.gz", image_array(T2))
    write(folder / "seg.nii.gz", label_array(1, 2))


def convert(source: Path, *options: str, description: dict | None = None) -> int:
    """Run ``mstkd convert generic`` with the description in a file."""
    file = source.parent / "description.json"
    file.write_text(json.dumps(DESCRIPTION if description is None else description))
    arguments = ["convert", "generic", str(source), "-d", "7", "--name", "Toy", "--description", str(file), *options]
    return cli.main(arguments)


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def assert_nothing_was_written(nnunet: Path) -> None:
    """What an interrupted or refused run leaves for the next one is hidden."""
    assert not [path for path in (nnunet / "raw").iterdir() if not path.name.startswith(".")]
    assert not list((nnunet / "preprocessed").iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_channels_keep_the_declared_order(nnunet, source):
    assert convert(source) == 0
    folder = nnunet / "raw" / "Dataset007_Toy"
    assert sorted(content(folder)) == [
        "conversion.json",
        "dataset.json",
        *(f"imagesTr/{case}_000{channel}.nii.gz" for case in "abc" for channel in (0, 1)),
        *(f"labelsTr/{case}.nii.gz" for case in "abc"),
    ]
    assert json.loads((folder / "dataset.json").read_text()) == {
        "name": "Dataset007_Toy",
        "channel_names": {"0": "T2", "1": "T1"},
        "labels": {"background": 0, "edema": 1, "core": 2},
        "numTraining": 3,
        "file_ending": ".nii.gz",
        "mstkd_conversion": {
            "release": "generic",
            "release_values": {"0": 0, "1": 1, "2": 2},
            "classes": {"edema": 1, "core": 2},
            "label_file": "{case}.nii.gz",
            "missing": {},
        },
    }
    np.testing.assert_array_equal(read(folder / "imagesTr" / "b_0000.nii.gz"), image_array(T2))
    np.testing.assert_array_equal(read(folder / "imagesTr" / "b_0001.nii.gz"), image_array(T1))
    np.testing.assert_array_equal(read(folder / "labelsTr" / "b.nii.gz"), label_array(1, 2))


def test_compressed_nifti_is_copied_unchanged(nnunet, source):
    convert(source)
    copied = nnunet / "raw" / "Dataset007_Toy" / "imagesTr" / "a_0001.nii.gz"
    assert copied.read_bytes() == (source / "a" / "t1.nii.gz").read_bytes()


def test_other_formats_become_compressed_nifti(nnunet, source):
    flipped = (0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    for case in "abc":
        shutil.rmtree(source / case)
        (source / case).mkdir()
        write(source / case / "t1.mha", image_array(0) / np.float32(2), direction=flipped)
        write(source / case / "seg.nrrd", label_array(1), direction=flipped)
    description = {"modalities": {"T1": "*.mha"}, "label": "*.nrrd", "labels": {"background": 0, "edema": 1}}
    assert convert(source, description=description) == 0
    folder = nnunet / "raw" / "Dataset007_Toy"
    with gzip.open(folder / "imagesTr" / "a_0000.nii.gz") as file:
        assert len(file.read()) > 352  # NIfTI's header
    image, label = (sitk.ReadImage(str(folder / name)) for name in ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), image_array(0) / np.float32(2))
    for written in (image, label):
        assert written.GetSpacing() == (1.0, 1.0, 2.0)
        assert written.GetOrigin() == (5.0, -3.0, 7.0)
        np.testing.assert_allclose(written.GetDirection(), flipped, atol=1e-6)


def test_float_labels_are_written_as_uint8(nnunet, source):
    write(source / "a" / "seg.nii.gz", label_array(2, 1, 2, dtype=np.float64))
    assert convert(source) == 0
    label = sitk.ReadImage(str(nnunet / "raw" / "Dataset007_Toy" / "labelsTr" / "a.nii.gz"))
    assert label.GetPixelID() == sitk.sitkUInt8
    np.testing.assert_array_equal(sitk.GetArrayFromImage(label), label_array(2, 1, 2))


def test_remap_makes_values_consecutive(nnunet, source):
    for case in "abc":
        write(source / case / "seg.nii.gz", label_array(1, 2, 4, 4))
    labels = {"background": 0, "edema": 1, "core": 2, "enhancing": 3}
    assert convert(source, description={**DESCRIPTION, "labels": labels, "remap": {"1": 2, "2": 1, "4": 3}}) == 0
    written = read(nnunet / "raw" / "Dataset007_Toy" / "labelsTr" / "c.nii.gz")
    np.testing.assert_array_equal(written, label_array(2, 1, 3, 3))


def test_nnunet_reads_the_regions(nnunet, source):
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    assert convert(source, description={**DESCRIPTION, "labels": labels, "regions_class_order": [1, 2]}) == 0
    written = json.loads((nnunet / "raw" / "Dataset007_Toy" / "dataset.json").read_text())
    manager = LabelManager(written["labels"], written["regions_class_order"])
    assert manager.all_regions == [(1, 2), (2,)]
    assert manager.ignore_label == 3


def test_options_can_replace_the_description_file(nnunet, source):
    arguments = ["convert", "generic", str(source), "-d", "7", "--name", "Toy", "--label", "seg.nii.gz"]
    arguments += ["--modality", "T2=t2.nii.gz", "--modality", "T1=t1.nii.gz"]
    arguments += ["--class", "whole=1,2", "--class", "core=2", "--regions-class-order", "1,2"]
    assert cli.main(arguments) == 0
    written = json.loads((nnunet / "raw" / "Dataset007_Toy" / "dataset.json").read_text())
    assert written["channel_names"] == {"0": "T2", "1": "T1"}
    assert written["labels"] == {"background": 0, "whole": [1, 2], "core": 2}
    assert written["regions_class_order"] == [1, 2]


def test_options_override_the_file(nnunet, source):
    assert convert(source, "--modality", "T1=t1.nii.gz") == 0
    written = json.loads((nnunet / "raw" / "Dataset007_Toy" / "dataset.json").read_text())
    assert written["channel_names"] == {"0": "T1"}


def test_yaml_equals_json(nnunet, source):
    file = source.parent / "description.yaml"
    file.write_text(
        "modalities: {T2: t2.nii.gz, T1: t1.nii.gz}\nlabel: seg.nii.gz\nlabels: {background: 0, edema: 1, core: 2}\n"
    )
    assert read_description(file) == DESCRIPTION


def test_generic_script_equals_the_command(nnunet, source):
    (source.parent / "description.json").write_text(json.dumps(DESCRIPTION))
    command = [sys.executable, generic.__file__, str(source), "-d", "7", "--name", "Toy"]
    subprocess.run([*command, "--description", str(source.parent / "description.json")], check=True)
    by_script = content(nnunet / "raw" / "Dataset007_Toy")
    assert convert(source, "--overwrite") == 0
    assert content(nnunet / "raw" / "Dataset007_Toy") == by_script


def test_test_cases_need_no_label(nnunet, source):
    (source / "c" / "seg.nii.gz").unlink()
    assert convert(source, "--test-cases", "b", "[c-z]") == 0
    folder = nnunet / "raw" / "Dataset007_Toy"
    assert {path.name for path in (folder / "imagesTr").iterdir()} == {"a_0000.nii.gz", "a_0001.nii.gz"}
    assert {path.name for path in (folder / "imagesTs").iterdir()} == {
        f"{case}_000{channel}.nii.gz" for case in "bc" for channel in (0, 1)
    }
    assert [path.name for path in (folder / "labelsTs").iterdir()] == ["b.nii.gz"]
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 1


def test_case_folders_may_be_nested(nnunet, source):
    (source / "HGG").mkdir()
    shutil.move(source / "a", source / "HGG" / "a")
    assert convert(source, "--cases", "*/*") == 0
    assert [path.name for path in (nnunet / "raw" / "Dataset007_Toy" / "labelsTr").iterdir()] == ["a.nii.gz"]


def test_all_problems_are_listed_together(nnunet, source, capsys):
    (source / "a" / "t1.nii.gz").unlink()
    write(source / "b" / "seg.nii.gz", label_array(1, 3, 9))
    write(source / "b" / "t1.nii.gz", image_array(T1), spacing=(1.0, 1.0, 2.5))
    (source / "c" / "t2.nii.gz").write_bytes(b"no image")
    assert convert(source) == 2
    err = capsys.readouterr().err
    assert "4 problems, nothing was written" in err
    assert "\n  a: T1: no file matches 't1.nii.gz'; --allow-missing fills an absent modality with zeros" in err
    assert "\n  b: T1 has spacing (1, 1, 2.5) instead of (1, 1, 2) as in T2" in err
    assert "\n  b: label (seg.nii.gz) holds the undeclared values [3, 9], declared are [0, 1, 2]" in err
    assert "\n  c: T2 (t2.nii.gz) cannot be read" in err
    assert "\n  c: label" not in err
    assert_nothing_was_written(nnunet)


def test_bad_cases_are_left_out_and_listed(nnunet, source, capsys):
    write(source / "b" / "seg.nii.gz", label_array(1, 3))
    assert convert(source) == 1
    out, err = capsys.readouterr()
    assert err.startswith("1 case left out:\n  b: label (seg.nii.gz) holds the undeclared values [3]")
    assert "2 training cases" in out
    folder = nnunet / "raw" / "Dataset007_Toy"
    assert sorted(path.name for path in (folder / "labelsTr").iterdir()) == ["a.nii.gz", "c.nii.gz"]
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 2
    splits = json.loads((nnunet / "preprocessed" / "Dataset007_Toy" / "splits_final.json").read_text())
    assert sorted(fold["val"] for fold in splits) == [["a"], ["c"]]


def test_strict_writes_nothing(nnunet, source, capsys):
    write(source / "b" / "seg.nii.gz", label_array(1, 3))
    assert convert(source, "--strict") == 2
    assert "1 problem, nothing was written:\n  b: label" in capsys.readouterr().err
    assert_nothing_was_written(nnunet)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (label_array(1, 1.25, dtype=np.float32), "holds 1.25, expected integers only"),
        (label_array(1, np.nan, dtype=np.float32), "holds nan, expected integers only"),
        (label_array(1, np.inf, dtype=np.float32), "holds inf, expected integers only"),
        (label_array(-1, dtype=np.int16), r"undeclared values \[-1\]"),
        (label_array(257, dtype=np.int16), r"undeclared values \[257\]"),
    ],
    ids=["fraction", "nan", "infinity", "negative", "beyond uint8"],
)
def test_undeclared_labels_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        label_values(array, Description.from_mapping(DESCRIPTION))


def test_remap_targets_are_refused_in_files():
    labels = {"background": 0, "edema": 1, "core": 2, "enhancing": 3}
    description = Description.from_mapping({**DESCRIPTION, "labels": labels, "remap": {"4": 3}})
    assert set(np.unique(label_values(label_array(1, 2, 4), description))) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match=r"undeclared values \[3\], declared are \[0, 1, 2, 4\]"):
        label_values(label_array(1, 3), description)


@pytest.mark.parametrize("part", ["spacing", "origin", "direction"])
@pytest.mark.parametrize("file", ["t1.nii.gz", "seg.nii.gz"])
def test_files_of_a_case_share_a_grid(nnunet, source, capsys, part, file):
    angle = np.float64(0.002)
    turned = (np.cos(angle), -np.sin(angle), 0.0, np.sin(angle), np.cos(angle), 0.0, 0.0, 0.0, 1.0)
    moved = {"spacing": (1.0, 1.0, 2.002), "origin": (5.0, -3.002, 7.0), "direction": turned}[part]
    write(source / "b" / file, label_array(1), **{part: moved})
    assert convert(source, "--strict") == 2
    assert f"has {part} (" in capsys.readouterr().err


def test_files_of_a_case_share_a_size(nnunet, source, capsys):
    write(source / "b" / "seg.nii.gz", label_array(1)[:3])
    assert convert(source) == 1
    assert "b: label has size (6, 5, 3) instead of (6, 5, 4) as in T2" in capsys.readouterr().err


def test_rounding_in_headers_is_removed(nnunet, source):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    write(source / "b" / "t1.nii.gz", image_array(T1), spacing=(1.0, 1.0005, 2.0))
    with pytest.raises(RuntimeError):
        SimpleITKIO().read_images([str(source / "b" / name) for name in ("t2.nii.gz", "t1.nii.gz")])
    assert convert(source) == 0
    written = [str(nnunet / "raw" / "Dataset007_Toy" / "imagesTr" / f"b_000{channel}.nii.gz") for channel in (0, 1)]
    images, properties = SimpleITKIO().read_images(written)
    assert properties["spacing"] == [2.0, 1.0, 1.0]
    np.testing.assert_array_equal(images, [image_array(T2), image_array(T1)])


def test_truncated_images_are_refused(nnunet, source, capsys):
    file = source / "a" / "t1.nii.gz"
    noise = np.random.default_rng(0).integers(1, 1000, (40, 50, 60), np.int16)
    for name in ("t1", "t2", "seg"):
        write(source / "a" / f"{name}.nii.gz", np.minimum(noise, 2) if name == "seg" else noise)
    file.write_bytes(file.read_bytes()[:-40])
    assert not sitk.GetArrayFromImage(sitk.ReadImage(str(file)))[-1, -1, -1]
    assert convert(source) == 1
    assert "a: T1 (t1.nii.gz) is truncated" in capsys.readouterr().err


def test_nan_is_refused(nnunet, source, capsys):
    write(source / "a" / "t1.nii.gz", np.full(SHAPE, np.nan, np.float32))
    assert convert(source) == 1
    assert "a: T1 (t1.nii.gz) has 120 of 120 voxels that are NaN, infinite or beyond 1e15" in capsys.readouterr().err


@pytest.mark.parametrize("value", [np.nan, 3e38])
def test_a_voxel_that_is_no_intensity_is_refused(nnunet, source, capsys, value):
    image = np.random.default_rng(0).normal(100, 10, SHAPE).astype(np.float32)
    image[0, 0, 0] = value
    write(source / "a" / "t1.nii.gz", image)
    assert convert(source) == 1
    assert "a: T1 (t1.nii.gz) has 1 of 120 voxels that are NaN, infinite or beyond 1e15" in capsys.readouterr().err


def test_multichannel_images_are_refused(nnunet, source, capsys):
    both = sitk.JoinSeries([sitk.ReadImage(str(source / "a" / name)) for name in ("t1.nii.gz", "t2.nii.gz")])
    sitk.WriteImage(both, str(source / "a" / "t1.nii.gz"))
    assert convert(source) == 1
    assert "a: T1 (t1.nii.gz) has 4 dimensions" in capsys.readouterr().err


def test_ambiguous_patterns_are_refused(nnunet, source, capsys):
    modalities = {"T1": "t1.nii.gz", "T2": "t*.nii.gz"}
    assert convert(source, description={**DESCRIPTION, "modalities": modalities}) == 2
    assert "a: T2: t1.nii.gz, t2.nii.gz match 't*.nii.gz', expected one file" in capsys.readouterr().err


def test_shared_files_are_refused(nnunet, source, capsys):
    modalities = {"T1": "t1.nii.gz", "T2": "*1.nii.gz"}
    assert convert(source, description={**DESCRIPTION, "modalities": modalities}) == 2
    assert "a: T1 and T2 are the same file t1.nii.gz" in capsys.readouterr().err


def test_changed_sources_are_refused(nnunet, source, capsys):
    convert(source)
    before = content(nnunet / "raw")
    write(source / "a" / "t1.nii.gz", image_array(99))
    assert convert(source) == 2
    err = capsys.readouterr().err
    assert "--overwrite converts it again:\n  a: its files have changed since it was converted" in err
    assert content(nnunet / "raw") == before


def test_foreign_data_sets_are_refused(nnunet, source, capsys):
    folder = nnunet / "raw" / "Dataset007_Toy"
    folder.mkdir()
    assert convert(source) == 2
    assert "Dataset007_Toy already exists and was not written by mstkd convert" in capsys.readouterr().err
    assert not list(folder.iterdir())
    (folder / "dataset.json").write_text("{}")
    assert convert(source, "--overwrite") == 2
    assert "Dataset007_Toy exists and was not written by mstkd convert; choose another" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["dataset.json"]
    (folder / "dataset.json").unlink()
    assert convert(source, "--overwrite") == 0


def test_files_that_were_put_into_a_data_set_are_not_removed(nnunet, source, capsys):
    convert(source)
    added = nnunet / "raw" / "Dataset007_Toy" / "imagesTs" / "new_0000.nii.gz"
    added.parent.mkdir(exist_ok=True)
    added.touch()
    assert convert(source, "--overwrite") == 2
    assert "1 file that mstkd convert has not written, such as imagesTs/new_0000.nii.gz" in capsys.readouterr().err
    assert added.is_file()
    added.unlink()
    assert convert(source, "--overwrite") == 0


def test_several_labels_of_each_case_are_named(nnunet, source, capsys):
    for case in "abc":
        shutil.copy(source / case / "seg.nii.gz", source / case / "seg_2.nii.gz")
    description = {**DESCRIPTION, "label": "seg*.nii.gz"}
    assert convert(source, description=description) == 2
    error = capsys.readouterr().err
    assert "expected one file" in error and "validation set" not in error


def test_a_bad_case_that_has_to_validate_is_explained(nnunet, source, capsys):
    (source / "c" / "t1.nii.gz").unlink()
    assert convert(source, "--val-cases", "c") == 2
    assert "0 of 2 training cases validate" in (error := capsys.readouterr().err) and "c: T1: no file" in error


def test_cases_that_no_list_names_are_noted(nnunet, source, tmp_path, capsys):
    for name, cases in (("train", "a"), ("val", "b")):
        (tmp_path / f"{name}.txt").write_text("\n".join(cases))
    assert convert(source, "--splits", str(tmp_path / "train.txt"), str(tmp_path / "val.txt")) == 0
    assert "1 training case in no fold, such as c" in capsys.readouterr().out


def test_overwrite_replaces_the_whole_folder(nnunet, source):
    convert(source)
    shutil.rmtree(source / "c")
    assert convert(source, "--overwrite") == 0
    assert [path.name for path in (nnunet / "raw").iterdir()] == ["Dataset007_Toy"]
    assert len(json.loads((nnunet / "preprocessed" / "Dataset007_Toy" / "splits_final.json").read_text())) == 2
    labels = nnunet / "raw" / "Dataset007_Toy" / "labelsTr"
    assert sorted(path.name for path in labels.iterdir()) == ["a.nii.gz", "b.nii.gz"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_failure_while_writing_keeps_the_old_data_set(nnunet, source, monkeypatch, error):
    convert(source)
    before = content(nnunet / "raw" / "Dataset007_Toy")

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(writing.shutil, "copyfile", fail)
    assert convert(source, "--overwrite") in (2, 130)
    assert content(nnunet / "raw" / "Dataset007_Toy") == before
    assert [path.name for path in (nnunet / "raw").glob("Dataset*")] == ["Dataset007_Toy"]


def test_failure_while_replacing_keeps_the_old_data_set(nnunet, source, monkeypatch):
    convert(source)
    before = content(nnunet / "raw" / "Dataset007_Toy")
    rename = Path.rename

    def fail_for_the_new_one(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise PermissionError(f"{path} is in use")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    assert convert(source, "--overwrite") == 2
    assert content(nnunet / "raw" / "Dataset007_Toy") == before


@pytest.mark.parametrize("place", ["raw", "preprocessed", "results"])
def test_number_in_use_is_refused(nnunet, source, capsys, place):
    (nnunet / place / "Dataset007_Other").mkdir()
    assert convert(source) == 2
    assert "Dataset007_Other has the number of Dataset007_Toy" in capsys.readouterr().err


def test_missing_environment_variable_is_named(nnunet, source, capsys, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    assert convert(source) == 2
    assert "nnUNet_raw is not set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dataset_id", "name"), [(0, "Toy"), (1000, "Toy"), (7, "To__y"), (7, ""), (7, "../Toy"), (7, "a b")]
)
def test_impossible_dataset_names_are_refused(dataset_id, name):
    with pytest.raises(ValueError, match="expected"):
        conversion.dataset_name(dataset_id, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modality": {}}, "unknown key 'modality'"),
        ({"modalities": {}}, "modalities is {}"),
        ({"modalities": ["t1.nii.gz"]}, "modalities is"),
        ({"modalities": {"T1": ""}}, "the pattern of T1 is ''"),
        ({"modalities": {1: "t1.nii.gz"}}, "a modality is called 1"),
        ({"modalities": {"T1": "t1.nii.gz", "label": "t2.nii.gz"}}, "a modality is called 'label'"),
        ({"label": "/seg.nii.gz"}, "expected a relative one"),
        ({"labels": {"edema": 1}}, "'background': 0"),
        ({"labels": {"background": 0}}, r"the label values are \[0\]"),
        ({"labels": {"background": 0, "edema": 2}}, r"the label values are \[0, 2\]"),
        ({"labels": {"background": 0, "edema": 1.0}}, "label 'edema' is 1.0"),
        ({"labels": {"background": 0, "edema": True}}, "label 'edema' is True"),
        ({"labels": {"background": 0, "whole": []}}, "label 'whole' is"),
        ({"labels": {"background": 0, "edema": 1, "ignore": [2]}}, "label 'ignore' is"),
        ({"labels": {"background": 0, "ignore": 1, "edema": 2}}, "expected the highest value, 2"),
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, "for each of the 2 regions whole, core"),
        (
            {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 3]},
            "for each of the 2 regions whole, core",
        ),
        ({"regions_class_order": [1, 2]}, "no label is a list of several values"),
        ({"test_cases": "a"}, "expected a list of names"),
        ({"remap": {"x": 1}}, "remap is"),
    ],
)
def test_impossible_descriptions_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Description.from_mapping({**DESCRIPTION, **change})


@pytest.mark.parametrize("key", ["modalities", "label", "labels"])
def test_incomplete_descriptions_are_refused(key):
    incomplete = {name: value for name, value in DESCRIPTION.items() if name != key}
    with pytest.raises(ValueError, match=f"lacks {key}$"):
        Description.from_mapping(incomplete)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.json", '{"label": ', "cannot read the description"),
        ("d.yaml", "a: b: c", "cannot read the description"),
        ("d.txt", "{}", "ends in '.txt', expected .json"),
        ("d.json", "[1]", "holds a list"),
        ("d.yaml", "label: L\xe9sion", "cannot read the description"),
    ],
)
def test_unreadable_descriptions_are_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=message) as caught:
        read_description(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modality", "t1.nii.gz"], "--modality is 't1.nii.gz', expected NAME=PATTERN"),
        (["--modality", "T1=a", "--modality", "T1=b"], "--modality names T1 twice"),
        (["--class", "edema=one"], "--class has the value 'one'"),
        (["--test-cases", "z"], "matches the test case 'z'"),
        (["--test-cases", "y", "z"], "matches the test case 'y' and 1 more"),
        (["--test-cases", "*"], "all 3 cases"),
        (["--cases", "x*"], "matches 'x*', expected one folder per case"),
        (["--workers", "0"], "--workers is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--folds", "2", "--val-cases", "a"], "expected one of them"),
        (["--folds", "4"], "4 folds of 3 training cases"),
        (["--folds", "1"], "1 folds of 3 training cases"),
        (["--val-cases", "z"], "validation cases z are not training cases; these are a, b, c"),
        (["--val-cases", "a", "b", "c"], "3 of 3 training cases validate"),
    ],
)
def test_impossible_options_write_nothing(nnunet, source, capsys, options, message):
    assert convert(source, *options) == 2
    assert message in capsys.readouterr().err
    assert_nothing_was_written(nnunet)
