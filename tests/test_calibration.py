"""Expected calibration error and temperature: hand-computed counts, recovery of a known temperature, and a model's."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.evaluation.records import _dense, _sparse
from nnunetv2_mstkd.evaluation.scoring import _CountingLabels, log_odds
from nnunetv2_mstkd.inference.expected_dice import SUMMARY, read_ranges, read_temperatures
from nnunetv2_mstkd.metrics.calibration import BINS, expected_calibration_error, fit_temperature, logit_counts
from nnunetv2_mstkd.nnunet.description import foreground_heads
from nnunetv2_mstkd.nnunet.preprocessing import scaled
from nnunetv2_mstkd.reporting.tables import calibration_table
from nnunetv2_mstkd.statistics.calibration import Calibration


def drawn(temperature: float, number: int = 200_000, seed: int = 0) -> np.ndarray:
    """Counts of a model that says z where the truth is drawn with the odds z / temperature."""
    random = np.random.default_rng(seed)
    z = random.normal(0, 3, number)
    return logit_counts(z, random.random(number) < 1 / (1 + np.exp(-z / temperature)))


def test_counts_leave_out_what_is_certainly_background():
    logits = np.array([[-9.0, -4.7, -4.5], [0.0, 3.0, 40.0]])
    counts = logit_counts(logits, logits > 1)
    assert counts.shape == (2, BINS)
    assert counts.sum(1).tolist() == [4, 2]
    assert counts[:, -1].tolist() == [1, 1]  # a logit above the last bin
    assert logit_counts(np.array([np.inf, 1e30]), np.array([True, False]))[:, -1].tolist() == [2, 1]


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("ignore", [None, 3])
def test_counts_of_a_case_are_those_of_all_its_voxels(regions, ignore):
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.normal(0, 8, (3, 6, 7, 8)).astype(np.float32))
    reference = random.integers(0, 4, (6, 7, 8)).astype(np.uint8)
    labels = {"background": 0, "WT": [1, 2], "TC": 2} if regions else {"background": 0, "a": 1, "b": 2}
    content = {"labels": labels, **({"regions_class_order": [1, 2]} if regions else {})}
    values = {name: np.atleast_1d(value) for name, value in labels.items() if name != "background"}
    rules = SimpleNamespace(ignore_label=ignore, regions=values)
    manager = SimpleNamespace(has_regions=regions, convert_logits_to_segmentation=lambda logits: logits)
    counting = _CountingLabels(manager, content, rules, reference, lambda logits: None)
    counting.convert_logits_to_segmentation(logits)
    known = np.full(reference.shape, True) if ignore is None else reference != ignore
    for region, head in foreground_heads(content).items():
        odds, there = log_odds(logits, head, regions), np.isin(reference, values[region])
        np.testing.assert_array_equal(counting.calibration[region], logit_counts(odds[known], there[known]))


def test_error_of_a_hand_made_case():
    # 0.9 is stated ten times and comes true six times, 0.1 ten times and comes true once
    logits = np.log([9.0] * 10 + [1 / 9] * 10)
    positive = np.array([True] * 6 + [False] * 4 + [True] + [False] * 9)
    found = expected_calibration_error(logit_counts(logits, positive))
    assert found == pytest.approx((0.3 * 10 + 0.0 * 10) / 20, abs=0.005)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_a_known_temperature_is_recovered(temperature):
    counts = drawn(temperature)
    assert fit_temperature(counts) == pytest.approx(temperature, rel=0.03)
    assert expected_calibration_error(counts, temperature) < 0.01
    if temperature != 1:
        assert expected_calibration_error(counts) > 0.05


def test_nothing_to_count_says_nothing():
    nothing = np.zeros((2, BINS), int)
    assert np.isnan(expected_calibration_error(nothing))
    assert fit_temperature(nothing) == 1.0


def test_a_perfect_model_has_a_temperature_within_the_limits():
    logits = np.array([5.0, 6.0, -4.0, -3.0])
    assert 0.2 <= fit_temperature(logit_counts(logits, logits > 0)) < 0.21


@pytest.mark.parametrize("regions", [True, False])
def test_odds_are_those_of_the_probability(regions):
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    p = (torch.sigmoid(logits) if regions else torch.softmax(logits, 0))[1]
    assert np.allclose(log_odds(logits, 1, regions), torch.log(p / (1 - p)), atol=1e-5)


def test_one_temperature_for_each_number_of_modalities():
    certain, right = drawn(3.0), drawn(1.0)
    found = Calibration({"T1": {"WT": certain}, "T2": {"WT": certain}, "T1+T2": {"WT": right}})
    assert list(found.temperatures) == [1, 2]
    assert found.temperatures[1] == pytest.approx(3, rel=0.03)
    assert found.error("T1", "WT", calibrated=True) < 0.01 < found.error("T1", "WT")
    table = calibration_table(found)
    assert table.columns.tolist() == ["subset", "WT", "temperature"]
    assert table["temperature"].astype(float).tolist() == pytest.approx([3, 3, 1], rel=0.03)


def test_counts_survive_the_record():
    counts = drawn(1.0, number=100)
    stored = json.loads(json.dumps(_sparse(counts)))
    assert len(stored) <= 100
    assert np.array_equal(_dense(stored), counts)


# ---- temperatures of a model ---------------------------------------------------------------------------------------


def with_summary(folder: Path, content: object) -> Path:
    file = folder / SUMMARY
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content))
    return folder


def test_temperatures_are_read_by_number_of_modalities(tmp_path):
    model = with_summary(tmp_path, {"calibration": {"temperature": {"1": 1.5, "2": 1.25}}})
    assert read_temperatures(model) == {1: 1.5, 2: 1.25}


@pytest.mark.parametrize("content", [{}, {"calibration": None}])
def test_an_evaluation_without_temperatures_has_to_be_repeated(tmp_path, content):
    with pytest.raises(MissingFileError, match=r"mstkd evaluate .* --restart"):
        read_temperatures(with_summary(tmp_path, content))
    with pytest.raises(MissingFileError, match="mstkd evaluate -m"):
        read_temperatures(tmp_path / "other")


@pytest.mark.parametrize(
    ("content", "networks", "told"),
    [
        ({"folds": ["0", "1"]}, 2, "of a single network, and here the mean of 2 networks predicts; choose a fold"),
        ({"folds": ["0+1"]}, 1, "of the mean of 2 networks, and here a single network predicts; choose the folds"),
        ({"folds": ["0+1", "2"]}, 2, "of a single network"),
        ({"moved_modalities": ["T1"]}, 1, "no temperatures: .* changes T1, .* --restart --mask-first"),
        ({"normalization": "per_channel"}, 1, "no temperatures: the model now has input.normalization=plans"),
    ],
)
def test_temperatures_of_other_predictions_are_refused(tmp_path, content, networks, told):
    model = with_summary(tmp_path, {"calibration": {"temperature": {"1": 1.5}}, **content})
    with pytest.raises(InputError, match=told):
        read_temperatures(model, "plans", networks=networks)


def test_temperatures_of_another_averaging_are_refused(tmp_path):
    model = with_summary(tmp_path, {"calibration": {"temperature": {"1": 1.5}}, "mirroring": True, "step_size": 0.5})
    assert read_temperatures(model, options={"mirroring": True, "step_size": 0.5}) == {1: 1.5}
    with pytest.raises(InputError, match=r"those of a prediction with mirroring True and step size 0\.5"):
        read_temperatures(model, options={"mirroring": False, "step_size": 0.25})


def test_an_evaluation_of_other_folds_is_not_used(tmp_path):
    model = with_summary(tmp_path, {"calibration": {"temperature": {"1": 1.5}}, "weights": {"0": "a", "1": "b"}})
    assert read_temperatures(model, weights={"1": "bcd", "2": "c"}) == {1: 1.5}
    with pytest.raises(InputError, match="is of fold 0 and 1, not of 2"):
        read_temperatures(model, weights={"2": "c"})


def test_entropies_of_other_networks_have_no_range(tmp_path):
    content = {"folds": ["0", "1"], "mirroring": True, "cases_by_subset": {"T1": 10}}
    model = with_summary(tmp_path, {**content, "ranges": {"T1": {"WT": [0.1, 0.9], "entropy": [0.2, 0.3]}}})
    whole, part = {"WT": (0.1, 0.9), "entropy": (0.2, 0.3)}, {"WT": (0.1, 0.9)}
    for networks, mirroring, found in ((1, True, whole), (2, True, part), (None, True, part), (1, False, part)):
        assert read_ranges(model, ("T1", "T2"), networks, {"mirroring": mirroring}) == {1: found}


def test_folds_that_were_evaluated_together_may_predict_together(tmp_path):
    model = with_summary(tmp_path, {"calibration": {"temperature": {"1": 1.5}}, "folds": ["0+1"]})
    assert read_temperatures(model, "plans", networks=2) == {1: 1.5}


@pytest.mark.parametrize("value", [0, -1, "x", [1], float("inf")])
def test_a_temperature_that_is_none_is_refused(tmp_path, value):
    with pytest.raises(InputError, match="evaluate again"):
        read_temperatures(with_summary(tmp_path, {"calibration": {"temperature": {"1": value}}}))


def test_scaling_leaves_logits_alone_at_one():
    logits = np.ones((2, 3), np.float16)
    assert scaled(logits, 1.0) is logits
    assert scaled(logits, 2.0).dtype == np.float16 and scaled(logits, 2.0)[0, 0] == 0.5
