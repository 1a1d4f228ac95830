from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from nnunetv2_mstkd.metrics.conventions import LESION_CONVENTIONS
from nnunetv2_mstkd.metrics.lesionwise import lesionwise, lesionwise_regions
from nnunetv2_mstkd.metrics.surface import hd95, surface_distances

UNIT = (1.0, 1.0, 1.0)


def boxes(*parts: tuple[slice | int, ...], shape: tuple[int, ...] = (12, 12, 40)) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    for part in parts:
        mask[part] = True
    return mask


def cube(x: int, size: int = 3) -> tuple[slice, ...]:
    """A cube that begins at x along the last axis."""
    return slice(4, 4 + size), slice(4, 4 + size), slice(x, x + size)


def voxels(x: int, count: int) -> tuple[slice | int, ...]:
    """Voxels in a row along the second axis."""
    return 5, slice(0, count), x


# ---- values worked out by hand -------------------------------------------------------------------------------------


def test_a_worked_example_of_found_missed_tiny_and_false_lesions():
    # metastases of 2023: dilation 1, lesions of at most 2 mm3 are not scored, penalty 374
    reference = boxes(cube(2), voxels(12, 2), voxels(20, 4))
    prediction = boxes((slice(4, 6), slice(4, 7), slice(2, 5)), voxels(12, 1), cube(30))
    result = lesionwise(prediction, reference, UNIT, "brats2023_met")
    # of 27 voxels 18 are found and none is false: 2 * 18 / (18 + 27); the second is too small, the third is missed,
    # and the prediction at the second is not false: it found something
    assert [lesion.volume_mm3 for lesion in result.lesions] == [27, 2, 4]
    assert [lesion.predicted for lesion in result.lesions] == [1, 1, 0]
    assert [lesion.scored for lesion in result.lesions] == [True, False, True]
    assert [lesion.dice for lesion in result.lesions] == [0.8, 2 / 3, 0]
    assert (result.true_positives, result.false_negatives, result.false_positives) == (1, 1, 1)
    assert result.dice == pytest.approx(0.8 / 3)
    # the cube's missing layer has 9 voxels 1 mm away, so 1 mm is the percentile; one missed, one false
    assert result.lesions[0].hd95_mm == 1
    assert result.hd95_mm == pytest.approx((1 + 374 + 374) / 3)


def test_nothing_to_score_is_perfect():
    empty = boxes()
    for reference in (empty, boxes(voxels(12, 2))):
        result = lesionwise(empty, reference, UNIT, "brats2023_met")
        assert (result.dice, result.hd95_mm, result.false_negatives) == (1, 0, 0)


def test_a_false_lesion_of_one_voxel_counts_in_2023():
    result = lesionwise(boxes(voxels(3, 1)), boxes(), UNIT, "brats2023_gli")
    assert (result.dice, result.hd95_mm, result.false_positives) == (0, 374, 1)


@pytest.mark.parametrize(
    ("region", "size", "false"), [("WT", 20, 0), ("WT", 21, 1), ("ET", 10, 0), ("ET", 11, 1), ("RC", 20, 0)]
)
def test_small_false_lesions_are_dropped_in_2024(region, size, false):
    prediction = np.zeros((12, 30, 12), dtype=bool)
    prediction[5, :size, 5] = True
    result = lesionwise(prediction, np.zeros_like(prediction), UNIT, "brats2024_gli", region=region)
    assert result.false_positives == false
    assert (result.dice, result.hd95_mm) == ((0, 337) if false else (1, 0))


@pytest.mark.parametrize(
    ("convention", "region", "widest_gap"),
    [
        ("brats2023_met", "ET", 2),
        ("brats2023_gli", "WT", 6),
        ("brats2024_gli", "WT", 6),
        ("brats2024_gli", "SNFH", 6),
        ("brats2024_gli", "NETC", 10),
        ("brats2024_ped", "ET", 10),
    ],
)
def test_lesions_closer_than_two_dilations_are_one(convention, region, widest_gap):
    # dilations by n reach n voxels each and touch across a gap of 2 n
    for gap, number in ((widest_gap, 1), (widest_gap + 1, 2)):
        reference = boxes(cube(2, 6), cube(2 + 6 + gap, 6), shape=(14, 14, 40))
        assert len(lesionwise(reference, reference, UNIT, convention, region=region).lesions) == number


def test_the_threshold_is_a_volume_and_not_a_count():
    reference = boxes(voxels(5, 3))
    for spacing, scored in (((1.0, 1.0, 0.6), False), ((1.0, 1.0, 0.7), True)):
        lesion = lesionwise(reference, reference, spacing, "brats2023_met").lesions[0]
        assert lesion.scored == scored
        assert lesion.volume_mm3 == pytest.approx(3 * spacing[2])


def test_the_diagonal_as_penalty():
    result = lesionwise(boxes(), boxes(cube(2)), (1.0, 2.0, 0.5), "brats2024_met")
    assert result.hd95_mm == pytest.approx(np.sqrt(12**2 + 24**2 + 20**2))


def test_one_prediction_over_two_lesions_belongs_to_both():
    # 10 apart, so that dilations of 3 do not touch; the prediction covers both cubes and all between
    reference = boxes(cube(2), cube(15))
    prediction = boxes((slice(4, 7), slice(4, 7), slice(2, 18)))
    result = lesionwise(prediction, reference, UNIT, "brats2024_gli")
    assert (result.true_positives, result.false_positives) == (2, 0)
    assert result.dice == pytest.approx(2 * 27 / (27 + 144))


def test_a_flat_lesion_has_the_surface_of_a_solid():
    # in 3-D the plate is surface throughout: 8 of its inner voxels are 1 and one is 2 from the ring of 16, and the
    # percentile of the 41 distances lies at the 39th. The contour of a 2-D image would be the ring itself: 0
    plate = boxes((5, slice(2, 7), slice(2, 7)))
    ring = plate.copy()
    ring[5, 3:6, 3:6] = False
    lesion = lesionwise(ring, plate, UNIT, "brats2023_met").lesions[0]
    assert lesion.hd95_mm == hd95(surface_distances(ring, plate, UNIT)) == 1


# ---- partners ------------------------------------------------------------------------------------------------------

# two enhancing parts at the ends of one necrotic bar
NECROSIS = boxes((slice(4, 7), slice(4, 7), slice(6, 26)))
ENDS = boxes(cube(3), cube(26))
NOTHING = boxes()


def scores_of_ends(prediction: np.ndarray, necrosis: np.ndarray, predicted_necrosis: np.ndarray):
    predictions = {"ET": prediction, "NETC": predicted_necrosis, "RC": NOTHING}
    references = {"ET": ENDS, "NETC": necrosis, "RC": NOTHING}
    return lesionwise_regions(predictions, references, UNIT, "brats2024_gli")["ET"]


def test_lesions_touching_one_necrosis_are_one_in_2024():
    one_end = boxes(cube(3))
    apart = scores_of_ends(one_end, NOTHING, NOTHING)
    assert (len(apart.lesions), apart.dice) == (2, 0.5)
    together = scores_of_ends(one_end, NECROSIS, NOTHING)
    assert (len(together.lesions), together.dice) == (1, 2 * 27 / (27 + 54))


def test_predicted_lesions_are_joined_by_predicted_necrosis():
    # the far end is joined to the found one and so no longer false
    near = boxes(cube(3))
    references = {"ET": near, "NETC": NOTHING, "RC": NOTHING}
    for necrosis, false in ((NOTHING, 1), (NECROSIS, 0)):
        predictions = {"ET": ENDS, "NETC": necrosis, "RC": NOTHING}
        result = lesionwise_regions(predictions, references, UNIT, "brats2024_gli")["ET"]
        assert result.false_positives == false


def test_a_missing_partner_is_refused_by_name():
    masks = {"ET": ENDS, "NETC": NECROSIS}
    with pytest.raises(ValueError, match="predictions have no mask of RC; brats2024_gli joins lesions of ET"):
        lesionwise_regions(masks, masks, UNIT, "brats2024_gli")
    with pytest.raises(ValueError, match="references have no mask of NETC"):
        lesionwise_regions(masks, {"ET": ENDS}, UNIT, "brats2024_met")


def test_regions_without_partners_need_none():
    masks = {"WT": ENDS | NECROSIS, "TC": ENDS}
    result = lesionwise_regions(masks, masks, UNIT, "brats2024_gli")
    assert list(result) == ["WT", "TC"]
    assert all(scores.dice == 1 and scores.hd95_mm == 0 for scores in result.values())


# ---- against the definition read literally --------------------------------------------------------------------------


def literal(prediction: np.ndarray, reference: np.ndarray, dilation: int, min_volume: float) -> tuple[float, float]:
    """The definition of 2023 step by step, on the whole image and lesion after lesion."""
    near, faces = np.ones((3, 3, 3)), ndimage.generate_binary_structure(3, 2)
    areas = ndimage.label(ndimage.binary_dilation(reference, faces, dilation), near)[0]
    predicted, count = ndimage.label(prediction, near)
    used: set[int] = set()
    dices, distances = [], []
    for number in range(1, areas.max() + 1):
        lesion = reference & (areas == number)
        reach = ndimage.binary_dilation(lesion, faces, dilation)
        own = set(np.unique(predicted[reach])) - {0}
        used |= own
        if lesion.sum() <= min_volume:
            continue
        matched = np.isin(predicted, list(own))
        dices.append(2 * (matched & lesion).sum() / (matched.sum() + lesion.sum()))
        distances.append(hd95(surface_distances(matched, lesion, UNIT)) if own else 374)
    false = count - len(used)
    total = len(dices) + false
    return (1, 0) if total == 0 else (sum(dices) / total, (sum(distances) + 374 * false) / total)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["brats2023_gli", "brats2023_met"]))
def test_scores_are_those_of_the_definition_read_literally(seed, convention):
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal((2, 14, 18, 22)), (0, 1, 1, 1))
    prediction, reference = noise > rng.uniform(0.3, 0.8)
    rules = LESION_CONVENTIONS[convention]
    found = lesionwise(prediction, reference, UNIT, convention)
    assert (found.dice, found.hd95_mm) == pytest.approx(
        literal(prediction, reference, rules.dilation, rules.min_volume)
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(LESION_CONVENTIONS)), st.permutations([0, 1, 2]))
def test_scores_do_not_depend_on_the_order_of_the_axes(seed, convention, axes):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((2, 12, 18, 22)), (0, 1, 1, 1))
    masks = noise > 0.5
    spacing = np.array([1.0, 1.5, 0.7])
    expected = lesionwise(*masks, spacing, convention)
    found = lesionwise(*(mask.transpose(axes) for mask in masks), spacing[axes], convention)
    assert (found.dice, found.hd95_mm) == pytest.approx((expected.dice, expected.hd95_mm))
    assert found.false_positives == expected.false_positives


def test_two_dimensions_and_only_two_or_three():
    flat = ENDS[5]
    assert lesionwise(flat, flat, (1.0, 1.0), "brats2023_met").dice == 1
    with pytest.raises(ValueError, match="4 axes"):
        lesionwise(ENDS[None], ENDS[None], (1.0,) * 4)


def test_an_unknown_convention_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'brats2022'; known are brats2023_gli"):
        lesionwise(ENDS, ENDS, UNIT, "brats2022")
