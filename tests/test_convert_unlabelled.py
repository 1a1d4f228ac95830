"""Training cases without a label: `mstkd convert --unlabelled`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import release_trees
import SimpleITK as sitk
from conftest import Folders, empty_folders, in_this_process, plan_and_preprocess
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from release_trees import make_release

from nnunetv2_mstkd import cli
from nnunetv2_mstkd.dataset_conversion.description import Description
from nnunetv2_mstkd.dataset_conversion.splits import cross_validation, with_unlabelled
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.nnunet.case_facts import CaseFacts, read_case_facts

SHAPE = (12, 16, 20)  # z, y, x
DESCRIPTION = {
    "modalities": {"T1": "t1.nii.gz", "T2": "t2.nii.gz"},
    "label": "seg.nii.gz",
    "labels": {"background": 0, "edema": 1, "core": 2},
    "patient": "(p[0-9]+)",
}
CASES = ("p1a", "p1b", "p2a", "p3a", "p4a")
UNLABELLED = ("p1b", "p4a")  # one of a patient who also has a labelled study


@pytest.fixture(autouse=True)
def nnunet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    release_trees.use_small_grids(monkeypatch)
    return empty_folders(tmp_path, monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Five cases of four patients, two of them without a label."""
    random = np.random.default_rng(0)
    folder = tmp_path / "source"
    for case in CASES:
        label = np.zeros(SHAPE, np.uint8)
        label[4:8, 4:12, 4:12], label[5:7, 6:9, 6:9] = 1, 2
        (folder / case).mkdir(parents=True)
        for name in ("t1", "t2"):
            image = random.normal(100, 10, SHAPE) + 50 * label
            image[:2] = 0  # air
            write(folder / case / f"{name}.nii.gz", image.astype(np.float32))
        if case not in UNLABELLED:
            write(folder / case / "seg.nii.gz", label)
    return folder


def write(path: Path, array: np.ndarray) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def convert(source: Path, *options: str, **changes: object) -> int:
    file = source.parent / "description.json"
    file.write_text(json.dumps({**DESCRIPTION, **changes}))
    arguments = ["convert", "generic", str(source), "-d", "7", "--name", "Toy", "--description", str(file), *options]
    return cli.main([*arguments, "--workers", "1"])


def dataset(nnunet: Path) -> tuple[Path, dict]:
    folder = nnunet / "raw" / "Dataset007_Toy"
    return folder, json.loads((folder / "dataset.json").read_text())


def folds(nnunet: Path) -> list[dict[str, list[str]]]:
    return json.loads((nnunet / "preprocessed" / "Dataset007_Toy" / "splits_final.json").read_text())


def plan(nnunet: Path) -> None:
    plan_and_preprocess(Folders(*(nnunet / name for name in ("raw", "preprocessed", "results"))), 7, "3d_fullres")


def refused(capsys: pytest.CaptureFixture, nnunet: Path) -> str:
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    assert not list((nnunet / "raw").glob("Dataset*"))
    return err


# ---- what is written -----------------------------------------------------------------------------------------------


def test_labels_of_unlabelled_cases_are_ignored_everywhere(nnunet, source, capsys):
    assert convert(source, "--unlabelled") == 0
    out = capsys.readouterr().out
    assert "5 training cases of 4 patients (2 unlabelled), 0 test cases" in out
    assert "note: no label: in the training part of the folds only (2 cases: p1b, p4a)" in out
    folder, content = dataset(nnunet)
    assert content["labels"] == {"background": 0, "edema": 1, "core": 2, "ignore": 3}
    assert content["numTraining"] == 5
    assert content["mstkd_conversion"]["unlabelled"] == ["p1b", "p4a"]
    assert content["mstkd_conversion"]["release_values"] == {"0": 0, "1": 1, "2": 2}
    assert content["mstkd_conversion"]["patient"] == "(p[0-9]+)"  # of which evaluate makes its intervals
    for case in UNLABELLED:
        label = folder / "labelsTr" / f"{case}.nii.gz"
        np.testing.assert_array_equal(read(label), np.full(SHAPE, 3, np.uint8))
    np.testing.assert_array_equal(read(folder / "labelsTr" / "p2a.nii.gz"), read(source / "p2a" / "seg.nii.gz"))
    record = json.loads((folder / "conversion.json").read_text())
    assert record["unlabelled"] == 2
    assert [case["name"] for case in record["cases"] if case["unlabelled"]] == ["p1b", "p4a"]


def test_without_the_option_they_are_problems(nnunet, source, capsys):
    assert convert(source) == 1
    assert capsys.readouterr().err.count("label: no file matches") == 2
    _, content = dataset(nnunet)
    assert "ignore" not in content["labels"] and "unlabelled" not in content["mstkd_conversion"]


@pytest.mark.parametrize("regions", [False, True])
def test_nnunet_plans_and_preprocesses_them(nnunet, source, monkeypatch, regions):
    changes = {}
    if regions:
        labels = {"background": 0, "whole": [1, 2], "core": [2]}
        changes = {"labels": labels, "regions_class_order": [1, 2]}
    (source / "p4a" / "t2.nii.gz").unlink()
    assert convert(source, "--unlabelled", "--allow-missing", **changes) == 0
    folder, content = dataset(nnunet)
    manager = LabelManager(content["labels"], content.get("regions_class_order"))
    assert manager.ignore_label == 3 and manager.all_labels == [0, 1, 2] and manager.has_regions == regions
    with in_this_process(monkeypatch):
        verify_dataset_integrity(str(folder), num_processes=1)
    written = folds(nnunet)
    plan(nnunet)
    assert folds(nnunet) == written
    facts = read_case_facts(folder_of_data(nnunet), CASES, content, ["T1", "T2"])
    assert facts == {case: CaseFacts((True, case != "p4a"), case not in UNLABELLED) for case in CASES}


def folder_of_data(nnunet: Path) -> Path:
    return nnunet / "preprocessed" / "Dataset007_Toy" / "nnUNetPlans_3d_fullres"


@pytest.mark.parametrize("release", ["brats2021", "brats2023_gli", "msd_task01"])
@pytest.mark.parametrize("options", [[], ["--labels"]])
def test_releases(nnunet, tmp_path, monkeypatch, release, options):
    names = make_release(tmp_path / "release", release)
    for path in [*(tmp_path / "release").rglob(f"{names[2]}?seg.nii.gz"), *(tmp_path / "release").glob("labelsTr/*")]:
        if names[2] in path.name:
            path.unlink()
    arguments = [release, str(tmp_path / "release"), "-d", "7", "--name", "Toy", "--unlabelled", *options]
    assert cli.main(["convert", *arguments]) == 0
    folder, content = dataset(nnunet)
    assert content["labels"]["ignore"] == 4
    assert np.unique(read(folder / "labelsTr" / f"{names[2]}.nii.gz")).tolist() == [4]
    with in_this_process(monkeypatch):
        verify_dataset_integrity(str(folder), num_processes=1)
    assert cli.main(["convert", *arguments, "--verify", "full"]) == 0
    # predictions of the labelled cases go back; an unlabelled case has no values of the release
    predictions, out = nnunet / "predictions", nnunet / "restored"
    predictions.mkdir()
    shutil.copy(folder / "labelsTr" / f"{names[0]}.nii.gz", predictions)
    shutil.copy(folder / "dataset.json", predictions)
    assert cli.main(["restore-labels", "-i", str(predictions), "-o", str(out)]) == 0
    restored = np.transpose(read(next(out.iterdir())), (2, 1, 0))
    np.testing.assert_array_equal(restored, release_trees.own_label(release, 0))


@pytest.mark.parametrize("level", ["header", "full"])
def test_label_that_is_ignored_but_in_air(nnunet, source, level):
    """nnU-Net drops labels where all images are zero."""
    air = np.full(SHAPE, 3, np.uint8)
    air[:2] = 0
    write(source / "p3a" / "seg.nii.gz", air)
    air[:3] = 0
    write(source / "p2a" / "seg.nii.gz", air)  # one slice without a tumor is labelled
    assert convert(source, "--unlabelled", "--verify", level, labels={**DESCRIPTION["labels"], "ignore": 3}) == 0
    _, content = dataset(nnunet)
    assert content["mstkd_conversion"]["unlabelled"] == ["p1b", "p3a", "p4a"]
    plan(nnunet)
    facts = read_case_facts(folder_of_data(nnunet), CASES, content, ["T1", "T2"])
    assert [case for case in CASES if not facts[case].labelled] == ["p1b", "p3a", "p4a"]


@pytest.mark.parametrize("mode", ["--copy", "--link", "--reference"])
def test_label_that_is_ignored_but_in_a_hole_of_the_brain(nnunet, source, mode):
    """Its background is labelled for nnU-Net, whose mask of the brain has no holes."""
    hole = (slice(4, 6),) * 3
    for name in ("t1", "t2"):
        image = read(source / "p3a" / f"{name}.nii.gz")
        image[hole] = 0
        write(source / "p3a" / f"{name}.nii.gz", image)
    label = np.full(SHAPE, 3, np.uint8)
    label[hole] = 0
    write(source / "p3a" / "seg.nii.gz", label)
    assert convert(source, "--unlabelled", mode, labels={**DESCRIPTION["labels"], "ignore": 3}) == 0
    folder, content = dataset(nnunet)
    assert content["mstkd_conversion"]["unlabelled"] == ["p1b", "p3a", "p4a"]
    np.testing.assert_array_equal(read(folder / "labelsTr" / "p3a.nii.gz"), np.full(SHAPE, 3, np.uint8))
    if mode == "--copy":
        plan(nnunet)
        assert not read_case_facts(folder_of_data(nnunet), CASES, content, ["T1", "T2"])["p3a"].labelled


def test_declared_ignore_label_is_used(nnunet, source):
    labels = {**DESCRIPTION["labels"], "ignore": 3}
    partly = read(source / "p2a" / "seg.nii.gz")
    partly[:5] = 3
    write(source / "p2a" / "seg.nii.gz", partly)
    write(source / "p3a" / "seg.nii.gz", np.full(SHAPE, 3, np.uint8))  # says nothing: unlabelled, too
    assert convert(source, "--unlabelled", labels=labels) == 0
    folder, content = dataset(nnunet)
    assert content["labels"] == labels
    assert content["mstkd_conversion"]["unlabelled"] == ["p1b", "p3a", "p4a"]
    np.testing.assert_array_equal(read(folder / "labelsTr" / "p2a.nii.gz"), partly)
    assert sorted(case for fold in folds(nnunet) for case in fold["val"]) == ["p1a", "p2a"]


@pytest.mark.parametrize("mode", ["--link", "--reference"])
def test_links_and_references(nnunet, source, monkeypatch, mode):
    assert convert(source, "--unlabelled", mode) == 0
    folder, _ = dataset(nnunet)
    assert not (folder / "labelsTr" / "p4a.nii.gz").is_symlink()
    with in_this_process(monkeypatch):
        verify_dataset_integrity(str(folder), num_processes=1)


@pytest.mark.parametrize("level", ["header", "full"])
def test_second_run_verifies(nnunet, source, capsys, level):
    convert(source, "--unlabelled")
    assert convert(source, "--unlabelled", "--verify", level) == 0
    assert "(2 unlabelled), 0 test cases, channels T1, T2, already complete" in capsys.readouterr().out
    assert convert(source) == 2
    assert "already exists with another description; --overwrite" in capsys.readouterr().err
    write(source / "p4a" / "seg.nii.gz", np.ones(SHAPE, np.uint8))
    assert convert(source, "--unlabelled") == 2
    assert "p4a: its files have changed since it was converted" in capsys.readouterr().err


def test_interrupted_run_resumes(nnunet, source, capsys, monkeypatch):
    from nnunetv2_mstkd.dataset_conversion import conversion

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_record", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
        assert convert(source, "--unlabelled") == 2
    assert convert(source, "--unlabelled") == 0
    out = capsys.readouterr().out
    assert "(2 unlabelled)" in out and "5 cases from an interrupted run" in out
    assert dataset(nnunet)[1]["mstkd_conversion"]["unlabelled"] == ["p1b", "p4a"]


# ---- folds ---------------------------------------------------------------------------------------------------------


def test_folds_of_the_labelled_cases_stay_the_same(nnunet, source):
    assert convert(source, "--unlabelled") == 0
    mixed = folds(nnunet)
    for case in UNLABELLED:
        shutil.rmtree(source / case)
    assert convert(source, "--overwrite") == 0
    plain = folds(nnunet)
    assert len(mixed) == len(plain) == 3
    for with_them, without in zip(mixed, plain, strict=True):
        assert with_them["val"] == without["val"]
        same_patient = {"p1b"} if "p1a" in without["val"] else set()
        assert with_them["train"] == sorted({*without["train"], *UNLABELLED} - same_patient)


def test_unlabelled_cases_of_validation_patients_are_left_out():
    splits = cross_validation(["a1", "b1", "c1"], patient_of=lambda case: case[0])
    made = with_unlabelled(splits, ["a2", "d1"], patient_of=lambda case: case[0])
    assert {tuple(fold["val"]): fold["train"] for fold in made} == {
        ("a1",): ["b1", "c1", "d1"],
        ("b1",): ["a1", "a2", "c1", "d1"],
        ("c1",): ["a1", "a2", "b1", "d1"],
    }


def test_held_out_cases(nnunet, source, capsys):
    assert convert(source, "--unlabelled", "--val-cases", "p4a") == 2
    assert "p4a cannot validate without a label" in refused(capsys, nnunet)
    assert convert(source, "--unlabelled", "--val-cases", "p1a") == 0
    assert folds(nnunet) == [{"train": ["p2a", "p3a", "p4a"], "val": ["p1a"]}]


def lists(folder: Path, **parts: list[str]) -> list[str]:
    for name, cases in parts.items():
        (folder / f"{name}.txt").write_text("\n".join(cases))
    return ["--splits", *(str(folder / f"{name}.txt") for name in parts)]


def test_published_lists(nnunet, source, tmp_path, capsys):
    assert convert(source, "--unlabelled", *lists(tmp_path, train=["p1a", "p2a"], val=["p3a", "p4a"])) == 2
    assert "p4a cannot validate without a label; train on such cases" in refused(capsys, nnunet)
    assert convert(source, "--unlabelled", *lists(tmp_path, train=["p1b", "p4a"], val=["p3a"])) == 2
    assert "fold 0 trains on unlabelled cases only" in refused(capsys, nnunet)
    assert convert(source, "--unlabelled", *lists(tmp_path, train=["p2a"], val=["p3a"], test=["p4a", "p1a"])) == 0
    # p1b is of a test patient
    assert folds(nnunet) == [{"train": ["p2a"], "val": ["p3a"]}]
    folder, content = dataset(nnunet)
    assert content["numTraining"] == 3 and content["mstkd_conversion"]["unlabelled"] == ["p1b"]
    assert [path.name for path in (folder / "labelsTs").iterdir()] == ["p1a.nii.gz"]


def test_drawn_test_cases_are_of_labelled_patients(nnunet, source):
    for seed in range(6):
        assert convert(source, "--unlabelled", "--test-fraction", "0.34", "--seed", str(seed), "--overwrite") == 0
        folder, content = dataset(nnunet)
        test = {path.name[:3] for path in (folder / "imagesTs").iterdir()}
        assert test in ({"p1a", "p1b"}, {"p2a"}, {"p3a"})
        assert content["numTraining"] == 5 - len(test)


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_both_options_for_unlabelled_cases_are_refused(nnunet, source, capsys):
    assert convert(source, "--unlabelled", "--unlabelled-as-test") == 2
    assert "found --unlabelled and --unlabelled-as-test, expected one of them" in refused(capsys, nnunet)
    assert convert(source, "--unlabelled", "--no-splits") == 2
    assert "nnU-Net's own folds validate on unlabelled cases" in refused(capsys, nnunet)


@pytest.mark.parametrize("options", [["--unlabelled"], ["--unlabelled", "--allow-missing"], []])
def test_case_without_an_image(source, capsys, options):
    for path in (source / "p4a").iterdir():
        path.unlink()
    assert convert(source, *options) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "p4a" in line]
    assert lines == ["  p4a: it has no image: no file matches 't1.nii.gz', 't2.nii.gz'"]


def test_unlabelled_and_incomplete(nnunet, source, capsys):
    (source / "p4a" / "t1.nii.gz").unlink()
    assert convert(source, "--unlabelled") == 1
    err = capsys.readouterr().err
    assert "p4a: T1: no file matches 't1.nii.gz'; --allow-missing fills an absent modality with zeros" in err
    assert convert(source, "--unlabelled", "--allow-missing", "--overwrite") == 0
    assert "(2 unlabelled, 1 incomplete)" in capsys.readouterr().out
    record = dataset(nnunet)[1]["mstkd_conversion"]
    assert record["missing"] == {"p4a": ["T1"]} and record["unlabelled"] == ["p1b", "p4a"]


@pytest.mark.parametrize("release", [True, False])
def test_files_that_use_the_value_of_the_new_ignore_label(source, capsys, tmp_path, release):
    if release:  # a tree of a later release, whose cavity is 4
        names = make_release(tmp_path / "release", "brats2024_gli")
        label = read(tmp_path / "release" / names[0] / f"{names[0]}-seg.nii.gz")
        assert 4 in label
        assert cli.main(["convert", "brats2023_gli", str(tmp_path / "release"), "-d", "7", "--unlabelled"]) == 2
        assert "holds the undeclared values [4], brats2023_gli has [0, 1, 2, 3]" in capsys.readouterr().err
        return
    write(source / "p2a" / "seg.nii.gz", np.full(SHAPE, 3, np.uint8))
    assert convert(source, "--unlabelled") == 1
    assert "p2a: label (seg.nii.gz) holds the undeclared values [3], declared are [0, 1, 2]" in capsys.readouterr().err


@pytest.mark.parametrize("labels", [{"background": 0, "edema": 1, "ignore": 1}, {"background": 0, "ignore": 0}])
def test_ignore_label_needs_its_own_value(labels):
    with pytest.raises(InputError, match=r"expected 2|consecutive ones"):
        Description.from_mapping({**DESCRIPTION, "labels": labels})


def test_nothing_to_train_on(nnunet, source, capsys):
    for case in set(CASES) - set(UNLABELLED):
        (source / case / "seg.nii.gz").unlink()
    assert convert(source, "--unlabelled") == 2
    line = refused(capsys, nnunet)
    assert "none of the 5 cases in" in line and "There is nothing to train on" in line


def test_all_labels_ignored(nnunet, source, capsys):
    for case in set(CASES) - set(UNLABELLED):
        write(source / case / "seg.nii.gz", np.full(SHAPE, 3, np.uint8))
    assert convert(source, "--unlabelled", labels={**DESCRIPTION["labels"], "ignore": 3}) == 2
    assert "all 5 cases are unlabelled: there is nothing to train on" in refused(capsys, nnunet)


def test_labelled_cases_with_problems_are_listed(nnunet, source, capsys):
    for case in set(CASES) - set(UNLABELLED):
        (source / case / "t1.nii.gz").unlink()
    assert convert(source, "--unlabelled") == 2
    err = capsys.readouterr().err
    assert "3 problems, nothing was written" in err and "p2a: T1: no file matches" in err
