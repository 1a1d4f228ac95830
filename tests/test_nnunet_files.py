"""nnU-Net's folders, names, plans and splits."""

from __future__ import annotations

import json
from pathlib import Path

import hand_plans
import pytest
import torch
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_mstkd.nnunet import checkpoints
from nnunetv2_mstkd.nnunet.description import foreground_heads
from nnunetv2_mstkd.nnunet.folders import (
    CHECKPOINTS,
    FINAL,
    dataset_number,
    model_folder_name,
    refuse_same_folder,
    trained_folds,
)
from nnunetv2_mstkd.nnunet.input_folder import training_cases
from nnunetv2_mstkd.nnunet.plans import inherited, lineage, read_plans
from nnunetv2_mstkd.nnunet.splits import number_of_folds, read_splits, validation_cases

# ---- names ---------------------------------------------------------------------------------------------------------


def test_names():
    assert dataset_number("Dataset006_Toy") == 6
    assert model_folder_name("A", "P", "c") == "A__P__c"
    assert CHECKPOINTS[0] == FINAL == "checkpoint_final.pth"
    with pytest.raises(ValueError, match="expected one such as Dataset226_BraTS"):
        dataset_number("BraTS")


def test_output_channels_by_name():
    labels = {"background": 0, "edema": 2, "core": 1, "ignore": 3}
    assert foreground_heads({"labels": labels}) == {"edema": 2, "core": 1}
    regions = {"background": [0], "whole": [1, 2], "core": 1, "ignore": 3}
    assert foreground_heads({"labels": regions, "regions_class_order": [2, 1]}) == {"whole": 0, "core": 1}


def test_trained_folds(tmp_path: Path):
    for fold in ("10", "2", "all"):
        (tmp_path / f"fold_{fold}").mkdir()
        (tmp_path / f"fold_{fold}" / FINAL).touch()
    (tmp_path / "fold_3").mkdir()
    assert trained_folds(tmp_path) == (2, 10)
    for fold in ("10", "2"):
        (tmp_path / f"fold_{fold}" / FINAL).unlink()
    with pytest.raises(FileNotFoundError, match="fold_all is: -f all"):
        trained_folds(tmp_path)


def test_an_output_folder_that_is_a_file(tmp_path: Path):
    (tmp_path / "out").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        refuse_same_folder(tmp_path / "out", tmp_path, "input folder")


# ---- plans ---------------------------------------------------------------------------------------------------------


def family() -> dict:
    plans = hand_plans.plans()
    plans["configurations"]["a"] = {"inherits_from": "3d_fullres", "batch_size": 7}
    plans["configurations"]["b"] = {"inherits_from": "a", "mstkd": {}}
    return plans


def test_lineage_and_inherited():
    plans = family()
    assert list(lineage(plans, "b")) == ["b", "a", "3d_fullres"]
    assert inherited(plans, "b", "batch_size") == 7
    assert inherited(plans, "b", "patch_size") == [64, 64, 64]
    assert inherited(plans, "a", "mstkd") is None


def test_lineage_of_broken_plans():
    plans = family()
    with pytest.raises(ValueError, match="no configuration 'c'; there are 2d"):
        list(lineage(plans, "c"))
    plans["configurations"]["a"]["inherits_from"] = "b"
    with pytest.raises(ValueError, match="inherits from itself"):
        inherited(plans, "b", "spacing")
    plans["configurations"]["a"]["inherits_from"] = "gone"
    with pytest.raises(ValueError, match="no configuration 'gone'"):
        inherited(plans, "b", "spacing")


@pytest.mark.parametrize("content", ["[]", "{}", '{"configurations": []}', "{"])
def test_no_plans(tmp_path: Path, content):
    (tmp_path / "plans.json").write_text(content)
    with pytest.raises(ValueError, match=r"plans\.json (is not|holds no table)"):
        read_plans(tmp_path / "plans.json")


# ---- splits --------------------------------------------------------------------------------------------------------

SPLITS = [{"train": ["b"], "val": ["c", "a"]}, {"train": ["a", "c"], "val": ["b"]}]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "splits_final.json").write_text(json.dumps(SPLITS))
    return tmp_path


def test_splits(data, tmp_path):
    assert read_splits(data / "splits_final.json") == SPLITS
    assert number_of_folds(data) == 2
    assert number_of_folds(tmp_path / "other") == 5
    with pytest.raises(FileNotFoundError):
        read_splits(tmp_path / "other" / "splits_final.json")


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[1]", '[{"train": 3}]'])
def test_damaged_splits(data, content):
    (data / "splits_final.json").write_text(content)
    with pytest.raises(ValueError, match="is not a list of splits"):
        read_splits(data / "splits_final.json")


def test_validation_cases(data):
    assert validation_cases(data, data, 0) == ["a", "c"]
    assert validation_cases(data, data, "1", {"train": [], "val": ["x"]}) == ["x"]
    with pytest.raises(ValueError, match="has the folds 0 to 1"):
        validation_cases(data, data, 2)
    with pytest.raises(ValueError, match="has no validation cases"):
        validation_cases(data, data, 0, {"train": [], "val": []})
    (data / "splits_final.json").unlink()
    with pytest.raises(FileNotFoundError, match="no validation cases of fold 0"):
        validation_cases(data, data, 0)


def test_noted_split(tmp_path: Path):
    for noted, expected in (({"split": SPLITS[0]}, SPLITS[0]), ({}, None), (None, None), ("x", None)):
        content = {"network_weights": {"a": torch.zeros(1)}, "mstkd": noted}
        checkpoints.write(content, tmp_path / "c.pth")
        assert checkpoints.read_notes(tmp_path / "c.pth").split == expected


# ---- training cases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [False, True])
def test_training_cases_are_nnunets(tmp_path: Path, monkeypatch, listed):
    monkeypatch.setenv("IMAGES", "imagesTr")
    (tmp_path / "imagesTr").mkdir()
    description: dict = {"file_ending": ".nii.gz"}
    for case in ("b", "a", "a_0000", "a.b"):
        for channel in range(2):
            (tmp_path / "imagesTr" / f"{case}_{channel:04d}.nii.gz").touch()
    if listed:
        images = ["$IMAGES/a_0001.nii.gz", "imagesTr/b_0000.nii.gz"]
        description["dataset"] = {"x": {"images": images, "label": "labelsTr/x.nii.gz"}}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    found = {name: list(map(str, case.files)) for name, case in training_cases(tmp_path, 2).items()}
    nnunets = get_filenames_of_train_images_and_targets(str(tmp_path))
    assert found == {name: entry["images"] for name, entry in nnunets.items()} and len(found) == (1 if listed else 4)
