"""Metrics of a segmentation, with numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.evaluation.scoring import Rules, rules_of
from nnunetv2_mstkd.metrics.conventions import METRICS

REGIONS = {"whole": (1, 2), "core": (1,)}


def rules(**options) -> Rules:
    return Rules(REGIONS, (0, 1, 2), **options)


def pair() -> tuple[np.ndarray, np.ndarray]:
    """Reference: 4 voxels of 2 and 2 of 1; prediction: one voxel of 1 is called 2, one of 2 is missed."""
    reference = np.zeros((3, 4, 5), np.uint8)
    reference[1, 1, :4] = 2
    reference[1, 2, :2] = 1
    prediction = reference.copy()
    prediction[1, 2, 0] = 2
    prediction[1, 1, 3] = 0
    return prediction, reference


def test_regions_join_their_labels():
    scores = rules(metrics=("dice",)).score(*pair(), (1.0, 1.0, 1.0))
    assert scores == {"whole": {"dice": 2 * 5 / 11}, "core": {"dice": 2 / 3}}


def test_surface_metrics_come_with_the_others():
    names = ("dice", "hd95", "sensitivity", "precision", "volume_error_ml", "relative_volume_error", "nsd")
    scores = rules(metrics=names).score(*pair(), (2.0, 3.0, 4.0))
    assert tuple(scores["core"]) == names
    assert scores["core"]["sensitivity"] == 0.5 and scores["core"]["precision"] == 1
    assert scores["core"]["volume_error_ml"] == -24 / 1000 and scores["core"]["relative_volume_error"] == -0.5
    # distances 0 and 0 | 4: the 95th percentile of (0, 0, 4) lies 0.9 of the way from the second to the third
    assert math.isclose(scores["core"]["hd95"], 3.6)
    assert math.isclose(scores["core"]["nsd"], 2 / 3)


def test_overlap_is_the_same_with_and_without_surfaces():
    names = ("dice", "sensitivity", "precision", "volume_error_ml", "relative_volume_error")
    alone = rules(metrics=names).score(*pair(), (2.0, 3.0, 4.0))
    together = rules(metrics=(*names, "hd95")).score(*pair(), (2.0, 3.0, 4.0))
    assert {region: {name: together[region][name] for name in names} for region in REGIONS} == alone


def test_every_metric_can_be_asked_for():
    scores = rules(metrics=tuple(METRICS), lesion_convention="brats2023_gli").score(*pair(), (1.0, 1.0, 1.0))
    assert all(set(of_region) == set(METRICS) for of_region in scores.values())


def test_small_regions_are_also_scored_as_not_found():
    prediction, reference = pair()  # core: one of two voxels is found
    small = rules(metrics=("dice", "iou", "hd95"), min_voxels={"core": 2}).score(prediction, reference, (1.0,) * 3)
    assert list(small) == ["whole", "core", "core (min 2)"]
    assert small["core"]["dice"] == 2 / 3 and small["core"]["iou"] == 1 / 2
    diagonal = math.sqrt(3**2 + 4**2 + 5**2)
    assert small["core (min 2)"] == {"dice": 0, "iou": 0, "hd95": diagonal}
    large = rules(metrics=("dice",), min_voxels={"core": 1}).score(prediction, reference, (1.0,) * 3)
    assert large["core (min 1)"] == large["core"] and large["whole"]["dice"] == small["whole"]["dice"]
    reference[reference == 1] = 2  # no core at all: deleting the false voxel makes the case perfect
    right = rules(metrics=("dice",), min_voxels={"core": 2}).score(prediction, reference, (1.0,) * 3)
    assert (right["core"]["dice"], right["core (min 2)"]["dice"]) == (0, 1)


def test_the_enhancing_tumor_is_known_by_other_names():
    content = tiny.dataset_json(labels={"background": 0, "edema": 1, "Enhancing tumor": 2})
    found = rules_of(content, LabelManager(content["labels"], None), min_voxels={"ET": 5, "edema": 3})
    assert found.min_voxels == {"Enhancing tumor": 5, "edema": 3}


def test_lesions_of_small_regions_are_not_found_either():
    prediction, reference = np.zeros((2, 20, 20, 20), np.uint8)
    reference[2:8, 2:8, 2:8] = 1
    prediction[2:4, 2:8, 2:8] = 1
    scored = rules(metrics=("lesion_dice",), lesion_convention="brats2023_gli", min_voxels={"core": 100})
    found = scored.score(prediction, reference, (1.0, 1.0, 1.0))
    assert found["core"]["lesion_dice"] == pytest.approx(0.5) and found["core (min 100)"]["lesion_dice"] == 0


@pytest.mark.parametrize(("sizes", "what"), [({"ET": 500}, "no region ET"), ({"core": 0}, "at least 1 voxel")])
def test_impossible_minimum_sizes_are_refused(sizes, what):
    with pytest.raises(InputError, match=what):
        rules(min_voxels=sizes)


def test_ignored_voxels_do_not_count():
    prediction, reference = pair()
    reference[1, 2, 0] = reference[1, 1, 3] = 3  # both errors
    prediction[0, 0, 0], reference[0, 0, 0] = 1, 3
    ignoring = Rules(REGIONS, (0, 1, 2, 3), ignore_label=3, metrics=("dice", "hd95"))
    perfect = {"dice": 1.0, "hd95": 0.0}
    assert ignoring.score(prediction, reference, (1.0, 1.0, 1.0)) == {"whole": perfect, "core": perfect}


def test_the_convention_decides_about_empty_masks():
    empty = np.zeros((2, 2, 2), np.uint8)
    assert rules(metrics=("dice",)).score(empty, empty, (1, 1, 1))["core"]["dice"] == 1
    assert math.isnan(rules(metrics=("dice",), convention="nnunet").score(empty, empty, (1, 1, 1))["core"]["dice"])


def test_a_single_slice_is_measured_in_its_plane():
    """Its pseudo-spacing, 999 in nnU-Net's readers of 2-D images, must not count."""
    prediction, reference = (image[1:2] for image in pair())
    flat = rules(metrics=("dice", "hd95")).score(prediction, reference, (999.0, 3.0, 4.0))
    assert flat == rules(metrics=("dice", "hd95")).score(prediction[0], reference[0], (3.0, 4.0))
    empty = rules(metrics=("hd95",)).score(np.zeros_like(reference), reference, (999.0, 3.0, 4.0))
    assert empty["core"]["hd95"] == math.hypot(4 * 3, 5 * 4)
    point = np.ones((1, 1, 1), np.uint8)
    assert rules(metrics=("dice",)).score(point, point, (999.0, 1.0, 1.0))["core"]["dice"] == 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_thickness_of_a_single_slice_counts_in_volumes_only(axis):
    names = ("dice", "hd95", "volume_error_ml")
    prediction, reference = (np.moveaxis(image[1:2], 0, axis) for image in pair())
    thick, thin = (tuple(np.insert((0.5, 0.5), axis, thickness)) for thickness in (6.0, 1.0))
    scores = rules(metrics=names).score(prediction, reference, thick)["core"]
    assert scores["volume_error_ml"] == pytest.approx(-0.5 * 0.5 * 6 / 1000)
    assert scores["hd95"] == rules(metrics=names).score(prediction, reference, thin)["core"]["hd95"]


@pytest.mark.parametrize("spacing", [(999, 1.0, 1.0), (999 * 0.5, 0.5, 0.5), (999 * 3.0, 3.0, 2.0)])
def test_an_image_without_a_third_axis_has_a_thickness_of_one(spacing):
    scores = rules(metrics=("volume_error_ml",)).score(*(image[1:2] for image in pair()), spacing)
    assert scores["core"]["volume_error_ml"] == pytest.approx(-spacing[1] * spacing[2] / 1000)


def test_lesions_of_a_thick_slice_are_large_enough():
    prediction, reference = np.zeros((2, 1, 30, 30), np.uint8)
    reference[0, 5:10, 5:10] = 1  # 25 mm2, missed; up to 50 mm3 do not count
    scored = rules(metrics=("lesion_dice",), lesion_convention="brats2023_gli")
    assert scored.score(prediction, reference, (1.0, 1.0, 1.0))["core"]["lesion_dice"] == 1
    assert scored.score(prediction, reference, (5.0, 1.0, 1.0))["core"]["lesion_dice"] == 0


@pytest.mark.parametrize(
    ("labels", "regions", "known", "ignore"),
    [
        (tiny.LABELS, {"core": (1,), "edema": (2,)}, (0, 1, 2), None),
        (tiny.LABELS_WITH_IGNORE, {"core": (1,), "edema": (2,)}, (0, 1, 2, 3), 3),
        (tiny.REGIONS_WITH_IGNORE, {"whole": (1, 2), "core": (1,)}, (0, 1, 2, 3), 3),
    ],
)
def test_regions_are_those_of_the_data_set(labels, regions, known, ignore):
    content = tiny.dataset_json(labels=labels)
    found = rules_of(content, LabelManager(content["labels"], content.get("regions_class_order")), metrics=("dice",))
    assert (dict(found.regions), found.labels, found.ignore_label) == (regions, known, ignore)
