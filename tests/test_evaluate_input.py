"""What `mstkd evaluate` refuses, in one line and before the network runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import empty_folders
from evaluate_inputs import CASES, evaluate, label_image, refused, without_drawing, write_dataset
from predict_inputs import CHANNELS, TURNED, read, trainer_class, write, write_case, write_model

from nnunetv2_mstkd import errors, modalities
from nnunetv2_mstkd.evaluation.records import CaseRecords
from nnunetv2_mstkd.evaluation.stacking import SubsetPredictor
from nnunetv2_mstkd.evaluation.subsets import check_zero_is_missing, choose_subsets

NAMES = ("T0", "T1", "T2", "T3")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every refusal comes before the first prediction."""

    def fail(*arguments):
        raise AssertionError("the network ran")

    monkeypatch.setattr(SubsetPredictor, "predict", fail)


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    without_drawing(monkeypatch)
    return empty_folders(tmp_path, monkeypatch)


@pytest.fixture
def model(nnunet_folders) -> Path:
    """Of nnU-Net's own trainer, which notes no split in its checkpoint."""
    folder = write_model(trainer_class("nnUNetTrainer"))
    write_dataset(folder)
    return folder


@pytest.fixture
def labels(model) -> Path:
    return Path(os.environ["nnUNet_preprocessed"], tiny.DATASET, "gt_segmentations")


@pytest.fixture
def data(model) -> Path:
    return Path(os.environ["nnUNet_preprocessed"], tiny.DATASET, "tiny_data")


# ---- model and folds -----------------------------------------------------------------------------------------------


def test_a_model_without_a_finished_fold(model, capsys):
    shutil.move(model / "fold_0" / "checkpoint_final.pth", model / "fold_0" / "checkpoint_latest.pth")
    assert "no fold of" in refused(capsys, model) and "checkpoint_final.pth" in refused(capsys, model)
    assert "training is not finished" in refused(capsys, model, "-f", "0")


def test_a_fold_that_was_not_trained(model, capsys):
    assert "that checkpoint is there for: -f 0" in refused(capsys, model, "-f", "0", "3")


def test_a_fold_that_is_no_number(model, capsys):
    assert "expected fold numbers such as 0 1 2, or all" in refused(capsys, model, "-f", "zero")


def test_a_model_of_which_only_fold_all_is_trained(model, capsys):
    shutil.move(model / "fold_0", model / "fold_all")
    assert "-f all" in refused(capsys, model)


def test_a_folder_that_is_no_model(model, capsys, tmp_path):
    assert "no model folder" in refused(capsys, tmp_path / "absent")


# ---- validation cases ----------------------------------------------------------------------------------------------


def test_no_splits_file(model, capsys, data):
    (data.parent / "splits_final.json").unlink()
    assert "no validation cases" in refused(capsys, model) and "splits_final.json" in refused(capsys, model)


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[1]", '[{"train": []}]'])
def test_a_damaged_splits_file(model, capsys, data, content):
    (data.parent / "splits_final.json").write_text(content)
    assert "is not a list of splits" in refused(capsys, model)


def test_a_fold_without_validation_cases(model, capsys, data):
    (data.parent / "splits_final.json").write_text('[{"train": ["d"], "val": []}]')
    assert "has no validation cases" in refused(capsys, model)


def test_a_fold_beyond_the_splits(model, capsys):
    shutil.copytree(model / "fold_0", model / "fold_7")
    assert "has the folds 0 to 1" in refused(capsys, model, "-f", "7")


def test_a_case_without_preprocessed_data(model, capsys, data):
    for path in data.glob(f"{CASES[0]}*"):
        path.unlink()
    message = refused(capsys, model)
    assert f"no preprocessed data of the validation case {CASES[0]}" in message
    assert "nnUNetv2_preprocess -d 901 -plans_name nnUNetPlans -c tiny" in message


def test_no_preprocessed_data_at_all(model, capsys, data):
    shutil.rmtree(data)
    assert "no preprocessed data in" in refused(capsys, model)
    data.mkdir()
    assert "holds no preprocessed data" in refused(capsys, model)


def test_data_that_other_plans_have_made(model, capsys, data):
    plans = json.loads((model / "plans.json").read_text())
    plans["configurations"]["tiny"]["data_identifier"] = data.name
    file = data.parent / "nnUNetPlans.json"
    file.write_text(json.dumps(plans))
    assert reaches_the_network(capsys, model)
    plans["configurations"]["tiny"]["spacing"] = [2.0, 1.0, 1.0]
    file.write_text(json.dumps(plans))
    message = refused(capsys, model)
    assert "has another spacing than the plans that the model was trained with" in message and "--mask-first" in message


def test_a_validation_case_without_images_for_mask_first(model, capsys):
    raw = Path(os.environ["nnUNet_raw"], tiny.DATASET)
    (raw / "imagesTr" / f"{CASES[0]}_0002.nii.gz").unlink()
    assert "has 3 images, expected 4" in refused(capsys, model, "--mask-first")
    for path in (raw / "imagesTr").glob(f"{CASES[0]}*"):
        path.unlink()
    assert f"no images of the validation case {CASES[0]}" in refused(capsys, model, "--mask-first")


# ---- labels --------------------------------------------------------------------------------------------------------


def test_a_label_that_is_absent(model, capsys, labels):
    (labels / f"{CASES[1]}.nii.gz").unlink()
    assert f"{CASES[1]}.nii.gz does not exist" in refused(capsys, model)


def test_a_label_that_is_truncated(model, capsys, labels):
    file = labels / f"{CASES[1]}.nii.gz"
    file.write_bytes(file.read_bytes()[:-20])
    message = refused(capsys, model)
    assert f"{CASES[1]}.nii.gz cannot be read" in message and "truncated" in message


def test_a_label_that_is_no_image(model, capsys, labels):
    (labels / f"{CASES[0]}.nii.gz").write_text("nothing")
    assert f"{CASES[0]}.nii.gz cannot be read" in refused(capsys, model)


@pytest.mark.parametrize("value", [3, 0.5])
def test_a_label_with_a_value_that_the_data_set_does_not_have(model, capsys, labels, value):
    image = label_image(0).astype(np.float32)
    image[0, 0, 0] = value
    write(labels / f"{CASES[0]}.nii.gz", image)
    assert f"has the value {value:g}; dataset.json has the labels 0, 1, 2" in refused(capsys, model)


@pytest.mark.parametrize(
    ("geometry", "shape", "what"),
    [
        ({}, (14, 20, 17), "shape (14, 20, 17), the image (14, 20, 18)"),
        ({"spacing": (1, 1, 2)}, (14, 20, 18), "spacing (2, 1, 1), the image (1.25, 1, 1)"),
        ({"origin": (0, 4, 2.5)}, (14, 20, 18), "origin (0, 4, 2.5), the image (-9, 4, 2.5)"),
        ({"direction": (1, 0, 0, 0, 1, 0, 0, 0, 1)}, (14, 20, 18), "direction (1, 0, 0"),
    ],
    ids=["shape", "spacing", "origin", "direction"],
)
@pytest.mark.parametrize("source", ["preprocessed", "images"])
def test_a_label_that_does_not_lie_where_its_image_lies(model, capsys, labels, source, geometry, shape, what):
    write(labels / f"{CASES[0]}.nii.gz", label_image(0, shape), **geometry)
    message = refused(capsys, model, *(["--mask-first"] if source == "images" else []))
    assert what in message and f"{CASES[0]}.nii.gz is not on the grid of its image" in message


# ---- folders -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(model, nnunet_folders) -> tuple[str, ...]:
    """Options for a folder with one case."""
    write_case(nnunet_folders / "in", "case", range(CHANNELS))
    (nnunet_folders / "labels").mkdir()
    write(nnunet_folders / "labels" / "case.nii.gz", label_image(0))
    names = {"-i": "in", "-l": "labels", "-o": "out"}
    return tuple(text for option, name in names.items() for text in (option, str(nnunet_folders / name)))


def test_a_folder_without_labels(model, capsys, folder, nnunet_folders):
    (nnunet_folders / "labels" / "case.nii.gz").rename(nnunet_folders / "labels" / "other.nii.gz")
    assert "has no label case.nii.gz (1 of 1 cases have none)" in refused(capsys, model, *folder)
    shutil.rmtree(nnunet_folders / "labels")
    assert "no folder of labels" in refused(capsys, model, *folder)


def test_a_folder_without_images(model, capsys, folder, nnunet_folders):
    shutil.rmtree(nnunet_folders / "in")
    assert "no input folder" in refused(capsys, model, *folder)


def test_a_case_without_a_modality(model, capsys, folder, nnunet_folders):
    (nnunet_folders / "in" / "case_0002.nii.gz").unlink()
    message = refused(capsys, model, *folder, "--available", "T2")
    assert "none of the 1 cases can be evaluated" in message and "of a subset (T2)" in message
    assert reaches_the_network(capsys, model, *folder)
    assert reaches_the_network(capsys, model, *folder, "--available", "T0,T1,T3")


def test_images_of_different_grids_and_zero_images(model, capsys, folder, nnunet_folders):
    file = nnunet_folders / "in" / "case_0001.nii.gz"
    image = read(file)
    write(file, image, spacing=(1.0, 1.0, 1.5))
    message = refused_on_many_lines(capsys, model, *folder)
    assert "T1 (case_0001.nii.gz)" in message or "T1 has spacing" in message
    write(file, np.zeros_like(image))
    assert reaches_the_network(capsys, model, *folder)


def reaches_the_network(capsys, model: Path, *options: str) -> bool:
    """Whether nothing was refused: the network, which is not to run here, is an error that nobody foresaw."""
    capsys.readouterr()
    return evaluate(model, *options) == errors.EXIT_INTERNAL_ERROR and "the network ran" in capsys.readouterr().err


def refused_on_many_lines(capsys, model: Path, *options: str) -> str:
    """As in mstkd predict, the problems of a case's images follow on lines of their own."""
    capsys.readouterr()
    assert evaluate(model, *options) == 2
    return capsys.readouterr().err


def test_labels_in_another_direction_than_the_images(model, capsys, folder, nnunet_folders):
    turned = tuple(-number for number in TURNED[:6]) + TURNED[6:]
    write(nnunet_folders / "labels" / "case.nii.gz", label_image(0), direction=turned)
    assert "it has direction" in refused(capsys, model, *folder)


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["-i", "in"], "-i IMAGES and -l LABELS belong together"),
        (["-i", "in", "-l", "labels"], "-i IMAGES needs an output folder"),
        (["--stack", "0"], "--stack is 0, expected at least 1"),
        (["--stack", "2", "--mask-first"], "--stack 2 does not go with --mask-first"),
        (["-step_size", "0"], "-step_size is 0.0, expected above 0"),
        (["--subsets", "T9"], "unknown modality 'T9' in subset 'T9'; known are T0, T1, T2, T3"),
        (["--subsets", "T1+T0", "T0,T1"], "the subset T0+T1 appears twice"),
        (["--available", "T0,X"], "unknown modality 'X'"),
        (["--subsets", "T0+T1", "--available", "T1,T2"], "T0+T1 is not within --available T1,T2"),
        (["--metrics", "jaccard"], "unknown metric 'jaccard'"),
        (["--et-min", "500"], "no region ET"),
        (["--et-min", "core=few"], "neither a number of voxels nor"),
        (["--convention", "mine"], "unknown convention 'mine'"),
        (["--metrics", "lesion_dice", "--lesion-convention", "mine"], "unknown lesion-wise convention 'mine'"),
        (["--metrics", "nsd", "--tolerance", "-1"], "-1"),
        (["-nps", "-1"], "expected numbers of processes"),
    ],
)
def test_options_that_mean_nothing(model, capsys, options, what):
    assert what in refused(capsys, model, *options)


def test_outputs_that_would_overwrite_something_else(model, capsys, folder, nnunet_folders):
    for name in ("in", "labels"):
        options = [*folder[:4], "-o", str(nnunet_folders / name)]
        assert "choose another one" in refused(capsys, model, *options)
    assert "is the model folder" in refused(capsys, model, "-o", str(model))


def test_a_lesion_convention_needs_the_labels_that_it_joins_by(nnunet_folders, capsys):
    labels = {"background": 0, "ET": 1, "WT": 2}
    model = write_model(trainer_class("nnUNetTrainer"), labels=labels)
    write_dataset(model)
    message = refused(capsys, model, "--metrics", "lesion_dice", "--lesion-convention", "brats2024_gli")
    assert "joins the lesions of ET" in message and "no label NETC" in message


def test_a_refused_checkpoint_stays_unread_unless_it_is_trusted(model, capsys):
    file = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    torch.save({**content, "extra": Path("x")}, file)
    assert "is refused" in refused(capsys, model)
    assert reaches_the_network(capsys, model, "--trust")


# ---- choosing subsets ----------------------------------------------------------------------------------------------


def chosen(*subsets: str, names=NAMES, available: str | None = None) -> list[str]:
    rows = choose_subsets(names, subsets=subsets, available=available)
    return [modalities.subset_name(row, names) for row in rows.tolist()]


def test_all_subsets_are_the_default():
    assert torch.equal(choose_subsets(NAMES), modalities.all_subsets(4))


def test_subsets_are_sorted():
    assert chosen("all", "T3+T1", "T0,T1", "T2") == ["T2", "T0+T1", "T1+T3", "T0+T1+T2+T3"]
    every = chosen()
    assert chosen(*reversed(every)) == every


def test_more_than_six_modalities_need_a_list():
    names = [f"T{number}" for number in range(7)]
    with pytest.raises(ValueError, match=r"7 modalities have 127 subsets.*--subsets"):
        choose_subsets(names)
    assert chosen("T6", "all", names=names) == ["T6", "+".join(names)]
    assert len(chosen(names=names, available="T0,T1,T2,T3,T4,T6")) == 63


def test_available_modalities_have_their_own_subsets():
    assert chosen(available="T3,T0") == ["T0", "T3", "T0+T3"]
    assert chosen(available="T2") == ["T2"]


def test_a_channel_that_does_not_stay_zero_must_not_be_absent():
    schemes = ["ZScoreNormalization", "CTNormalization"]
    with pytest.raises(ValueError, match="B is absent from a subset, but CTNormalization turns"):
        check_zero_is_missing(torch.tensor([[True, True], [True, False]]), ("A", "B"), schemes)
    check_zero_is_missing(torch.tensor([[True, True], [False, True]]), ("A", "B"), schemes)


@pytest.mark.parametrize("entry", [{"values": {"WT": {"dice": "much"}}, "near": 0, "voxels": 1}, {}, 7])
def test_a_damaged_record_of_a_case_is_a_users_error(tmp_path, entry):
    records = CaseRecords(tmp_path, {})
    records.use_weights("0", "w")
    file = tmp_path / "cases" / "fold_0" / "case.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"weights": "w", "subsets": {"T0": entry}}))
    with pytest.raises(errors.InputError, match="not a record of an evaluation"):
        records.load("0", "case")
