from __future__ import annotations

import math

import medpy.metric.binary
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from nnunetv2_mstkd.metrics.overlap import score
from nnunetv2_mstkd.metrics.surface import surface, surface_distances

UNIT = (1.0, 1.0, 1.0)
SPACINGS = [UNIT, (3.0, 1.0, 1.0), (0.9375, 1.2, 5.5)]

small_masks = hnp.arrays(bool, (4, 3, 5))
spacings = st.tuples(*[st.floats(0.3, 6.0)] * 3)


def with_voxels(*voxels: tuple[int, ...], shape: tuple[int, ...] = (3, 4, 14)) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    for voxel in voxels:
        mask[voxel] = True
    return mask


def ball(centre: tuple[float, ...], radius: float, shape: tuple[int, ...] = (40, 44, 36)) -> np.ndarray:
    grid = np.ogrid[tuple(slice(size) for size in shape)]
    return sum((axis - middle) ** 2 for axis, middle in zip(grid, centre, strict=True)) <= radius**2


def blobs(seed: int, shape: tuple[int, ...] = (40, 44, 36)) -> np.ndarray:
    """Several lesions with rough borders, some of them at the border of the image."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 3)
    return noise > 1.5 * noise.std()


def hd95(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...]) -> float:
    return score(prediction, reference, spacing)["hd95"]


def nsd(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...], tolerance: float = 1.0) -> float:
    return score(prediction, reference, spacing, tolerance=tolerance)["nsd"]


# ---- values worked out by hand -------------------------------------------------------------------------------------


def test_spacing_has_the_order_of_the_axes():
    prediction, reference = with_voxels((1, 1, 1)), with_voxels((1, 1, 4))
    assert hd95(prediction, reference, (1.0, 2.0, 3.0)) == 9.0
    assert hd95(prediction, reference, (3.0, 2.0, 1.0)) == 3.0
    assert hd95(with_voxels((0, 0, 0)), with_voxels((2, 3, 4)), (2.0, 4.0, 3.0)) == math.sqrt(4**2 + 12**2 + 12**2)


# prediction: voxels at 0 and 10 mm, reference: the one at 0; distances 0 and 10 one way, 0 the other
TWO, ONE = with_voxels((0, 0, 0), (0, 0, 10)), with_voxels((0, 0, 0))


def test_hd95_pools_both_directions():
    # 95 % of the way through (0, 0, 10) is 0.9 of the way from the second to the third
    assert hd95(TWO, ONE, UNIT) == pytest.approx(9.0)


def test_nsd_pools_both_surfaces():
    assert nsd(TWO, ONE, UNIT) == 2 / 3
    assert nsd(TWO, ONE, UNIT, 10.0) == 1


def test_a_distance_equal_to_the_tolerance_is_within():
    # 3 * 0.1 is a little more than 0.3
    for start in range(10):
        prediction, reference = with_voxels((0, 0, start)), with_voxels((0, 0, start + 3))
        assert nsd(prediction, reference, (0.1, 0.1, 0.1), 0.3) == 1
        assert nsd(prediction, reference, (0.1, 0.1, 0.1), 0.3 - 1e-6) == 0


def test_the_surface_of_a_cube_is_its_shell():
    cube = np.ones((5, 5, 5), dtype=bool)
    assert surface(cube).sum() == 5**3 - 3**3
    assert len(surface_distances(cube, cube, UNIT).prediction) == 98


def test_a_slice_has_a_contour_whichever_axis_is_the_single_one():
    square = np.zeros((9, 9), dtype=bool)
    square[2:7, 2:7] = True
    hole = square.copy()
    hole[4, 4] = False
    expected = surface_distances(hole, square, (2.0, 3.0))
    assert len(expected.reference) == 16
    # the voxels around the hole are one step inside the contour
    assert sorted(expected.prediction[expected.prediction > 0]) == [2.0, 2.0, 3.0, 3.0]
    for axis in range(3):
        spacing = np.insert([2.0, 3.0], axis, 999.0)
        found = surface_distances(np.expand_dims(hole, axis), np.expand_dims(square, axis), spacing)
        assert np.array_equal(found.prediction, expected.prediction)
        assert np.array_equal(found.reference, expected.reference)


def test_an_image_of_one_voxel_has_a_surface():
    voxel = np.ones((1, 1, 1), dtype=bool)
    assert hd95(voxel, voxel, UNIT) == 0


# ---- against medpy and scipy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("density", [0.02, 0.3, 0.9])
def test_hd95_equals_medpy_on_noise(spacing, density):
    rng = np.random.default_rng(int(100 * density))
    for _ in range(4):
        prediction, reference = rng.random((2, 12, 9, 15)) < density
        expected = medpy.metric.binary.hd95(prediction, reference, spacing)
        assert hd95(prediction, reference, spacing) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        (ball((20, 20, 18), 9), ball((22, 20, 17), 10)),
        (ball((5, 6, 7), 4), ball((33, 36, 30), 3)),
        (ball((20, 20, 18), 9) & ~ball((20, 20, 18), 7), ball((20, 20, 18), 8)),
        (blobs(0), blobs(1)),
        (blobs(2) | ball((0, 0, 0), 3), blobs(2)),
    ],
    ids=["close", "far apart", "rim", "many lesions", "false lesion in the corner"],
)
def test_hd95_equals_medpy_on_shapes(prediction, reference, spacing):
    expected = medpy.metric.binary.hd95(prediction, reference, spacing)
    assert hd95(prediction, reference, spacing) == pytest.approx(expected, abs=1e-9)


def test_hd95_equals_medpy_in_two_dimensions():
    prediction, reference = blobs(0)[20], blobs(1)[20]
    expected = medpy.metric.binary.hd95(prediction, reference, (0.7, 2.0))
    assert hd95(prediction, reference, (0.7, 2.0)) == pytest.approx(expected, abs=1e-9)


def test_the_surface_is_what_erosion_takes_away():
    for mask in (blobs(3), blobs(4)[10], np.random.default_rng(0).random((6, 7, 8)) < 0.8):
        assert np.array_equal(surface(mask), mask ^ ndimage.binary_erosion(mask))


def test_views_with_any_memory_layout_give_the_same():
    prediction, reference = ball((20, 20, 18), 9), ball((22, 20, 17), 10)
    expected = hd95(prediction, reference, (1.0, 2.0, 3.0))
    assert hd95(np.asfortranarray(prediction), reference, (1.0, 2.0, 3.0)) == expected
    assert hd95(prediction[::-1], reference[::-1], (1.0, 2.0, 3.0)) == pytest.approx(expected, abs=1e-9)


# ---- properties ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(small_masks, small_masks, spacings)
def test_hd95_symmetries(prediction, reference, spacing):
    value = hd95(prediction, reference, spacing)
    assert hd95(reference, prediction, spacing) == pytest.approx(value)
    assert hd95(prediction, reference, tuple(2 * step for step in spacing)) == pytest.approx(2 * value)
    turned = hd95(prediction.transpose(2, 0, 1), reference.transpose(2, 0, 1), (spacing[2], spacing[0], spacing[1]))
    assert turned == pytest.approx(value)


@settings(max_examples=60, deadline=None)
@given(small_masks, small_masks, spacings)
def test_hd95_does_not_change_with_air_around_the_image(prediction, reference, spacing):
    assume(prediction.any() and reference.any())
    padded = [np.pad(mask, ((2, 1), (0, 3), (1, 1))) for mask in (prediction, reference)]
    assert hd95(*padded, spacing) == pytest.approx(hd95(prediction, reference, spacing))


@settings(max_examples=60, deadline=None)
@given(small_masks, small_masks, spacings, st.floats(0, 8), st.floats(0, 8))
def test_a_larger_tolerance_never_lowers_nsd(prediction, reference, spacing, first, second):
    low, high = sorted((first, second))
    values = [nsd(prediction, reference, spacing, tolerance) for tolerance in (low, high)]
    assert 0 <= values[0] <= values[1] <= 1


@settings(max_examples=40, deadline=None)
@given(small_masks)
def test_equal_masks_have_no_distance(mask):
    assert hd95(mask, mask, UNIT) == 0
    assert nsd(mask, mask, UNIT, 0.0) == 1
