from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nnunetv2_mstkd.metrics import conventions
from nnunetv2_mstkd.metrics.overlap import dice, score

EMPTY = np.zeros((4, 5, 6), dtype=bool)
UNIT = (1.0, 1.0, 1.0)

small_masks = hnp.arrays(bool, (3, 4, 2))


def with_voxels(*voxels: tuple[int, ...], shape: tuple[int, ...] = (4, 5, 6)) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    for voxel in voxels:
        mask[voxel] = True
    return mask


# three of four predicted voxels are right, three of six wanted ones are found
REFERENCE = with_voxels((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 1, 2))
PREDICTION = with_voxels((0, 0, 0), (0, 0, 1), (0, 0, 2), (3, 4, 5))


# ---- values worked out by hand -------------------------------------------------------------------------------------


def test_metrics_of_a_worked_example():
    found = score(PREDICTION, REFERENCE, (2.0, 5.0, 10.0))
    assert found["dice"] == dice(PREDICTION, REFERENCE) == 2 * 3 / (4 + 6)
    assert found["iou"] == 3 / 7
    assert found["sensitivity"] == 3 / 6
    assert found["precision"] == 3 / 4
    assert found["relative_volume_error"] == (4 - 6) / 6
    assert found["volume_error_ml"] == pytest.approx(-2 * 100 / 1000)
    assert score(REFERENCE, PREDICTION, (2.0, 5.0, 10.0))["volume_error_ml"] == pytest.approx(+0.2)


def test_surfaces_are_left_out_on_request():
    found = score(PREDICTION, REFERENCE, UNIT)
    assert score(PREDICTION, REFERENCE, UNIT, surfaces=False) == {
        name: value for name, value in found.items() if name not in ("hd95", "nsd")
    }


# ---- empty masks ---------------------------------------------------------------------------------------------------

DIAGONAL = math.sqrt(4**2 + (5 * 2) ** 2 + (6 * 3) ** 2)
NAN = math.nan


@pytest.mark.parametrize(
    ("convention", "metric", "both", "prediction_empty", "reference_empty"),
    [
        ("brats", "dice", 1, 0, 0),
        ("brats", "iou", 1, 0, 0),
        ("brats", "hd95", 0, DIAGONAL, DIAGONAL),
        ("brats", "nsd", 1, 0, 0),
        ("brats", "sensitivity", 1, 0, 0),
        ("brats", "precision", 1, 0, 0),
        ("brats", "volume_error_ml", 0, -0.036, 0.024),
        ("brats", "relative_volume_error", 0, -1, NAN),
        ("nnunet", "dice", NAN, 0, 0),
        ("nnunet", "iou", NAN, 0, 0),
        ("nnunet", "hd95", NAN, NAN, NAN),
        ("nnunet", "nsd", NAN, NAN, NAN),
        ("nnunet", "sensitivity", NAN, 0, NAN),
        ("nnunet", "precision", NAN, NAN, 0),
        ("nnunet", "volume_error_ml", 0, -0.036, 0.024),
        ("nnunet", "relative_volume_error", NAN, -1, NAN),
    ],
)
def test_empty_masks_have_the_value_of_the_convention(convention, metric, both, prediction_empty, reference_empty):
    spacing = (1.0, 2.0, 3.0)
    for prediction, reference, expected in (
        (EMPTY, EMPTY, both),
        (EMPTY, REFERENCE, prediction_empty),
        (PREDICTION, EMPTY, reference_empty),
    ):
        found = score(prediction, reference, spacing, convention=convention)[metric]
        assert found == pytest.approx(expected, nan_ok=True)


def test_the_penalty_of_brats_is_the_diagonal_of_its_images():
    empty = np.zeros((240, 240, 155), dtype=bool)
    full = empty.copy()
    full[100, 100, 100] = True
    assert score(empty, full, UNIT)["hd95"] == pytest.approx(373.12866, abs=1e-5)


def test_dice_alone_follows_the_convention_too():
    assert math.isnan(dice(EMPTY, EMPTY, convention="nnunet"))
    assert dice(EMPTY, EMPTY) == 1 and dice(EMPTY, REFERENCE) == 0


def test_the_rules_are_put_into_words():
    text = conventions.empty_rules_text("brats", ["dice", "hd95", "relative_volume_error"])
    assert "Dice: 1 if both masks are empty, 0 if one is" in text.splitlines()
    assert "HD95: 0 if both masks are empty, the image diagonal if one is" in text.splitlines()
    assert text.splitlines()[3].endswith(
        "as computed if only the prediction is, left out of the mean if only the reference is"
    )
    assert "HD95: left out of the mean if any mask is empty" in conventions.empty_rules_text("nnunet")


def test_lesion_wise_rules_name_the_penalty_of_their_convention():
    text = conventions.empty_rules_text(metrics=["lesion_hd95"], lesion_convention="brats2024_gli")
    assert "a missed lesion 337 mm; a false lesion 337 mm" in text and "empty masks" not in text
    text = conventions.empty_rules_text(metrics=["lesion_hd95"], lesion_convention="brats2024_met")
    assert "a missed lesion the image diagonal" in text
    with pytest.raises(ValueError, match="lesion_dice needs the name of its lesion-wise convention"):
        conventions.empty_rules_text(metrics=["lesion_dice"])


def test_every_convention_has_a_rule_for_every_metric():
    lesionwise = set(conventions.LESION_RULES)
    for convention in conventions.CONVENTIONS.values():
        assert set(convention.rules) == set(conventions.METRICS) - lesionwise


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), (UNIT,)], ids=["dice", "score"])
@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (EMPTY.astype(np.uint8), "prediction has type uint8, expected bool.*np.isin"),
        (EMPTY.tolist(), "prediction is a list, expected a numpy array"),
        (EMPTY[:3], r"shape \(3, 5, 6\), the reference \(4, 5, 6\)"),
    ],
)
def test_what_is_not_a_pair_of_masks_is_refused(options, prediction, message):
    with pytest.raises(ValueError, match=message):
        (score if options else dice)(prediction, EMPTY, *options)


@pytest.mark.parametrize(
    ("spacing", "message"),
    [
        ((1.0, 1.0), "2 numbers, the masks have 3 axes"),
        (1.0, "1 numbers, the masks have 3 axes"),
        ((1.0, 0.0, 1.0), "not positive"),
        ((1.0, -1.0, 1.0), "not positive"),
        ((1.0, math.nan, 1.0), "not positive"),
        ((1.0, math.inf, 1.0), "not positive"),
    ],
)
def test_an_impossible_spacing_is_refused(spacing, message):
    with pytest.raises(ValueError, match=message):
        score(PREDICTION, REFERENCE, spacing)


def test_a_mask_without_voxels_is_refused():
    with pytest.raises(ValueError, match="no voxel"):
        dice(EMPTY[:0], EMPTY[:0])


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown convention 'BraTS'.*brats, nnunet"):
        dice(PREDICTION, REFERENCE, convention="BraTS")
    with pytest.raises(ValueError, match=r"unknown metric 'DSC'.*dice"):
        conventions.metric_named("DSC")
    with pytest.raises(ValueError, match="tolerance -1"):
        score(EMPTY, EMPTY, UNIT, tolerance=-1)


# ---- properties ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(small_masks, small_masks)
def test_dice_is_symmetric_and_a_share(first, second):
    assert dice(first, second) == dice(second, first)
    assert 0 <= dice(first, second) <= 1
    assert dice(first, first) == 1


@settings(max_examples=60, deadline=None)
@given(small_masks, small_masks, st.integers(0, 23))
def test_mending_a_voxel_never_lowers_dice(prediction, reference, position):
    better = prediction.copy()
    better.flat[position] = reference.flat[position]
    assert dice(better, reference) >= dice(prediction, reference)


@settings(max_examples=60, deadline=None)
@given(small_masks, small_masks)
def test_iou_sensitivity_and_precision_agree_with_dice(prediction, reference):
    found = score(prediction, reference, UNIT, surfaces=False)
    assert found["iou"] == pytest.approx(found["dice"] / (2 - found["dice"]))
    shares = found["sensitivity"], found["precision"]
    expected = 0.0 if sum(shares) == 0 else 2 * shares[0] * shares[1] / sum(shares)
    assert found["dice"] == pytest.approx(expected)
