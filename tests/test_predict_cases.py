from __future__ import annotations

import json
import os
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tiny
import torch
from predict_inputs import (
    CHANNELS,
    TURNED,
    files,
    noise,
    predict,
    read,
    record,
    segmentations,
    trainer_class,
    write,
    write_model,
)

from nnunetv2_mstkd import cli
from nnunetv2_mstkd.networks.availability import AvailabilityAware
from nnunetv2_mstkd.nnunet.entropy import Disagreement, case_entropy, entropy_map
from nnunetv2_mstkd.nnunet.input_folder import Case
from nnunetv2_mstkd.nnunet.model import load_predictor
from nnunetv2_mstkd.nnunet.preprocessing import as_original, preprocess_case, probabilities


def test_the_record_says_what_each_case_was_predicted_from(folders, model, capsys):
    assert predict(folders, model) == 0
    found = record(folders / "out")
    for name, case in found["cases"].items():
        images = case.pop("images")
        assert 0 < case.pop("entropy") < 1
        assert list(images) == case["modalities"]
        for channel, stamp in images.items():
            status = (folders / "in" / f"{name}_000{channel[1]}.nii.gz").stat()
            size, when = stamp.split(" bytes, ")
            assert int(size) == status.st_size
            assert datetime.fromisoformat(when).timestamp() == pytest.approx(status.st_mtime, abs=1e-5)
    assert found["cases"] == {
        "complete": {"subset": "T0+T1+T2+T3", "modalities": ["T0", "T1", "T2", "T3"], "absent": []},
        "one": {"subset": "T2", "modalities": ["T2"], "absent": ["T0", "T1", "T3"]},
        "two": {"subset": "T1+T3", "modalities": ["T1", "T3"], "absent": ["T0", "T2"]},
    }
    assert found["model"] == "MSTKDTrainer__nnUNetPlans__tiny"
    assert (found["trainer"], found["folds"], found["channels"]) == ("MSTKDTrainer", [0], ["T0", "T1", "T2", "T3"])
    assert {"dataset.json", "plans.json"} <= set(files(folders / "out"))
    out = capsys.readouterr().out
    assert "3 cases predicted" in out and "  T1+T3: 1\n" in out


def test_the_record_holds_the_expected_dice_of_an_evaluation(folders, model, capsys):
    (model / "subsets").mkdir()
    subsets = {"T3+T1": {"WT": {"dice": 0.8}, "ET": {"dice": None}}, "all": {"WT": {"dice": 0.9}}}
    (model / "subsets" / "summary.json").write_text(json.dumps({"subsets": subsets}))
    assert predict(folders, model) == 0
    cases = record(folders / "out")["cases"]
    assert {name: case["expected_dice"] for name, case in cases.items()} == {
        "complete": {"WT": 0.9},
        "one": None,
        "two": {"WT": 0.8},
    }
    assert "T1+T3: 1 (expected Dice: WT 0.800)" in capsys.readouterr().out


def evaluated(model: Path, entropy: tuple[float, float], cases: int = 10) -> None:
    """An evaluation whose cases had this range of entropies with T2 alone, and a Dice from 0.7 with all modalities."""
    content = {
        "subsets": {"T2": {"WT": {"dice": 0.6}}, "all": {"WT": {"dice": 0.9}}},
        "cases_by_subset": {"T2": cases, "T0+T1+T2+T3": cases},
        "ranges": {"T2": {"WT": [0.1, 0.9], "entropy": entropy}, "T0+T1+T2+T3": {"WT": [0.7, 1.0]}},
    }
    (model / "subsets").mkdir(exist_ok=True)
    (model / "subsets" / "summary.json").write_text(json.dumps(content))


def test_cases_unlike_those_of_the_evaluation_are_flagged(folders, model, capsys):
    evaluated(model, (0.0, 0.001))
    assert predict(folders, model) == 0
    cases = record(folders / "out")["cases"]
    assert "flags" not in cases["complete"] and "flags" not in cases["two"]
    entropy, dice = cases["one"]["flags"]
    assert entropy == f"entropy {cases['one']['entropy']:.3f}, in the evaluation 0.000 to 0.001"
    assert "expected Dice 0.600, below every case of the evaluation with all modalities (0.700)" in dice
    assert f"  one: {entropy}; {dice}" in capsys.readouterr().out
    evaluated(model, (0.0, 1.0))
    assert predict(folders, model, output="usual") == 0
    assert len(record(folders / "usual")["cases"]["one"]["flags"]) == 1
    evaluated(model, (0.0, 0.001), cases=9)  # too few for a range
    assert predict(folders, model, output="few") == 0
    assert "flags" not in record(folders / "few")["cases"]["one"]


def test_maps_of_entropy(folders, model):
    assert predict(folders, model, "--save-uncertainty", "--save_probabilities") == 0
    found = sitk.ReadImage(str(folders / "out" / "uncertainty" / "one.nii.gz"))
    segmentation = sitk.ReadImage(str(folders / "out" / "one.nii.gz"))
    assert found.GetSize() == segmentation.GetSize() and found.GetOrigin() == segmentation.GetOrigin()
    with np.load(folders / "out" / "one.npz") as content:
        expected = entropy_map(content["probabilities"].astype(np.float32), False)
    assert np.abs(sitk.GetArrayFromImage(found) - 100 * expected).max() < 1
    kept = (folders / "out" / "one.nii.gz").stat().st_mtime_ns
    (folders / "out" / "uncertainty" / "two.nii.gz").unlink()
    assert predict(folders, model, "--save-uncertainty", "--continue_prediction") == 0
    assert (folders / "out" / "uncertainty" / "two.nii.gz").is_file()
    assert (folders / "out" / "one.nii.gz").stat().st_mtime_ns == kept


STUDENTS = [("--student", "1"), ("--student", "2")]
MEMBERS = {
    "folds": ("ModalityDropoutTrainer", [("-f", "0"), ("-f", "1")]),
    "students": ("SMMLTrainer", [("-f", "0", *student) for student in STUDENTS]),
    "students of folds": ("SMMLTrainer", [("-f", fold, *student) for fold in "01" for student in STUDENTS]),
}


@pytest.mark.parametrize("labels", [tiny.LABELS, tiny.REGIONS], ids=["labels", "regions"])
@pytest.mark.parametrize(("trainer", "options"), MEMBERS.values(), ids=MEMBERS)
def test_maps_of_disagreement_are_the_mutual_information_of_the_networks(folders, labels, trainer, options):
    model = write_model(trainer_class(trainer), folds=(0, 1), labels=labels)
    folds = sorted({each[1] for each in options})
    assert predict(folders, model, "-f", *folds, "--save-uncertainty", output="all") == 0
    found = read(folders / "all" / "disagreement" / "one.nii.gz")
    assert predict(folders, model, "-f", *folds, output="plain") == 0
    plain = segmentations(folders / "plain")
    assert plain and plain.items() <= segmentations(folders / "all").items()
    members = []
    for number, each in enumerate(options):
        out = folders / f"member_{number}"
        assert predict(folders, model, *each, "--save-uncertainty", "--save_probabilities", output=out.name) == 0
        assert not (out / "disagreement").exists()
        with np.load(out / "one.npz") as content:
            members.append(content["probabilities"].astype(np.float32).clip(1e-7, 1 - 1e-7))

    def entropies(p: np.ndarray) -> np.ndarray:
        if labels is tiny.REGIONS:
            return -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
        return -(p * np.log(p)).sum(0, keepdims=True) / np.log(len(p))

    gain = entropies(np.mean(members, axis=0)) - np.mean([entropies(each) for each in members], axis=0)
    expected = 100 * gain.max(0).clip(0)
    assert expected.max() > 2
    # computed before resampling, which changes these noisy maps
    assert np.corrcoef(found.reshape(expected.shape).ravel(), expected.ravel())[0, 1] > 0.9
    assert found.mean() == pytest.approx(expected.mean(), rel=0.2)


def test_maps_come_back_to_the_original_image_as_logits_do(folders, model):
    predictor = load_predictor(model, (0,), device=torch.device("cpu"), allow_tqdm=False)
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    case = Case("one", tuple(folders / "in" / f"one_{channel:04d}.nii.gz" for channel in range(CHANNELS)))
    case = Case("one", tuple(file if file.is_file() else None for file in case.files))
    data, properties = preprocess_case(case, plans, configuration, predictor.dataset_json)
    logits = np.random.default_rng(0).normal(size=(3, *data.shape[1:])).astype(np.float32)
    wanted = probabilities(logits, properties, plans, configuration, predictor.label_manager)
    own = np.stack([as_original(channel, properties, plans, configuration) for channel in logits])
    found = torch.from_numpy(own).softmax(0).numpy()
    inside = own.any(0)  # nnU-Net puts background around the box
    assert inside.any() and np.abs(found - wanted)[:, inside].max() < 1e-3


def test_networks_that_agree_disagree_nowhere():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    same, opposite = Disagreement(True), Disagreement(False)
    for _ in range(3):
        same.add(logits)
    assert same.map() == pytest.approx(np.zeros(5), abs=1e-6)
    opposite.add(torch.tensor([[20.0], [-20.0]]))
    opposite.add(torch.tensor([[-20.0], [20.0]]))
    assert opposite.map() == pytest.approx([1.0], abs=1e-4)


def test_entropy_is_a_fraction_of_its_maximum():
    softmax = np.array([[1, 0.25, 0.5], [0, 0.25, 0.5], [0, 0.25, 0], [0, 0.25, 0]], np.float32)
    assert entropy_map(softmax, False) == pytest.approx([0, 1, 0.5], abs=1e-4)
    assert entropy_map(np.array([[1, 0.5, 0.5], [0, 0, 0.5]], np.float32), True) == pytest.approx([0, 1, 1], abs=1e-4)
    # of the foreground alone: one voxel is certain background, one undecided between labels 1 and 2
    logits = np.array([[50, -50], [0, 2], [0, 2]], np.float32)
    assert case_entropy(logits, False) == pytest.approx(np.log(2) / np.log(3), abs=1e-4)
    assert case_entropy(logits[:, :1], False) is None
    assert case_entropy(np.array([[3.0, -9], [-9, -9]], np.float32), True) == pytest.approx(0.2754, abs=1e-3)


def test_a_broken_evaluation_is_a_warning(folders, model, capsys):
    (model / "subsets").mkdir()
    (model / "subsets" / "summary.json").write_text("{")
    assert predict(folders, model) == 0
    assert "warning" in capsys.readouterr().err
    assert "expected_dice" not in record(folders / "out")["cases"]["one"]


def test_the_input_folder_stays_as_it_is(folders, model):
    before = files(folders / "in")
    assert predict(folders, model) == 0
    assert files(folders / "in") == before


def test_a_dropped_modality_is_as_good_as_absent(folders, model):
    assert predict(folders, model, "--drop", "t3,T0") == 0
    (folders / "in" / "complete_0000.nii.gz").write_bytes(b"not read")
    assert predict(folders, model, "--drop", "T0+T3", output="again") == 0
    for channel in (0, 3):
        (folders / "in" / f"complete_000{channel}.nii.gz").unlink()
    (folders / "in" / "two_0003.nii.gz").unlink()
    assert predict(folders, model, output="deleted") == 0
    expected = segmentations(folders / "deleted")
    assert segmentations(folders / "out") == segmentations(folders / "again") == expected
    assert record(folders / "out")["dropped"] == ["T0", "T3"]
    assert record(folders / "out")["cases"] == record(folders / "deleted")["cases"]


def test_dropping_the_only_modality_of_a_case_is_a_problem(folders, model, capsys):
    assert predict(folders, model, "--drop", "T2") == 2
    assert "one: has no modality" in capsys.readouterr().err


@pytest.mark.parametrize(("drop", "message"), [("all", "leaves no modality"), ("PD", "unknown modality 'PD'")])
def test_an_impossible_drop_is_refused(folders, model, capsys, drop, message):
    assert predict(folders, model, "--drop", drop) == 2
    assert message in capsys.readouterr().err


def test_an_all_zero_image_is_an_absent_modality(folders, model):
    assert predict(folders, model) == 0
    # of another size and place, too: nothing of it is used
    write(folders / "in" / "one_0000.nii.gz", np.zeros((3, 4, 5), np.float32), origin=(0.0, 0.0, 0.0))
    assert predict(folders, model, output="zero") == 0
    assert segmentations(folders / "zero") == segmentations(folders / "out")
    entry = record(folders / "zero")["cases"]["one"]
    assert list(entry.pop("images")) == ["T0", "T2"] and 0 < entry.pop("entropy") < 1
    assert entry == {
        "subset": "T2",
        "modalities": ["T2"],
        "absent": ["T0", "T1", "T3"],
        "all_zero": ["T0"],
    }


def test_networks_are_told_the_availability(folders, model, monkeypatch):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    told, predictors = [], []

    def manual(self, network, *arguments):
        network.conditioned = AvailabilityAware.conditioned.__get__(network)
        network.register_forward_pre_hook(lambda module, inputs: told.append(module.availability))
        predictors.append(self)
        real(self, network, *arguments)

    real = nnUNetPredictor.manual_initialization
    monkeypatch.setattr(nnUNetPredictor, "manual_initialization", manual)
    assert predict(folders, model) == 0
    assert all(value.dtype == torch.bool and value.shape == (1, CHANNELS) for value in told)
    seen = [tuple(value[0].nonzero().flatten().tolist()) for value in told]
    assert list(dict.fromkeys(seen)) == [(0, 1, 2, 3), (2,), (1, 3)]
    assert predictors[0].network.availability is None


@pytest.fixture
def bad(folders: Path) -> Path:
    """Two of the three cases have problems, and there is a file of no case."""
    (folders / "in" / "two_0003.nii.gz").write_bytes(b"no image")
    array = noise(1)
    array[5, 5, 5] = np.nan
    write(folders / "in" / "one_0000.nii.gz", array, spacing=(1.0, 1.0, 2.0))
    write(folders / "in" / "lonely.nii.gz", noise(2))
    return folders


def test_all_problems_are_listed_before_the_network_runs(bad, model, capsys, monkeypatch):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    monkeypatch.delattr(nnUNetPredictor, "predict_logits_from_preprocessed_data")
    assert predict(bad, model) == 2
    err = capsys.readouterr().err
    first, *lines = err.strip().splitlines()[-5:]
    assert "4 problems in 2 cases, nothing was predicted (--skip-bad: continue with the other 1):" in first
    assert [line.split()[0] for line in lines] == ["lonely.nii.gz", "one:", "one:", "two:"]
    assert not (bad / "out").exists()


def test_skip_bad_predicts_the_good_cases_and_fails(bad, model, capsys):
    assert predict(bad, model, "--skip-bad") == 1
    assert sorted(segmentations(bad / "out")) == ["complete.nii.gz"]
    err = capsys.readouterr().err
    assert "4 problems in 2 cases, left out:" in err
    assert "  two: T3 (two_0003.nii.gz) cannot be read" in err


def test_a_misnamed_file_leaves_out_the_case_whose_name_it_begins_with(folders, model, capsys):
    """Otherwise the case would be predicted without this image, and nobody would notice."""
    (folders / "in" / "two_0003.nii.gz").rename(folders / "in" / "two_3.nii.gz")
    write(folders / "in" / "twofold.nii.gz", noise(2))  # of no case
    assert predict(folders, model, "--skip-bad") == 1
    assert sorted(segmentations(folders / "out")) == ["complete.nii.gz", "one.nii.gz"]
    err = capsys.readouterr().err
    assert "2 problems in 1 case, left out:" in err
    assert "  two: two_3.nii.gz has no channel number of four digits" in err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_an_output_that_is_not_utf8_is_refused_before_the_network_runs(folders, model, capsys):
    """SimpleITK would end the process when it writes the first segmentation."""
    assert predict(folders, model, output=os.fsdecode(b"out\xff")) == 2
    image = f"T0={folders / 'in' / 'complete_0000.nii.gz'}"
    options = ["-m", str(model), "-f", "0", "-device", "cpu", "-o", os.fsdecode(os.fsencode(folders) + b"/\xff.nii.gz")]
    assert cli.main(["predict", "--image", image, *options]) == 2
    assert capsys.readouterr().err.count("is not UTF-8; rename it") == 2


def test_skip_bad_with_bad_cases_only_is_refused(bad, model, capsys):
    for path in (bad / "in").glob("complete_*"):
        path.unlink()
    assert predict(bad, model, "--skip-bad") == 2
    assert "nothing was predicted:" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["in", "model", "link"])
def test_folders_that_must_stay_are_no_output_folder(folders, model, capsys, other):
    (folders / "link").symlink_to(folders / "in")
    (folders / "model").symlink_to(model)
    before = files(folders / "in"), files(model)
    assert predict(folders, model, output=other) == 2
    assert "choose another one" in capsys.readouterr().err
    assert (files(folders / "in"), files(model)) == before


def test_absent_modality_must_stay_zero(folders, capsys):
    schemes = ["CTNormalization", "ZScoreNormalization", "ZScoreNormalization", "ZScoreNormalization"]
    model = write_model(trainer_class("nnUNetTrainer"), schemes=schemes)
    assert predict(folders, model) == 2
    err = capsys.readouterr().err
    assert "one: T0 is absent, but CTNormalization turns the zeros" in err
    assert "complete" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-step_size", "0"], "-step_size is 0.0"),
        (["-step_size", "1.5"], "-step_size is 1.5"),
        (["-npp", "-1"], "-npp -1"),
        (["-num_parts", "2", "-part_id", "2"], "-part_id is 2, expected 0 to 1"),
        (["-f", "zero"], "-f zero: expected fold numbers"),
    ],
)
def test_impossible_options_are_refused(folders, model, capsys, options, message):
    assert predict(folders, model, *options) == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_the_default_device_names_the_way_out(folders, model, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["predict", "-i", str(folders / "in"), "-o", str(folders / "out"), "-m", str(model)]) == 2
    err = capsys.readouterr().err
    assert err == "mstkd predict: -device is cuda (the default), but torch finds no CUDA GPU; use -device cpu\n"


def test_a_configuration_belongs_to_a_data_set(folders, capsys):
    assert cli.main(["predict", "-i", str(folders / "in"), "-o", str(folders / "out"), "-d", "901"]) == 2
    assert "-d needs -c CONFIGURATION" in capsys.readouterr().err


def test_geometry_is_that_of_the_first_image(folders, model):
    assert predict(folders, model) == 0
    found = sitk.ReadImage(str(folders / "out" / "one.nii.gz"))
    image = sitk.ReadImage(str(folders / "in" / "one_0002.nii.gz"))
    assert found.GetSpacing() == pytest.approx(image.GetSpacing())
    assert found.GetOrigin() == pytest.approx(image.GetOrigin())
    assert found.GetDirection() == pytest.approx(TURNED)


def test_the_bar_can_be_switched_off(folders, model, capsys):
    assert predict(folders, model) == 0
    assert "one (T2)" in capsys.readouterr().err
    assert predict(folders, model, "--disable_progress_bar") == 0
    assert capsys.readouterr().err == ""
