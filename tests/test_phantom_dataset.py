"""The phantom as an nnU-Net raw data set, and the command that writes it."""

from __future__ import annotations

import json
import os

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_mstkd import cli
from nnunetv2_mstkd.phantom import dataset as dataset_module
from nnunetv2_mstkd.phantom import make_case, write_dataset
from nnunetv2_mstkd.phantom.dataset import case_seed, read_record

SMALL = {"cases": 2, "test_cases": 1, "spacing": 6.0, "workers": 1}


def _contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small data set that no test changes."""
    return write_dataset(tmp_path_factory.mktemp("raw"), 901, **SMALL).folder


def test_layout_is_nnunets(written):
    assert written.name == "Dataset901_Phantom"
    expected = {"dataset.json", "phantom.json"}
    for suffix, names in (("Tr", ("phantom_000", "phantom_001")), ("Ts", ("phantom_test_000",))):
        expected |= {f"labels{suffix}/{name}.nii.gz" for name in names}
        expected |= {f"images{suffix}/{name}_{channel:04d}.nii.gz" for name in names for channel in range(4)}
    assert set(_contents(written)) == expected
    description = json.loads((written / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}
    assert list(description["labels"].items()) == [
        ("background", 0),
        ("whole tumor", [1, 2, 3]),
        ("tumor core", [2, 3]),
        ("enhancing tumor", [3]),
    ]
    assert description["regions_class_order"] == [1, 2, 3]
    assert description["numTraining"] == 2
    assert description["file_ending"] == ".nii.gz"


def test_files_hold_the_case_of_their_seed(written):
    case = make_case(case_seed(0, "train", 1), spacing=6.0)
    for channel in range(4):
        image = nibabel.load(written / "imagesTr" / f"phantom_001_{channel:04d}.nii.gz")
        np.testing.assert_array_equal(np.asarray(image.dataobj).T, case.images[channel])
        np.testing.assert_allclose(image.affine[:3, :3], np.diag([6.0] * 3), atol=1e-6)
        np.testing.assert_allclose(image.affine[:3, 3], case.origin, atol=1e-4)
    label = sitk.ReadImage(str(written / "labelsTr" / "phantom_001.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(label), case.label)
    assert read_record(written)["cases"]["phantom_001"] == pytest.approx(case.volumes_ml(), abs=1e-3)


def test_cases_are_independent_of_number_and_workers(written, tmp_path):
    more = write_dataset(tmp_path, 902, cases=3, test_cases=2, spacing=6.0, workers=2).folder
    few, many = _contents(written), _contents(more)
    shared = [name for name in few if name.endswith(".nii.gz")]
    assert len(shared) == 15
    for name in shared:
        assert few[name] == many[name], name


def test_no_two_cases_share_a_seed():
    seeds = {case_seed(seed, split, i) for seed in (0, 1, 2**32) for split in ("train", "test") for i in range(50)}
    assert len(seeds) == 300


def test_nnunet_accepts_it(written, capsys):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    verify_dataset_integrity(str(written), 1)
    printed = capsys.readouterr().out
    assert "verify_dataset_integrity Done" in printed
    assert "Warning" not in printed


def test_complete_folder_is_kept(tmp_path):
    folder, new = write_dataset(tmp_path, 901, **SMALL)
    assert new
    before = _contents(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_dataset(tmp_path, 901, **SMALL) == (folder, False)
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    for change, message in (
        ({"recipe": "hard"}, "exists with recipe 'default', asked for 'hard': add --overwrite"),
        ({"seed": 1}, "exists with seed 0, asked for 1: add --overwrite"),
        ({"cases": 3}, "exists with cases 2, asked for 3: add --overwrite"),
    ):
        with pytest.raises(ValueError, match=message):
            write_dataset(tmp_path, 901, **{**SMALL, **change})
    assert _contents(folder) == before

    assert write_dataset(tmp_path, 901, **{**SMALL, "cases": 1, "seed": 1}, overwrite=True).new
    assert [path.name for path in (folder / "labelsTr").iterdir()] == ["phantom_000.nii.gz"]
    assert _contents(folder)["labelsTr/phantom_000.nii.gz"] != before["labelsTr/phantom_000.nii.gz"]
    assert [path.name for path in tmp_path.iterdir()] == ["Dataset901_Phantom"]


def test_incomplete_folder_is_refused(tmp_path):
    folder = write_dataset(tmp_path, 901, **SMALL).folder
    (folder / "imagesTr" / "phantom_000_0002.nii.gz").unlink()
    with pytest.raises(ValueError, match="should hold 2 cases and has 7 images and 2 labels: add --overwrite"):
        write_dataset(tmp_path, 901, **SMALL)


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_folder_is_never_touched(tmp_path, overwrite):
    folder = tmp_path / "Dataset901_Phantom"
    folder.mkdir()
    (folder / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="was not written by mstkd phantom"):
        write_dataset(tmp_path, 901, **SMALL, overwrite=overwrite)
    assert _contents(folder) == {"dataset.json": b"{}"}


def test_id_in_use_is_refused(tmp_path):
    (tmp_path / "Dataset901_Other").mkdir()
    with pytest.raises(ValueError, match="data set id 901 is taken by Dataset901_Other"):
        write_dataset(tmp_path, 901, **SMALL)
    assert os.listdir(tmp_path) == ["Dataset901_Other"]


@pytest.mark.parametrize("existing", [False, True])
def test_interrupt_keeps_the_old_folder(tmp_path, monkeypatch, existing):
    if existing:
        write_dataset(tmp_path, 901, **SMALL)
    before = _contents(tmp_path)
    real, calls = dataset_module.make_case, []

    def fails_at_the_second_case(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(dataset_module, "make_case", fails_at_the_second_case)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, 901, **{**SMALL, "seed": 5}, overwrite=True)
    assert len(calls) == 2
    assert _contents(tmp_path) == before
    assert len(os.listdir(tmp_path)) == existing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_id": 0}, "dataset id must be between 1 and 999, found 0"),
        ({"name": "A__B"}, "data set name must not have '__', at which nnU-Net splits names of results, found 'A__B'"),
        ({"name": "a/b"}, "data set name must consist of letters, digits, '_' and '-', found 'a/b'"),
        ({"cases": 0}, "cases must be at least 1, found 0"),
        ({"test_cases": -1}, "test cases must be at least 0, found -1"),
        ({"workers": 0}, "workers must be at least 1, found 0"),
        ({"spacing": 0}, "spacing must be between 1 and 6 mm, found 0"),
        ({"recipe": "soft"}, "unknown phantom recipe 'soft'; known recipes: default, hard"),
    ],
)
def test_impossible_arguments_write_nothing(tmp_path, change, message):
    with pytest.raises(ValueError) as error:
        write_dataset(tmp_path / "raw", **{"dataset_id": 901, **SMALL, **change})
    assert str(error.value) == message
    assert not (tmp_path / "raw").exists()


COMMAND = ["phantom", "-d", "77", "--cases", "2", "--test-cases", "1", "--spacing", "6", "--workers", "1"]


def test_command_writes_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    assert cli.main(COMMAND) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"folder: {tmp_path / 'Dataset077_Phantom'}"
    assert lines[1] == "cases: 2 for training, 1 for testing"
    volumes = [case["whole tumor"] for case in read_record(tmp_path / "Dataset077_Phantom")["cases"].values()]
    low, median, high = sorted(volumes)
    assert lines[2] == f"whole tumor: median {median:.1f} ml, {low:.1f} to {high:.1f} ml, absent in 0 of 3"
    assert lines[3].startswith("tumor core: ")
    assert lines[4].startswith("enhancing tumor: ")
    assert lines[5] == "note: phantom numbers say nothing about clinical performance"

    assert cli.main(COMMAND) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("(already complete, nothing written)")
    assert cli.main([*COMMAND, "--recipe", "hard"]) == 2
    assert cli.main([*COMMAND, "--recipe", "hard", "--overwrite"]) == 0
    assert read_record(tmp_path / "Dataset077_Phantom")["parameters"]["recipe"]["name"] == "hard"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "0"], "mstkd phantom: cases must be at least 1, found 0\n"),
        (["--anatomy", "mouse"], "mstkd phantom: unknown phantom anatomy 'mouse'; known anatomies: procedural, mni\n"),
    ],
)
def test_command_line_mistakes_are_one_line(tmp_path, capsys, arguments, message):
    assert cli.main([*COMMAND, "--raw", str(tmp_path), *arguments]) == 2
    assert capsys.readouterr().err == message
    assert not list(tmp_path.iterdir())


def test_missing_raw_folder_names_the_remedy(monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    assert cli.main(COMMAND) == 2
    assert (
        capsys.readouterr().err
        == "mstkd phantom: nnUNet_raw is not set: export nnUNet_raw=FOLDER, or pass --raw FOLDER\n"
    )


def test_option_raw_overrides_the_variable(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "variable"))
    assert cli.main([*COMMAND, "--raw", str(tmp_path / "option")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["option"]
