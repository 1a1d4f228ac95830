from __future__ import annotations

import numpy as np
import pytest

from nnunetv2_mstkd.metrics.postprocessing import relabel_small_region

# label 2: four voxels
SEGMENTATION = np.array([[0, 1, 1, 2], [2, 2, 2, 3]], dtype=np.uint8)


def test_a_region_at_the_threshold_is_kept():
    assert np.array_equal(relabel_small_region(SEGMENTATION, 2, 1, min_voxels=4), SEGMENTATION)


def test_the_threshold_may_be_a_volume():
    # 4 voxels of 0.3 mm x 0.7 mm are 0.84 mm2
    for threshold, kept in ((0.00084, True), (0.000841, False)):
        found = relabel_small_region(SEGMENTATION, 2, 0, min_ml=threshold, spacing=(0.3, 0.7))
        assert (found == 2).any() == kept


def test_a_small_class_takes_the_other_label():
    relabelled = relabel_small_region(SEGMENTATION, 2, 1, min_voxels=5)
    assert relabelled.tolist() == [[0, 1, 1, 1], [1, 1, 1, 3]]
    assert relabelled.dtype == SEGMENTATION.dtype


def test_several_labels_count_together():
    assert np.array_equal(relabel_small_region(SEGMENTATION, (2, 3), 0, min_voxels=5), SEGMENTATION)
    assert relabel_small_region(SEGMENTATION, (2, 3), 0, min_voxels=6).tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]


def test_what_was_given_is_never_changed():
    before = SEGMENTATION.copy()
    relabel_small_region(SEGMENTATION, 2, 0, min_voxels=99)
    relabel_small_region(SEGMENTATION, 2, 0, min_voxels=1)[0, 0] = 9
    assert np.array_equal(SEGMENTATION, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "threshold once"),
        ({"min_voxels": 5, "min_ml": 1.0}, "threshold once"),
        ({"min_ml": 1.0}, "needs the spacing"),
        ({"min_voxels": 0}, "threshold 0 is not positive"),
        ({"min_ml": -1.0, "spacing": (1.0, 1.0)}, "threshold -1.0 is not positive"),
        ({"min_ml": 1.0, "spacing": (1.0, 1.0, 1.0)}, "3 numbers, the masks have 2 axes"),
    ],
)
def test_an_unclear_threshold_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        relabel_small_region(SEGMENTATION, 2, 1, **arguments)


def test_a_replacement_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="replacement 2 is one of the labels"):
        relabel_small_region(SEGMENTATION, (2, 3), 2, min_voxels=5)
    with pytest.raises(ValueError, match="replacement 300 does not fit"):
        relabel_small_region(SEGMENTATION, 2, 300, min_voxels=5)
    with pytest.raises(ValueError, match="type float64, expected an array of integer labels"):
        relabel_small_region(SEGMENTATION.astype(float), 2, 1, min_voxels=5)
