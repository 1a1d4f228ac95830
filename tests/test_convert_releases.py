"""Every release, from a tree as it is downloaded to a data set that nnU-Net accepts, and back."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import release_trees
import SimpleITK as sitk
from conftest import empty_folders, in_this_process
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from release_trees import case_folder, make_release, own_label, patient
from test_faults import full_disk

from nnunetv2_mstkd import cli
from nnunetv2_mstkd.dataset_conversion import releases
from nnunetv2_mstkd.dataset_conversion.releases import RELEASES

ROOT = Path(__file__).parents[1]
VOLUMES = [name for name, release in RELEASES.items() if not release.slices]
"""Releases of 3-D files; test_convert_lgg.py has the one of slices."""
CHANNELS = {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}


@pytest.fixture(autouse=True)
def nnunet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set nnU-Net's three folders, shrink the releases' grids, and return the parent of the folders."""
    release_trees.use_small_grids(monkeypatch)
    return empty_folders(tmp_path, monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


def convert(release: str, source: Path, *options: str) -> int:
    return cli.main(["convert", release, str(source), "-d", "7", "--name", "Toy", "--workers", "1", *options])


def verify(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's own check, in this process."""
    with in_this_process(monkeypatch):
        verify_dataset_integrity(str(folder), num_processes=1)


def read(path: Path) -> np.ndarray:
    """Voxels in the order (x, y, z)."""
    return np.asarray(nibabel.load(path).dataobj)


def dataset_json(nnunet: Path) -> dict:
    return json.loads((nnunet / "raw" / "Dataset007_Toy" / "dataset.json").read_text())


@pytest.mark.parametrize("release", VOLUMES)
def test_round_trip(nnunet, source, monkeypatch, capsys, release):
    names = make_release(source, release)
    assert convert(release, source) == 0
    folder = nnunet / "raw" / "Dataset007_Toy"
    verify(folder, monkeypatch)
    content = dataset_json(nnunet)
    assert content["channel_names"] == CHANNELS
    assert content["numTraining"] == len(names)

    manager = LabelManager(content["labels"], content["regions_class_order"])
    classes = RELEASES[release].classes
    for number, name in enumerate(names):
        for channel in range(4):
            image = read(folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz")
            np.testing.assert_array_equal(image, patient(number)[0][channel])
        written = read(folder / "labelsTr" / f"{name}.nii.gz")
        own = own_label(release, number)
        # a region holds the same voxels, whatever the values are
        for (region, parts), values in zip(RELEASES[release].regions.items(), manager.foreground_regions, strict=True):
            expected = np.isin(own, [classes[part] for part in parts])
            np.testing.assert_array_equal(np.isin(written, values), expected, err_msg=region)
        # and regions painted over one another, as nnU-Net exports a prediction, give the label back
        painted = np.zeros_like(written)
        for values, value in zip(manager.foreground_regions, content["regions_class_order"], strict=True):
            painted[np.isin(written, values)] = value
        if release == "brats2015":  # its three regions do not tell NCR from NET
            written[written == 1] = 3
        np.testing.assert_array_equal(painted, written)

    out = nnunet / "restored"
    assert cli.main(["restore-labels", "-i", str(folder / "labelsTr"), "-o", str(out), "-d", "7"]) == 0
    for number, name in enumerate(names):
        own_name = release_trees.file_of(release, name).removesuffix(".gz").removesuffix(".nii")
        if release == "brats2015":  # the number in a file's name says nothing about the case
            own_name = name
        restored = nibabel.load(out / f"{own_name}.nii.gz")
        np.testing.assert_array_equal(np.asarray(restored.dataobj), own_label(release, number))
        np.testing.assert_allclose(restored.affine, release_trees.affine_of(release), atol=1e-5)
    assert len(list(out.iterdir())) == len(names)


@pytest.mark.parametrize("release", ["brats2021", "brats2024_gli", "brats2024_ped", "msd_task01"])
def test_plain_labels(nnunet, source, monkeypatch, release):
    make_release(source, release)
    assert convert(release, source, "--labels") == 0
    verify(nnunet / "raw" / "Dataset007_Toy", monkeypatch)
    content = dataset_json(nnunet)
    assert (
        content["labels"]
        == {
            "brats2021": {"background": 0, "NCR": 1, "ED": 2, "ET": 3},
            "brats2024_gli": {"background": 0, "NCR": 1, "ED": 2, "ET": 3, "RC": 4},
            "brats2024_ped": {"background": 0, "ET": 1, "NET": 2, "CC": 3, "ED": 4},
            "msd_task01": {"background": 0, "ED": 1, "NCR": 2, "ET": 3},
        }[release]
    )
    assert "regions_class_order" not in content


def test_cavity_is_not_part_of_the_whole_tumor(nnunet, source):
    make_release(source, "brats2024_gli")
    convert("brats2024_gli", source)
    content = dataset_json(nnunet)
    assert content["labels"] == {
        "background": 0,
        "whole tumor": [1, 2, 3],
        "tumor core": [1, 3],
        "enhancing tumor": [3],
        "resection cavity": [4],
    }
    assert content["regions_class_order"] == [2, 1, 3, 4]


@pytest.mark.parametrize("family", sorted({release.family for release in RELEASES.values()}))
def test_scripts_convert_the_releases_of_their_family(nnunet, source, monkeypatch, family):
    release = next(name for name, release in RELEASES.items() if release.family == family)
    make_release(source, release)
    monkeypatch.setattr(sys, "argv", ["script", release, str(source), "-d", "7", "--name", "Toy", "--workers", "1"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "dataset_conversion" / f"{family}.py"), run_name="__main__")
    assert stop.value.code == 0
    assert dataset_json(nnunet)["mstkd_conversion"]["release"] == release


@pytest.mark.parametrize("words", [["dataset_conversion/brats.py"], ["-m", "dataset_conversion.brats"]])
def test_scripts_run_as_files_and_modules(words):
    command = [sys.executable, *words, "--help"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "brats2021" in printed and "fets2022" not in printed


def test_values_are_those_of_the_documentation():
    """Written down twice: a slip in the table is a wrong model."""
    for name, release in RELEASES.items():
        listed = sorted(release.classes.items(), key=lambda item: item[1])
        page = (ROOT / "documentation" / "datasets" / f"{release.family}.md").read_text(encoding="utf-8")
        assert ", ".join(f"{part} {value}" for part, value in listed) in page, name


def test_regions_of_the_releases():
    written = {name: release.description() for name, release in RELEASES.items()}
    orders = {name: (list(it.labels.values())[1:], list(it.regions_class_order)) for name, it in written.items()}
    assert orders["brats2020"] == orders["brats2023_men"] == ([[1, 2, 3], [1, 3], [3]], [2, 1, 3])
    assert orders["brats2025_met"] == ([[1, 2, 3], [1, 3], [3], [4]], [2, 1, 3, 4])
    assert orders["brats2024_ped"] == ([[1, 2, 3, 4], [1, 2, 3], [1], [3]], [4, 2, 1, 3])
    assert orders["msd_task01"] == ([[1, 2, 3], [2, 3], [3]], [1, 2, 3])


@pytest.mark.parametrize("release", RELEASES)
def test_examples_match_their_pattern(release):
    assert release in releases.releases_of_case(
        release_trees.case_folder(Path("source"), release, RELEASES[release].example)
    )
    assert set(RELEASES[release].writes) <= set(RELEASES[release].classes)


@pytest.mark.parametrize("mode", ["--link", "--reference"])
@pytest.mark.parametrize("release", ["brats2018", "brats2021", "brats2023_gli", "brats2024_gli"])
def test_links_and_references(nnunet, source, monkeypatch, release, mode):
    names = make_release(source, release)
    assert convert(release, source, mode) == 0
    folder = nnunet / "raw" / "Dataset007_Toy"
    verify(folder, monkeypatch)
    as_is = release not in ("brats2018",)  # .nii has to be compressed
    image = folder / "imagesTr" / f"{names[0]}_0001.nii.gz"
    label = folder / "labelsTr" / f"{names[0]}.nii.gz"
    suffix = "-t1c" if "-" in names[0] else "_t1ce"
    original = case_folder(source, release, names[0]) / f"{names[0]}{suffix}.nii.gz"
    if mode == "--link":
        assert image.is_symlink() == as_is
        assert not as_is or os.path.samefile(image, original)
    else:
        entry = dataset_json(nnunet)["dataset"][names[0]]
        assert entry["images"][1] == (str(original) if as_is else f"imagesTr/{image.name}")
        assert image.exists() != as_is
    # value 4 or a float has to be written
    assert (label.exists() and not label.is_symlink()) == (release != "brats2024_gli")


def test_references_of_test_cases_and_absent_modalities(nnunet, source, monkeypatch):
    """nnU-Net has no table for test cases, and a zero image has no original."""
    names = make_release(source, "brats2023_ssa")
    (source / names[2] / f"{names[2]}-t1c.nii.gz").unlink()
    options = ["--reference", "--allow-missing", "--test-cases", names[3]]
    assert convert("brats2023_ssa", source, *options) == 0
    folder = nnunet / "raw" / "Dataset007_Toy"
    verify(folder, monkeypatch)
    assert set(dataset_json(nnunet)["dataset"]) == set(names[:3])
    assert [path.name for path in (folder / "imagesTr").iterdir()] == [f"{names[2]}_0001.nii.gz"]
    assert len([path for path in (folder / "imagesTs").iterdir() if path.is_symlink()]) == 4
    assert (folder / "labelsTs" / f"{names[3]}.nii.gz").is_symlink()
    assert convert("brats2023_ssa", source, *options) == 0  # verified as it lies there


def test_stacked_channels_cannot_be_linked(nnunet, source, capsys):
    make_release(source, "msd_task01")
    assert convert("msd_task01", source, "--reference") == 2
    assert "has all channels in one file, so its cases must be written: use --copy" in capsys.readouterr().err


def test_time_points_stay_together(nnunet, source, capsys):
    make_release(source, "brats2024_gli")
    assert convert("brats2024_gli", source) == 0
    assert "4 training cases of 3 patients" in capsys.readouterr().out
    splits = json.loads((nnunet / "preprocessed" / "Dataset007_Toy" / "splits_final.json").read_text())
    assert len(splits) == 3
    for fold in splits:
        assert not {name[:15] for name in fold["train"]} & {name[:15] for name in fold["val"]}


def test_drawn_test_cases_are_whole_patients(nnunet, source):
    make_release(source, "brats2024_gli")
    drawn = set()
    for seed in range(6):
        assert convert("brats2024_gli", source, "--test-fraction", "0.34", "--seed", str(seed), "--overwrite") == 0
        folder = nnunet / "raw" / "Dataset007_Toy"
        test = {path.name.removesuffix(".nii.gz") for path in (folder / "labelsTs").iterdir()}
        training = {path.name.removesuffix(".nii.gz") for path in (folder / "labelsTr").iterdir()}
        assert {name[:15] for name in test}.isdisjoint({name[:15] for name in training})
        assert len({name[:15] for name in test}) == 1
        drawn.add(frozenset(test))
    assert len(drawn) > 1


def test_missing_sform_is_noted(nnunet, source, capsys):
    make_release(source, "brats2024_gli")
    convert("brats2024_gli", source)
    assert (
        "note: sform_code 0: only the qform says where a file lies, as nnU-Net reads it; nothing to do (2 cases"
        in capsys.readouterr().out
    )


def test_decathlon_images_without_labels_are_noted(nnunet, source, capsys):
    make_release(source, "msd_task01")
    convert("msd_task01", source)
    out = capsys.readouterr().out
    assert "1 images in" in out and "have no labels and were left out" in out


def test_fets_container_names(nnunet, source):
    for name in make_release(source, "fets2022"):
        for path in list((source / name).iterdir()):
            part = path.name.removeprefix(f"{name}_")
            path.rename(path.with_name(f"{name}_{'final_' if part.startswith('seg') else 'brain_'}{part}"))
    assert convert("fets2022", source) == 0


@pytest.mark.parametrize("level", ["full", "header"])
def test_absent_modalities_become_zero_images(nnunet, source, monkeypatch, capsys, level):
    names = make_release(source, "brats2023_ssa")
    (source / names[1] / f"{names[1]}-t1c.nii.gz").unlink()
    (source / names[3] / f"{names[3]}-t1c.nii.gz").unlink()
    flair = source / names[2] / f"{names[2]}-t2f.nii.gz"
    release_trees.write(flair, np.zeros(release_trees.SHAPE, np.int16), release_trees.SRI24_AFFINE)
    assert convert("brats2023_ssa", source, "--allow-missing", "--verify", level, "--test-cases", names[3]) == 0
    out = capsys.readouterr().out
    assert "3 training cases of 2 patients (2 incomplete), 1 test case" in out
    assert f"note: no T1ce: zero images (2 cases: {names[1]}, {names[3]})" in out
    assert f"note: no FLAIR: zero images (1 case: {names[2]})" in out
    folder = nnunet / "raw" / "Dataset007_Toy"
    verify(folder, monkeypatch)
    assert not read(folder / "imagesTr" / f"{names[1]}_0001.nii.gz").any()
    record = json.loads((folder / "conversion.json").read_text())
    assert {case["name"]: case["missing"] for case in record["cases"] if case["missing"]} == {
        names[1]: ["T1ce"],
        names[2]: ["FLAIR"],
        names[3]: ["T1ce"],
    }
    missing = dataset_json(nnunet)["mstkd_conversion"]["missing"]  # of the training cases
    assert missing == {names[1]: ["T1ce"], names[2]: ["FLAIR"]}


def test_unlabelled_cases_can_be_test_cases(nnunet, source):
    names = make_release(source, "brats2021")
    (source / names[3] / f"{names[3]}_seg.nii.gz").unlink()
    assert convert("brats2021", source, "--unlabelled-as-test") == 0
    folder = nnunet / "raw" / "Dataset007_Toy"
    assert len(list((folder / "imagesTs").iterdir())) == 4
    assert not (folder / "labelsTs").exists()
    assert dataset_json(nnunet)["numTraining"] == 3


def test_unlabelled_test_cases_of_training_patients_are_noted(nnunet, source, capsys):
    names = make_release(source, "brats2024_gli")
    (source / names[1] / f"{names[1]}-seg.nii.gz").unlink()  # names[0] is of the same patient
    assert convert("brats2024_gli", source, "--unlabelled-as-test") == 0
    assert f"1 unlabelled test case of patients who also train, such as {names[1]}" in capsys.readouterr().out


def test_size_of_the_release_is_expected(source, monkeypatch, capsys):
    make_release(source, "brats2021")
    monkeypatch.undo()
    for name in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{name}", str(source.parent / name))
    assert convert("brats2021", source) == 2
    err = capsys.readouterr().err
    assert err.count("expected 240 x 240 x 155 voxels of 1 x 1 x 1 mm (SRI24)") == 4


@pytest.mark.parametrize("release", ["brats2021", "brats2024_gli"])
def test_grids_match_the_files(release):
    affine = release_trees.affine_of(release)
    grid = releases.SRI24 if release == "brats2021" else releases.MNI152
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    np.testing.assert_allclose(grid.origin, lps[:3, 3])
    np.testing.assert_allclose(np.reshape(grid.direction, (3, 3)), lps[:3, :3])


# ---- predictions ---------------------------------------------------------------------------------------------------


@pytest.fixture
def predictions(nnunet: Path, source: Path) -> Path:
    """Labels of a converted BraTS 2021 as if they were predictions, with the dataset.json that prediction copies."""
    make_release(source, "brats2021")
    convert("brats2021", source)
    folder = nnunet / "raw" / "Dataset007_Toy"
    (folder / "dataset.json").rename(folder / "labelsTr" / "dataset.json")
    return folder / "labelsTr"


def restore(predictions: Path, *options: str) -> tuple[int, Path]:
    out = predictions.parents[2] / "restored"
    return cli.main(["restore-labels", "-i", str(predictions), "-o", str(out), *options]), out


def test_restore_matches_classes_by_name(predictions, capsys):
    code, out = restore(predictions, "--release", "msd_task01")
    assert code == 0
    assert "values changed: 1 -> 2, 2 -> 1" in capsys.readouterr().out
    label, own = read(out / "BraTS2021_00000.nii.gz"), own_label("brats2021", 0)
    for name, value in RELEASES["msd_task01"].classes.items():
        np.testing.assert_array_equal(label == value, own == RELEASES["brats2021"].classes[name])


def test_restore_refuses_a_release_without_a_class(predictions, capsys):
    assert restore(predictions, "--release", "brats2024_ped")[0] == 2
    assert "brats2024_ped has no NCR; its classes are ET, NET, CC, ED" in capsys.readouterr().err


def test_restore_replaces_small_enhancing_tumors(predictions):
    sizes = [np.count_nonzero(own_label("brats2021", number) == 4) for number in range(4)]
    limit = sorted(sizes)[2]
    code, out = restore(predictions, "--min-et", str(limit))
    assert code == 0
    for number, name in enumerate(release_trees.case_names("brats2021")):
        expected = own_label("brats2021", number)
        if sizes[number] < limit:
            expected = np.where(expected == 4, 1, expected)
        np.testing.assert_array_equal(read(out / f"{name}_seg.nii.gz"), expected)


def test_restore_leaves_out_unknown_values(predictions, capsys):
    file = predictions / "BraTS2021_00002.nii.gz"
    image = sitk.ReadImage(str(file))
    sitk.WriteImage(image + 3, str(file))
    code, out = restore(predictions)
    assert code == 1
    assert (
        "BraTS2021_00002.nii.gz holds 4, 5, 6, expected the data set's values [0, 1, 2, 3]" in capsys.readouterr().err
    )
    assert len(list(out.iterdir())) == 3


def test_restore_on_a_full_disk(predictions, capsys):
    out = predictions.parents[2] / "restored"
    with full_disk(400):
        assert restore(predictions)[0] == 2
    error = capsys.readouterr().err
    assert "could not be written completely" in error and "is the disk full?" in error and error.count("\n") == 1
    assert not list(out.iterdir())


def test_restore_needs_the_mapping(predictions, capsys):
    (predictions / "dataset.json").rename(predictions / "other.json")
    assert restore(predictions)[0] == 2
    assert "has no dataset.json; name the data set: -d ID" in capsys.readouterr().err
    (predictions / "dataset.json").write_text('{"labels": {}, "file_ending": ".nii.gz"}')
    assert restore(predictions)[0] == 2
    assert "it is not of mstkd convert" in capsys.readouterr().err
