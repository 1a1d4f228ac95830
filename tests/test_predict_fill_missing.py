from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tiny
from predict_inputs import SHAPE, files, noise, read, write, write_case

from nnunetv2_mstkd import cli


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's folders with the description of data set 901, and an input folder."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    dataset = tmp_path / "raw" / tiny.DATASET
    dataset.mkdir()
    (dataset / "dataset.json").write_text(json.dumps(tiny.dataset_json(3)))
    write_case(tmp_path / "in", "a", [0, 1, 2])
    write_case(tmp_path / "in", "b", [1])
    return tmp_path


def fill(folders: Path, *options: str) -> int:
    which = () if "-m" in options else ("-d", "901")
    return cli.main(["fill-missing", "-i", str(folders / "in"), "-o", str(folders / "full"), *which, *options])


def test_copies_images_and_adds_zeros(folders, capsys):
    before = files(folders / "in")
    assert fill(folders) == 0
    written = files(folders / "full")
    assert sorted(written) == [f"{case}_000{channel}.nii.gz" for case in "ab" for channel in range(3)]
    assert {name: written[name] for name in before} == before == files(folders / "in")
    image = sitk.ReadImage(str(folders / "full" / "b_0001.nii.gz"))
    for channel in (0, 2):
        zero = sitk.ReadImage(str(folders / "full" / f"b_000{channel}.nii.gz"))
        assert not sitk.GetArrayFromImage(zero).any()
        assert zero.GetSize() == image.GetSize()
        for values in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(zero, values)() == pytest.approx(getattr(image, values)())
    assert "2 cases with 3 channels, 2 of them zero images" in capsys.readouterr().out


def test_nnunet_reads_every_case_without_a_warning(folders, capsys):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    # more than nnU-Net's reader takes, less than the tolerance
    write(folders / "in" / "b_0002.nii.gz", noise(5), spacing=(1.0004, 1.0, 1.25))
    assert fill(folders) == 0
    capsys.readouterr()
    for case in "ab":
        paths = [str(folders / "full" / f"{case}_000{channel}.nii.gz") for channel in range(3)]
        images, properties = SimpleITKIO().read_images(paths)
        assert images.shape == (3, *SHAPE)
        assert properties["spacing"] == pytest.approx([1.25, 1.0, 1.0])
    assert capsys.readouterr().out == ""
    np.testing.assert_array_equal(read(folders / "full" / "b_0002.nii.gz"), noise(5))


def test_all_zero_images_and_dropped_ones_are_written_anew(folders):
    write(folders / "in" / "b_0000.nii.gz", np.zeros((3, 3, 3), np.int16))
    assert fill(folders, "--drop", "T2") == 0
    assert read(folders / "full" / "b_0000.nii.gz").shape == SHAPE
    assert not read(folders / "full" / "a_0002.nii.gz").any()
    assert read(folders / "full" / "a_0001.nii.gz").any()


def test_links_instead_of_copies(folders):
    assert fill(folders, "--link") == 0
    link = folders / "full" / "a_0001.nii.gz"
    assert link.is_symlink() and link.resolve() == (folders / "in" / "a_0001.nii.gz").resolve()
    assert not (folders / "full" / "b_0000.nii.gz").is_symlink()


def test_a_bad_case_stops_everything_unless_skipped(folders, capsys):
    (folders / "in" / "a_0002.nii.gz").write_bytes(b"")
    assert fill(folders) == 2
    assert "nothing was written (--skip-bad: continue with the other 1)" in capsys.readouterr().err
    assert not (folders / "full").exists()
    assert fill(folders, "--skip-bad") == 1
    assert "a: T2 (a_0002.nii.gz)" in capsys.readouterr().err
    assert sorted(files(folders / "full")) == [f"b_000{channel}.nii.gz" for channel in range(3)]


def test_the_folder_appears_complete_or_not_at_all(folders, monkeypatch, capsys):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    def full_disk(self, *arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(SimpleITKIO, "write_seg", full_disk)
    before = sorted(os.listdir(folders))
    assert fill(folders) == 2
    assert "no space left" in capsys.readouterr().err
    assert sorted(os.listdir(folders)) == before


def test_output_folder_must_be_empty(folders, capsys):
    (folders / "full").mkdir()
    assert fill(folders) == 0
    before = files(folders / "full")
    assert fill(folders) == 2
    assert "is not empty" in capsys.readouterr().err
    assert files(folders / "full") == before
    assert cli.main(["fill-missing", "-i", str(folders / "in"), "-o", str(folders / "in"), "-d", "901"]) == 2
    assert "is the input folder" in capsys.readouterr().err


def test_a_model_folder_describes_the_channels_too(folders):
    model = folders / "model"
    model.mkdir()
    (model / "dataset.json").write_text(json.dumps(tiny.dataset_json(4)))
    (model / "plans.json").write_text(json.dumps(tiny.plans()))
    assert fill(folders, "-m", str(model)) == 0
    assert (folders / "full" / "a_0003.nii.gz").is_file()


def test_the_plans_say_which_reader(folders):
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    from nnunetv2_mstkd.nnunet.description import find_format

    assert find_format("901", None)[1] is SimpleITKIO  # by the ending
    preprocessed = folders / "preprocessed" / tiny.DATASET
    preprocessed.mkdir()
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps({**tiny.plans(), "image_reader_writer": "NibabelIO"}))
    dataset_json, reader = find_format(tiny.DATASET, None)
    assert reader is NibabelIO and len(dataset_json["channel_names"]) == 3


@pytest.mark.parametrize(
    ("dataset", "message"),
    [("902", "no dataset.json of data set 902: no folder Dataset902_*"), ("brats", "neither a number nor a name")],
)
def test_a_data_set_that_is_not_there_is_named(folders, capsys, dataset, message):
    code = cli.main(["fill-missing", "-i", str(folders / "in"), "-o", str(folders / "full"), "-d", dataset])
    assert code == 2 and message in capsys.readouterr().err
