from __future__ import annotations

import itertools
import math

import pytest
import torch

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.modalities import SubsetSampler

NAMES = ("T1", "T1ce", "T2", "FLAIR")


def dataset(*names: str) -> dict:
    return {"channel_names": {str(number): name for number, name in enumerate(names)}}


def chi_square(codes: torch.Tensor, expected: dict[int, float]) -> float:
    """Pearson's statistic of drawn subset codes against probabilities; infinite for a subset outside ``expected``."""
    counts = dict(zip(*(values.tolist() for values in codes.unique(return_counts=True)), strict=True))
    if set(counts) - set(expected):
        return math.inf
    return sum((counts.get(code, 0) - len(codes) * p) ** 2 / (len(codes) * p) for code, p in expected.items())


def codes_of(rows: torch.Tensor) -> torch.Tensor:
    return (rows.long() << torch.arange(rows.shape[1])).sum(1)


# ---- names ---------------------------------------------------------------------------------------------------------


def test_a_subset_is_named_by_its_modalities_in_channel_order():
    assert modalities.subset_name([False, True, False, True], NAMES) == "T1ce+FLAIR"
    assert modalities.subset_name(torch.tensor([True, False, False, False]), NAMES) == "T1"


def test_the_empty_subset_has_no_name():
    with pytest.raises(ValueError, match="at least one modality"):
        modalities.subset_name([False] * 4, NAMES)


def test_a_name_reads_back_to_its_subset_for_all_subsets():
    for row in modalities.all_subsets(4):
        assert torch.equal(modalities.parse_subset(modalities.subset_name(row, NAMES), NAMES), row)


@pytest.mark.parametrize("text", ["T1ce+FLAIR", "flair + T1CE", "FLAIR,T1ce", " t1ce , flair "])
def test_a_subset_is_read_in_any_order_case_and_separator(text):
    assert modalities.parse_subset(text, NAMES).tolist() == [False, True, False, True]


def test_all_stands_for_the_full_set():
    assert modalities.parse_subset("All", NAMES).tolist() == [True] * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("T1c", r"unknown modality 'T1c' in subset 'T1c' \(did you mean 'T1ce'\?\); known are T1, T1ce, T2, FLAIR"),
        ("T1+t1", "appears twice"),
        ("", "empty part"),
        ("T1++T2", "empty part"),
        ("T1+", "empty part"),
        ("T1+all", "unknown modality 'all'"),
    ],
)
def test_a_bad_subset_is_refused_with_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        modalities.parse_subset(text, NAMES)


def test_subset_list_refuses_duplicates_and_empty():
    rows = modalities.parse_subsets(["FLAIR", "T1+T2"], NAMES)
    assert rows.tolist() == [[False, False, False, True], [True, False, True, False]]
    with pytest.raises(ValueError, match=r"T1\+T2 appears twice"):
        modalities.parse_subsets(["T1+T2", "T2+T1"], NAMES)
    with pytest.raises(ValueError, match="list of subsets is empty"):
        modalities.parse_subsets([], NAMES)


def test_channel_names_come_in_channel_order_not_in_file_order():
    assert modalities.modality_names({"channel_names": {"1": "FLAIR", "0": "T1"}}) == ("T1", "FLAIR")
    assert modalities.modality_names({"modality": {0: "T1", 1: "T2"}}) == ("T1", "T2")


def test_ten_and_more_channels_are_ordered_by_number():
    names = [f"m{number}" for number in range(12)]
    assert modalities.modality_names(dataset(*names)) == tuple(names)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((" T1 ", "T1+c", "a,b"), ("T1", "T1_c", "a_b")),
        (("MRI", "MRI"), ("MRI_0", "MRI_1")),
        (("T1", "t1", "T2"), ("T1_0", "t1_1", "T2")),
        (("x", "x", "x_0"), ("x_0_", "x_1", "x_0")),
        (("", "all"), ("channel_0", "all_1")),
    ],
)
def test_names_become_usable_and_distinct(given, expected):
    assert modalities.modality_names(dataset(*given)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "channel_names None"),
        ({"channel_names": {}}, "channel_names {}"),
        ({"channel_names": ["T1", "T2"]}, "expected a name for each input channel"),
        ({"channel_names": {"1": "T1", "2": "T2"}}, r"keys 1, 2, expected the numbers 0 \.\.\. 1"),
        ({"channel_names": {"T1": 0, "T2": 1}}, "keys T1, T2, .*not name: number"),
    ],
)
def test_a_dataset_json_without_usable_channels_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        modalities.modality_names(content)


# ---- counts and normalisation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 17])
def test_number_of_modalities_is_limited(count):
    with pytest.raises(ValueError, match=str(count)):
        modalities.check_count(count)
    with pytest.raises(ValueError):
        modalities.all_subsets(count)
    with pytest.raises(ValueError):
        SubsetSampler(count)


@pytest.mark.parametrize("count", [2, 16])
def test_two_to_sixteen_modalities_are_accepted(count):
    modalities.check_count(count)


def test_a_normalisation_that_moves_zero_is_refused_by_channel():
    modalities.check_normalization(["ZScoreNormalization", "NoNormalization"])
    with pytest.raises(ValueError, match="channel 1 is normalised with CTNormalization"):
        modalities.check_normalization(["ZScoreNormalization", "CTNormalization"])


@pytest.mark.parametrize("scheme", modalities.ZERO_KEEPING_NORMALIZATIONS)
def test_the_accepted_normalisations_of_nnunet_keep_a_zero_image(scheme):
    import numpy as np
    from nnunetv2.preprocessing.normalization import default_normalization_schemes

    zeros, brain = np.zeros((2, 3, 3), np.float32), np.zeros((2, 3, 3))
    for use_mask in (False, True):
        run = getattr(default_normalization_schemes, scheme)(use_mask_for_norm=use_mask, intensityproperties={}).run
        assert not run(zeros.copy(), brain).any()


# ---- enumeration ---------------------------------------------------------------------------------------------------


def test_subsets_are_ordered_by_size_then_channel():
    expected = ["100", "010", "001", "110", "101", "011", "111"]
    assert ["".join(str(int(value)) for value in row) for row in modalities.all_subsets(3)] == expected


@pytest.mark.parametrize("count", [2, 4, 5, 7])
def test_the_order_is_that_of_combinations(count):
    members = [list(chosen) for size in range(1, count + 1) for chosen in itertools.combinations(range(count), size)]
    assert [row.nonzero().flatten().tolist() for row in modalities.all_subsets(count)] == members


def test_sixteen_modalities_have_65535_distinct_subsets():
    rows = modalities.all_subsets(16)
    assert rows.shape == (2**16 - 1, 16)
    assert len(codes_of(rows).unique()) == len(rows)
    assert rows[-1].all()
    assert torch.equal(rows[:16], torch.eye(16, dtype=torch.bool))


def test_the_code_of_a_subset_has_a_bit_per_channel():
    assert modalities.subset_code([True, False, True]) == 0b101
    assert [modalities.subset_code(row) for row in modalities.all_subsets(5)] == codes_of(
        modalities.all_subsets(5)
    ).tolist()


def test_validation_uses_all_subsets_up_to_four():
    for count in (2, 3, 4):
        assert torch.equal(modalities.validation_subsets(count), modalities.all_subsets(count))


@pytest.mark.parametrize("count", [5, 8, 16])
def test_validation_of_many_modalities_has_16_subsets(count):
    rows = modalities.validation_subsets(count)
    assert rows.shape == (16, count)
    assert len(codes_of(rows).unique()) == 16
    assert rows[0].all()
    singles = min(count, 15)
    assert torch.equal(rows[1 : 1 + singles], torch.eye(count, dtype=torch.bool)[:singles])
    assert rows.any(1).all()


def test_the_validation_subsets_depend_on_the_seed_only():
    assert torch.equal(modalities.validation_subsets(7), modalities.validation_subsets(7))
    assert not torch.equal(modalities.validation_subsets(7), modalities.validation_subsets(7, seed=1))


# ---- sampling ------------------------------------------------------------------------------------------------------

DRAWS = 20_000


def draw(sampler: SubsetSampler, seed: int = 0) -> torch.Tensor:
    rows = sampler.sample(DRAWS, generator=torch.Generator().manual_seed(seed))
    assert rows.shape == (DRAWS, sampler.num_modalities)
    assert rows.dtype == torch.bool
    assert rows.any(1).all()
    return codes_of(rows)


def test_the_uniform_sampler_draws_each_subset_equally_often():
    expected = {code: 1 / 15 for code in range(1, 16)}
    # 14 degrees of freedom: 36.1 is exceeded once in 1000 draws
    assert chi_square(draw(SubsetSampler(4)), expected) < 36.1


def test_size_sampler_draws_sizes_equally_often():
    sizes = {code: bin(code).count("1") for code in range(1, 16)}
    expected = {code: 1 / 4 / math.comb(4, size) for code, size in sizes.items()}
    codes = draw(SubsetSampler(4, "by_size"))
    assert chi_square(codes, expected) < 36.1
    # the two samplers differ, or the test above could not tell them apart
    assert chi_square(codes, {code: 1 / 15 for code in range(1, 16)}) > 1000


def test_weighted_sampler_draws_in_proportion():
    sampler = SubsetSampler(2, "weighted", ((True, False), (True, True)), (3.0, 1.0))
    # 1 degree of freedom
    assert chi_square(draw(sampler), {0b01: 0.75, 0b11: 0.25}) < 10.8


def test_fixed_sampler_draws_only_its_subsets():
    rows = ((True, False, False), (False, True, True), (True, True, True))
    # 2 degrees of freedom
    assert chi_square(draw(SubsetSampler(3, "fixed", rows)), {0b001: 1 / 3, 0b110: 1 / 3, 0b111: 1 / 3}) < 13.8


def test_independent_sampler_drops_each_modality_by_itself():
    drop = (0.4, 0.0, 1.0, 0.9)
    expected = {0b0010: 0.4 * 0.9, 0b0011: 0.6 * 0.9, 0b1010: 0.4 * 0.1, 0b1011: 0.6 * 0.1}
    # 3 degrees of freedom
    assert chi_square(draw(SubsetSampler(4, "independent", drop=drop)), expected) < 16.3
    # an empty draw is repeated: at one half each, all subsets are equally likely
    uniform = {code: 1 / 15 for code in range(1, 16)}
    assert chi_square(draw(SubsetSampler(4, "independent", drop=(0.5,) * 4)), uniform) < 36.1


@pytest.mark.parametrize(
    ("drop", "varies"),
    [((0, 0), False), ((0, 0.1), True), ((1, 0.1), False), ((0.1, 0.1), True), ((1, 0), False), ((0, 0.1, 1), True)],
)
def test_a_sampler_knows_whether_it_can_draw_two_subsets(drop, varies):
    sampler = SubsetSampler(len(drop), "independent", drop=drop)
    assert sampler.varies is varies
    assert (len(draw(sampler).unique()) > 1) is varies
    if not varies:
        with pytest.raises(ValueError, match="one subset"):
            sampler.sample_other(sampler.sample(2))


def test_each_sample_of_a_batch_gets_its_own_subset():
    rows = SubsetSampler(4).sample(64, generator=torch.Generator().manual_seed(0))
    assert len(codes_of(rows).unique()) > 10


@pytest.mark.parametrize("count", [2, 16])
def test_each_modality_is_kept_half_of_the_time(count):
    rows = SubsetSampler(count).sample(DRAWS, generator=torch.Generator().manual_seed(0))
    probability = 2 ** (count - 1) / (2**count - 1)
    deviation = 5 * math.sqrt(probability * (1 - probability) / DRAWS)
    assert (rows.double().mean(0) - probability).abs().max() < deviation
    assert rows.any(1).all()


@pytest.mark.parametrize(
    "sampler",
    [
        SubsetSampler(5),
        SubsetSampler(5, "by_size"),
        SubsetSampler(2, "fixed", ((True, False), (False, True))),
        SubsetSampler(2, "weighted", ((True, False), (False, True)), (1.0, 2.0)),
        SubsetSampler(3, "independent", drop=(0.2, 0.4, 0.6)),
    ],
    ids=lambda sampler: sampler.kind,
)
def test_equal_generators_draw_equal_subsets(sampler):
    assert torch.equal(draw(sampler, seed=3), draw(sampler, seed=3))
    assert not torch.equal(draw(sampler, seed=3), draw(sampler, seed=4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "independent", "drop": (1.0, 1.0)}, "at least one must be available"),
        ({"kind": "weighted", "subsets": ((True, False),), "weights": (0.0,)}, "positive and finite"),
        ({"kind": "weighted", "subsets": ((True, False),), "weights": (math.nan,)}, "positive and finite"),
        ({"kind": "weighted", "subsets": ((True, False),), "weights": (math.inf,)}, "positive and finite"),
    ],
)
def test_an_impossible_sampler_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SubsetSampler(2, **arguments)


# ---- masking -------------------------------------------------------------------------------------------------------

SHAPES = [(3, 4, 5, 6), (3, 4, 5, 6, 2)]
AVAILABILITY = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_masking_zeroes_absent_channels_only(shape):
    batch = torch.randn(shape)
    masked = modalities.mask_modalities(batch, AVAILABILITY.clone())
    assert masked.dtype == batch.dtype
    assert torch.equal(masked[AVAILABILITY], batch[AVAILABILITY])
    assert torch.equal(masked[~AVAILABILITY], torch.zeros_like(batch[~AVAILABILITY]))


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_nothing_of_an_absent_channel_leaks(shape, poison):
    batch = torch.randn(shape)
    poisoned = batch.clone()
    poisoned[~AVAILABILITY] = poison
    assert torch.equal(
        modalities.mask_modalities(poisoned, AVAILABILITY.clone()),
        modalities.mask_modalities(batch, AVAILABILITY.clone()),
    )


def test_no_gradient_reaches_an_absent_channel_of_nan():
    batch = torch.randn(3, 4, 5, 6)
    batch[~AVAILABILITY] = math.nan
    batch.requires_grad_()
    modalities.mask_modalities(batch, AVAILABILITY.clone()).square().sum().backward()
    assert not batch.grad[~AVAILABILITY].any()
    assert torch.equal(batch.grad[AVAILABILITY], 2 * batch.detach()[AVAILABILITY])


def test_full_set_masks_nothing():
    batch = torch.randn(2, 3, 4, 4)
    before = batch.clone()
    assert torch.equal(modalities.mask_modalities(batch, torch.ones(2, 3, dtype=torch.bool)), before)
    availability = torch.tensor([[True, False, False]] * 2)
    modalities.mask_modalities(batch, availability)
    assert torch.equal(batch, before)
    assert availability.tolist() == [[True, False, False]] * 2


def test_half_precision_stays_half_precision():
    batch = torch.randn(3, 4, 5, 6, dtype=torch.float16)
    assert modalities.mask_modalities(batch, AVAILABILITY.clone()).dtype == torch.float16


def test_bad_availability_is_refused():
    batch = torch.randn(2, 4, 3, 3)
    with pytest.raises(ValueError, match=r"shape \(2, 3\), expected \(2, 4\)"):
        modalities.mask_modalities(batch, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="keeps no modality"):
        modalities.mask_modalities(batch, torch.tensor([[True] * 4, [False] * 4]))


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_all_zero_channels_are_absent(shape):
    masked = modalities.mask_modalities(torch.randn(shape), AVAILABILITY.clone())
    assert torch.equal(modalities.known_availability(masked), AVAILABILITY)


def test_one_voxel_that_is_not_zero_makes_a_channel_available():
    batch = torch.zeros(1, 3, 4, 4)
    batch[0, 1, 3, 3] = -1e-30
    batch[0, 2] = -0.0
    assert modalities.known_availability(batch).tolist() == [[False, True, False]]


def test_all_zero_sample_counts_as_complete():
    batch = torch.zeros(2, 3, 4, 4)
    batch[1, 0] = 1
    assert modalities.known_availability(batch).tolist() == [[True] * 3, [True, False, False]]


def test_given_availability_wins_over_detection():
    batch = torch.zeros(2, 3, 4, 4)
    batch[:, 0] = 1
    said = torch.tensor([[True, True, False], [False, False, True]])
    assert torch.equal(modalities.known_availability(batch, said), said)
    assert modalities.known_availability(batch).tolist() == [[True, False, False]] * 2


@pytest.mark.parametrize("said", [None, [[True, False, False]], [[True, False, False], [False, True, False]]])
def test_empty_patch_counts_as_complete(said):
    batch = torch.zeros(2, 3, 4, 4)
    batch[0, 0] = 1
    said = None if said is None else torch.tensor(said)
    assert modalities.known_availability(batch, said).tolist() == [[True, False, False], [True] * 3]


def test_one_row_holds_for_the_whole_batch():
    batch = torch.ones(3, 2, 4, 4, 4)
    assert modalities.known_availability(batch, torch.tensor([[False, True]])).tolist() == [[False, True]] * 3


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d"])
def test_saying_it_and_finding_it_in_zero_filled_input_agree(shape):
    masked = modalities.mask_modalities(torch.randn(shape), AVAILABILITY.clone())
    assert torch.equal(modalities.known_availability(masked), modalities.known_availability(masked, AVAILABILITY))


@pytest.mark.parametrize("shape", [(3, 2), (1, 3), (2,), (0, 2)])
def test_a_known_availability_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(2, 2\) or \(1, 2\)"):
        modalities.known_availability(torch.ones(2, 2, 4, 4), torch.ones(shape, dtype=torch.bool))
