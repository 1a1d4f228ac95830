"""Phantom cases: reproducible, valid, and with the contrast of real images."""

from __future__ import annotations

import numpy as np
import pytest
from phantom_contrast import REFERENCE, TASKS, auc, contrast_table

from nnunetv2_mstkd.phantom import make_case
from nnunetv2_mstkd.phantom.anatomy import ANATOMIES, make_anatomy
from nnunetv2_mstkd.phantom.fields import Grid, smooth_noise
from nnunetv2_mstkd.phantom.intensities import soft_classes
from nnunetv2_mstkd.phantom.recipe import CLASSES, DEFAULT, RECIPES, get_recipe
from nnunetv2_mstkd.phantom.tumor import grow_tumor

COARSE = 5.0


def _needs(anatomy: str) -> str:
    if anatomy == "mni":
        pytest.importorskip("nilearn")
    return anatomy


@pytest.fixture(scope="module")
def cases():
    return [make_case(seed, spacing=COARSE) for seed in range(12)]


@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_cases_depend_on_the_seed_alone(anatomy):
    arguments = {"spacing": COARSE, "anatomy": _needs(anatomy)}
    first, again, other = make_case(7, **arguments), make_case(7, **arguments), make_case(8, **arguments)
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.label, again.label)
    assert (first.label != other.label).any()


def test_global_random_state_is_not_used():
    np.random.seed(0)
    first = make_case(3, spacing=COARSE)
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    np.testing.assert_array_equal(first.images, make_case(3, spacing=COARSE).images)
    np.testing.assert_array_equal(state, np.random.get_state()[1])


def test_array_types_and_order():
    case = make_case(0, spacing=6.0)
    # 164 x 196 x 160 mm of field of view in (z, y, x), whole voxels of 6 mm
    assert case.images.shape == (4, 27, 32, 26)
    assert case.label.shape == (27, 32, 26)
    assert case.images.dtype == np.int16
    assert case.label.dtype == np.uint8
    assert case.spacing == 6.0


@pytest.mark.parametrize("anatomy", ANATOMIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_modalities_share_one_brain_mask(anatomy, recipe):
    case = make_case(5, spacing=COARSE, recipe=recipe, anatomy=_needs(anatomy))
    brain = case.images[0] != 0
    for image in case.images:
        np.testing.assert_array_equal(image != 0, brain)
        assert image.min() == 0
    assert not case.label[~brain].any()
    assert 1000 < brain.sum() * COARSE**3 / 1000 < 2100, "a brain has between 1 and 2.1 liters"


def test_field_of_view_holds_the_brain(cases):
    for case in cases:
        # the brain stem may be cut at the bottom, z = 0
        brain = case.images[0] > 0
        faces = (brain[-1], brain[:, 0], brain[:, -1], brain[:, :, 0], brain[:, :, -1])
        assert sum(face.sum() for face in faces) <= 0.001 * brain.sum()


def test_regions_are_nested_and_within_the_volume_range(cases):
    for case in cases:
        assert set(np.unique(case.label)) <= {0, 1, 2, 3}
        volumes = case.volumes_ml()
        assert volumes["enhancing tumor"] <= volumes["tumor core"] < volumes["whole tumor"]
        # filled holes and voxels that do not divide the volume move the limits a little
        assert 11 < volumes["whole tumor"] < 235
        assert 0.15 < volumes["tumor core"] / volumes["whole tumor"] < 0.58
        assert volumes["whole tumor"] == pytest.approx((case.label > 0).sum() * COARSE**3 / 1000)


def test_most_tumors_enhance(cases):
    absent = [case.volumes_ml()["enhancing tumor"] == 0 for case in cases]
    assert 1 <= sum(absent) <= 4
    never = [make_case(seed, spacing=6.0).label.max() for seed in range(20, 32)]
    assert never.count(3) >= 8


@pytest.mark.parametrize("spacing", [4.0, 6.0])
@pytest.mark.parametrize("recipe", RECIPES)
def test_coarse_voxels_still_show_all_regions(spacing, recipe):
    shown = [set(np.unique(make_case(seed, spacing=spacing, recipe=recipe).label)) for seed in range(10)]
    assert sum(labels == {0, 1, 2, 3} for labels in shown) >= 7


def test_one_seed_is_one_patient_at_all_spacings():
    for seed in range(4):
        fine, coarse = make_case(seed, spacing=3.0), make_case(seed, spacing=6.0)
        for region in ("whole tumor", "tumor core"):
            assert coarse.volumes_ml()[region] == pytest.approx(fine.volumes_ml()[region], rel=0.12)


def test_hard_recipe_only_thins_the_rim():
    default = [make_case(seed, spacing=3.0) for seed in range(5)]
    hard = [make_case(seed, spacing=3.0, recipe="hard") for seed in range(5)]
    for a, b in zip(default, hard, strict=True):
        np.testing.assert_array_equal(a.images[0] > 0, b.images[0] > 0)
        np.testing.assert_array_equal(a.label > 0, b.label > 0)
    enhancing = [sum(case.volumes_ml()["enhancing tumor"] for case in group) for group in (default, hard)]
    assert enhancing[1] < 0.8 * enhancing[0]


def test_smooth_noise_is_independent_of_the_voxel_size():
    fine_grid, coarse_grid = Grid(1.0), Grid(4.0)
    fine = smooth_noise(np.random.default_rng(1), fine_grid, 20.0)
    coarse = smooth_noise(np.random.default_rng(1), coarse_grid, 20.0)
    index = [(c - f[0]) / 1.0 for c, f in zip(coarse_grid.axes, fine_grid.axes, strict=True)]
    low = [np.floor(i).astype(int) for i in index]
    # the centers of the coarse grid lie on centers of the fine one or midway between two of them
    shifted = [np.where(i > b, b + 1, b) for i, b in zip(index, low, strict=True)]
    between = 0.5 * (fine[np.ix_(*low)] + fine[np.ix_(*shifted)])
    assert np.abs(between - coarse).max() < 0.05
    assert fine.mean() == pytest.approx(0, abs=0.15)
    assert fine.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("spacing", [2.0, 5.0])
@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_tissue_maps_sum_to_one_inside_the_brain(anatomy, spacing):
    brain = make_anatomy(_needs(anatomy), Grid(spacing), np.random.default_rng(0))
    total = brain.wm + brain.gm + brain.csf
    np.testing.assert_allclose(total[brain.brain], 1, atol=1e-5)
    assert not total[~brain.brain].any()
    for tissue, low, high in ((brain.wm, 0.3, 0.5), (brain.gm, 0.35, 0.55), (brain.csf, 0.1, 0.22)):
        assert tissue.min() >= 0
        assert low < tissue[brain.brain].mean() < high
    assert brain.ventricles.any()

    tumor = grow_tumor(brain, DEFAULT, np.random.default_rng(1))
    mixed = soft_classes(brain, tumor, DEFAULT)
    assert set(mixed) == set(CLASSES)
    assert all(part.min() >= 0 for part in mixed.values())
    np.testing.assert_allclose(sum(mixed.values())[brain.brain], 1, atol=1e-5)


def test_tumors_are_connected_and_in_the_cerebrum():
    from scipy import ndimage

    for seed in range(6):
        grid = Grid(COARSE)
        brain = make_anatomy("procedural", grid, np.random.default_rng(seed))
        label = grow_tumor(brain, DEFAULT, np.random.default_rng(seed)).label
        assert ndimage.label(label > 0)[1] == 1
        assert (brain.supratentorial & (label > 1)).sum() > 0.5 * (label > 1).sum()


def test_auc_counts_ties_half():
    # pairs: 3>1, 3>2, 3=3, 1=1, 1<2, 1<3 -> (2 + 0.5 + 0.5) / 6
    assert auc(np.array([3, 1]), np.array([1, 2, 3])) == 0.5
    assert auc(np.array([5]), np.array([0, 1])) == 1
    assert auc(np.array([0]), np.array([1, 1])) == 0
    assert np.isnan(auc(np.array([], int), np.array([1])))


def test_contrast_of_an_absent_region_is_nan(cases):
    without = next(case for case in cases if 3 not in case.label)
    assert np.isnan(contrast_table(without)["ET vs rest of brain"]).all()


@pytest.fixture(scope="module", params=ANATOMIES)
def default_tables(request):
    """Contrast of 40 cases at 4 mm: few cases at 2 mm would say less, as cases differ more than voxel sizes do."""
    anatomy = _needs(request.param)
    return anatomy, [contrast_table(make_case(seed, spacing=4.0, anatomy=anatomy)) for seed in range(40)]


def test_default_recipe_meets_the_contrast_table(default_tables):
    # the standard error of a mean over 40 cases is 0.005 to 0.03
    _, tables = default_tables
    for task in TASKS:
        measured = np.nanmean([table[task] for table in tables], axis=0)
        np.testing.assert_allclose(measured, REFERENCE[task], atol=0.08, rtol=0, err_msg=task)


def test_hard_recipe_hides_enhancement_on_t1ce(default_tables):
    anatomy, tables = default_tables
    default = np.nanmean([table["ET vs rest of brain"][1] for table in tables[:24]])
    made = [make_case(seed, spacing=4.0, anatomy=anatomy, recipe="hard") for seed in range(24)]
    hard = np.nanmean([contrast_table(case)["ET vs rest of brain"][1] for case in made])
    assert hard <= default - 0.02
    assert hard > 0.75, "T1ce has to stay the modality that shows the enhancing tumor"


def test_recipes_give_every_class_four_numbers():
    for recipe in RECIPES.values():
        for table in (recipe.means, recipe.texture, recipe.case_jitter):
            assert tuple(table) == CLASSES
            assert all(len(row) == 4 for row in table.values())


def test_recipes_print_their_settings():
    assert "rim_mm=(2.4, 6.4)" in repr(get_recipe("default"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spacing": 0}, "spacing must be between 1 and 6 mm, found 0"),
        ({"spacing": float("nan")}, "spacing must be between 1 and 6 mm, found nan"),
        ({"spacing": 6.5}, "spacing must be between 1 and 6 mm, found 6.5"),
        ({"recipe": "soft"}, "unknown phantom recipe 'soft'; known recipes: default, hard"),
        ({"anatomy": "mouse"}, "unknown phantom anatomy 'mouse'; known anatomies: procedural, mni"),
        ({"seed": -1}, "seed must not be negative, found -1"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        make_case(**{"seed": 0, **arguments})
    assert str(error.value) == message


def test_atlas_without_nilearn_names_the_remedy(monkeypatch):
    import sys

    from nnunetv2_mstkd.phantom import anatomy

    anatomy._load_atlas.cache_clear()
    monkeypatch.setitem(sys.modules, "nilearn", None)
    with pytest.raises(ValueError, match=r"needs nilearn, which is not installed\. Install it .*or use anatomy 'proc"):
        make_case(0, spacing=6.0, anatomy="mni")
