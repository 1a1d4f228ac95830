from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_mstkd.evaluation.results import COLUMNS
from nnunetv2_mstkd.statistics import findings
from nnunetv2_mstkd.statistics import significance as s
from nnunetv2_mstkd.statistics.bootstrap import Bootstrap, cube
from nnunetv2_mstkd.statistics.components import LargestComponent
from nnunetv2_mstkd.statistics.plausibility import plausibility_warnings
from nnunetv2_mstkd.statistics.shapley import shapley, shapley_matrix
from nnunetv2_mstkd.statistics.trainings import widen

NAN = math.nan
QUICK = {"bootstrap": Bootstrap(samples=200)}


def table(values: dict[tuple[str, str, str], list[float]], metric: str = "dice") -> pd.DataFrame:
    """Results from {(model, subset, region): value of each case}."""
    rows = [
        (model, "MSTKDTrainer", 0, f"case{number}", subset, subset.count("+") + 1, region, metric, value)
        for (model, subset, region), of_case in values.items()
        for number, value in enumerate(of_case)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def row(found: pd.DataFrame, **where) -> pd.Series:
    """The only row with these entries."""
    for column, value in where.items():
        found = found[found[column] == value]
    assert len(found) == 1
    return found.iloc[0]


# ---- Shapley values ------------------------------------------------------------------------------------------------


def shapley_of(players: str, values: dict[str, float], nothing: float = 0.0) -> dict[str, float]:
    """Shapley values of a game given as ``{"A": 0.3, "AB": 0.6, ...}``."""
    ordered = [
        values["".join(name for i, name in enumerate(players) if code >> i & 1)] if code else nothing
        for code in range(2 ** len(players))
    ]
    return dict(zip(players, (shapley_matrix(len(players)) @ ordered).tolist(), strict=True))


def test_shapley_values_of_two_players():
    # A is first half of the time: (0.6 + (0.8 - 0.4)) / 2, B gets the rest
    assert shapley_of("AB", {"A": 0.6, "B": 0.4, "AB": 0.8}) == pytest.approx({"A": 0.5, "B": 0.3})


def test_shapley_values_of_three_players():
    expected = {
        "A": 0.3 / 3 + (0.6 - 0.2) / 6 + (0.4 - 0.0) / 6 + (0.9 - 0.2) / 3,
        "B": 0.2 / 3 + (0.6 - 0.3) / 6 + (0.2 - 0.0) / 6 + (0.9 - 0.4) / 3,
        "C": 0.0 / 3 + (0.4 - 0.3) / 6 + (0.2 - 0.2) / 6 + (0.9 - 0.6) / 3,
    }
    assert expected == pytest.approx({"A": 28 / 60, "B": 19 / 60, "C": 7 / 60})
    three = {"A": 0.3, "B": 0.2, "C": 0.0, "AB": 0.6, "AC": 0.4, "BC": 0.2, "ABC": 0.9}
    assert shapley_of("ABC", three) == pytest.approx(expected)


games = st.integers(1, 4).flatmap(
    lambda n: st.tuples(st.just("ABCD"[:n]), st.lists(st.floats(-10, 10), min_size=2**n, max_size=2**n))
)


@settings(max_examples=60, deadline=None)
@given(games)
def test_shapley_values_are_the_mean_gain_over_all_orders(drawn):
    players, values = drawn
    game = {
        frozenset(name for i, name in enumerate(players) if code >> i & 1): value for code, value in enumerate(values)
    }
    gains = {name: 0.0 for name in players}
    for order in itertools.permutations(players):
        for place, name in enumerate(order):
            gains[name] += game[frozenset(order[: place + 1])] - game[frozenset(order[:place])]
    expected = {name: gain / math.factorial(len(players)) for name, gain in gains.items()}
    found = shapley_of(players, {"".join(sorted(members)): value for members, value in game.items()}, values[0])
    assert found == pytest.approx(expected, abs=1e-9)
    # efficiency: the values add up to the gain of all players
    assert sum(found.values()) == pytest.approx(values[-1] - values[0], abs=1e-9)


def test_symmetric_and_dummy_players():
    # A and B can replace each other; C adds 0.1 to everything
    strength = {"": 0.0, "A": 0.5, "B": 0.5, "AB": 0.7}
    found = shapley_of("ABC", strength | {f"{members}C": value + 0.1 for members, value in strength.items()})
    assert found["A"] == pytest.approx(found["B"]) == pytest.approx(0.35)
    assert found["C"] == pytest.approx(0.1)


def test_the_matrix_adds_up_for_every_number_of_players():
    for number in range(1, 7):
        matrix = shapley_matrix(number)
        assert matrix.shape == (number, 2**number)
        expected = np.zeros(2**number)
        expected[0], expected[-1] = -1, 1
        assert matrix.sum(axis=0) == pytest.approx(expected)


# two modalities, two cases; ET of model M: T1 0.2 and 0.4, T1ce 0.6 and 0.8, both 0.8 and 1.0
TWO = {
    ("M", "T1", "ET"): [0.2, 0.4],
    ("M", "T1ce", "ET"): [0.6, 0.8],
    ("M", "T1+T1ce", "ET"): [0.8, 1.0],
}


def test_shapley_values_of_results_are_those_of_the_mean():
    found = shapley(table(TWO), **QUICK)
    assert found[["model", "region", "modality"]].values.tolist() == [["M", "ET", "T1"], ["M", "ET", "T1ce"]]
    # means 0.3, 0.7, 0.9
    assert found["value"].tolist() == pytest.approx([(0.3 + 0.2) / 2, (0.7 + 0.6) / 2])
    # the cases' own values, 0.2 0.6 and 0.3 0.7, are what two patients can be resampled to at most
    assert found["low"].tolist() == pytest.approx([0.2, 0.6]) and found["high"].tolist() == pytest.approx([0.3, 0.7])


def test_an_empty_segmentation_is_right_where_there_is_nothing_to_find():
    """Half of the cases lack ET, and the model never finds any: no modality contributes anything."""
    never = {("M", subset, "ET"): [1.0, 0.0, 1.0, 0.0] for subset in ("T1", "T1ce", "T1+T1ce")}
    lacking = {("case0", "ET"): 1.0, ("case2", "ET"): 1.0}
    found = shapley(table(never), lacking, **QUICK)
    assert found[["value", "low", "high"]].to_numpy() == pytest.approx(np.zeros((2, 3)))
    # left out by the other convention: the cases that have ET decide
    both = {**TWO, ("M", "T1", "ET"): [0.2, 0.4, np.nan], ("M", "T1ce", "ET"): [0.6, 0.8, np.nan]}
    both["M", "T1+T1ce", "ET"] = [0.8, 1.0, np.nan]
    found = shapley(table(both), {("case2", "ET"): np.nan}, **QUICK)
    assert found["value"].tolist() == pytest.approx([0.25, 0.65])


def test_shapley_needs_all_subsets():
    lacking = {key: value for key, value in TWO.items() if key[1] != "T1"}
    with pytest.raises(ValueError, match="need all 3 subsets; the results lack T1"):
        shapley(table(lacking))


def test_seven_modalities_are_refused():
    with pytest.raises(ValueError, match="found 7"):
        shapley(table({("M", "A+B+C+D+E+F+G", "ET"): [0.5]}))


# ---- resampling ----------------------------------------------------------------------------------------------------


def test_time_points_of_a_patient_stay_together():
    values = np.random.default_rng(0).random((12, 2))
    once = Bootstrap(samples=300, seed=1).means(values, np.arange(12))
    # every case twice, as two time points: the same patients are drawn, so the same means come out
    twice = Bootstrap(samples=300, seed=1).means(np.repeat(values, 2, axis=0), np.repeat(np.arange(12), 2))
    assert twice == pytest.approx(once)
    # counted as 24 patients they would seem to know more than 12
    apart = Bootstrap(samples=300, seed=1).means(np.repeat(values, 2, axis=0), np.arange(24))
    assert (apart.std(axis=0) < 0.85 * once.std(axis=0)).all()


def test_resampled_means_spread_like_the_standard_error():
    values = np.random.default_rng(0).normal(size=(40, 1))
    spread = Bootstrap(samples=4000).means(values, np.arange(40)).std()
    assert spread == pytest.approx(values.std() / math.sqrt(40), rel=0.05)


def test_missing_values_are_left_out_of_resampled_means():
    values = np.array([[1.0, NAN], [1.0, 2.0], [NAN, 2.0]])
    means = Bootstrap(samples=200).means(values, np.arange(3))
    # a resample in which only the case without a value was drawn has none
    assert np.isnan(means).any() and np.isin(means[~np.isnan(means)], [1.0, 2.0]).all()
    assert (np.nanmax(means, axis=0) == [1.0, 2.0]).all()


def test_the_seed_decides():
    values = np.random.default_rng(0).random((10, 1))
    first, again, other = (Bootstrap(samples=50, seed=seed).means(values, np.arange(10)) for seed in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_an_interval_is_made_of_percentiles():
    resampled = np.arange(101.0)[:, None]
    limits = Bootstrap(level=0.9).limits
    assert np.ravel(limits(resampled, np.arange(5))) == pytest.approx([5, 95])
    low, high = limits(np.tile(resampled, 2), np.arange(5), np.array([0.9, 0.5]))
    assert low == pytest.approx([5, 25]) and high == pytest.approx([95, 75])
    assert np.isnan(limits(resampled, np.zeros(5, dtype=int))).all()
    with pytest.raises(ValueError, match="does not lie between 0 and 1"):
        limits(resampled, np.arange(5), 95)
    with pytest.raises(ValueError, match="expected at least 1"):
        Bootstrap(samples=0)


def test_patients_are_numbered_and_a_missing_one_is_refused():
    assert Bootstrap().groups(["a", "b", "c"]).tolist() == [0, 1, 2]
    assert Bootstrap({"a": "P2", "b": "P1", "c": "P2"}).groups(["a", "b", "c"]).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="no patient is given for case b"):
        Bootstrap({"a": "P"}).groups(["a", "b"])


# ---- arranging -----------------------------------------------------------------------------------------------------


def test_values_are_arranged_whatever_the_order_of_rows():
    frame = table(TWO | {("M", subset, "WT"): [0.5, 0.6] for subset in ("T1", "T1ce", "T1+T1ce")})
    data = cube(frame.sample(frac=1, random_state=0).sort_values("region", ascending=False), "dice")
    assert data.subsets == ("T1", "T1ce", "T1+T1ce") and data.cases == ("case0", "case1")
    assert data.values[0, :, :, 1].tolist() == [[0.2, 0.6, 0.8], [0.4, 0.8, 1.0]]
    assert data.full == 2 and data.sizes.tolist() == [1, 1, 2]


def test_folds_of_one_case_are_averaged():
    first, second = table(TWO), table(TWO)
    second["fold"] = 1
    second["value"] = 0.0
    assert cube(pd.concat([first, second]), "dice").values == pytest.approx(cube(first, "dice").values / 2)


def test_means_of_subsets_count_a_case_of_several_folds_once():
    first, again = table({("m", "A", "WT"): [0.2, 0.8]}), table({("m", "A", "WT"): [0.6]})
    found = findings.Findings(pd.concat([first, again.assign(fold=1)]))
    assert found.by_subset["value"].tolist() == pytest.approx([0.6])  # 0.4 and 0.8
    assert row(found.summary, region="WT")["value"] == pytest.approx(0.6)


def test_an_incomplete_table_is_refused_with_what_is_missing():
    frame = table(TWO)
    with pytest.raises(ValueError, match=r"no dice of model M, case case1, subset T1\+T1ce, region ET; models"):
        cube(frame[:-1], "dice")
    with pytest.raises(ValueError, match="no values of hd95; they have dice"):
        cube(frame, "hd95")
    with pytest.raises(ValueError, match="no model N; they have M"):
        cube(frame, "dice", models=["N"])
    with pytest.raises(ValueError, match=r"no values of the full input A\+B"):
        _ = cube(table({("M", "A", "ET"): [0.1], ("M", "B", "ET"): [0.1]}), "dice").full


# ---- one model -----------------------------------------------------------------------------------------------------


def test_summary_of_a_worked_example():
    frame = table(TWO | {("M", subset, "WT"): [1.0, 0.8] for subset in ("T1", "T1ce", "T1+T1ce")})
    found = findings.summary(frame, **QUICK)
    assert found["region"].tolist() == ["ET", "WT", "average"]
    enhancing = row(found, region="ET")
    # case means 1.6 / 3 and 2.2 / 3
    assert enhancing["value"] == pytest.approx(1.9 / 3)
    assert (enhancing["worst_subset"], enhancing["worst"]) == ("T1", pytest.approx(0.3))
    assert (enhancing["low"], enhancing["high"]) == pytest.approx((1.6 / 3, 2.2 / 3))
    assert row(found, region="average")["value"] == pytest.approx((1.9 / 3 + 0.9) / 2)


def test_a_region_that_some_cases_lack_counts_as_much_as_the_others():
    """As in nnU-Net, and in the tables: the mean of the regions' means, not that of the cases' means."""
    values = {}
    for subset in ("T1", "T1ce", "T1+T1ce"):
        values |= {("M", subset, "WT"): [0.6, 0.6, 0.6, 0.6], ("M", subset, "ET"): [0.8, np.nan, np.nan, np.nan]}
    for found in (findings.summary(table(values), **QUICK), findings.mean_by_count(table(values), **QUICK)):
        for region, value in {"WT": 0.6, "ET": 0.8, "average": 0.7}.items():
            assert found[found["region"] == region]["value"].tolist() == pytest.approx(
                [value] * (found["region"] == region).sum()
            )
    assert row(findings.summary(table(values), **QUICK), region="average")["worst"] == pytest.approx(0.7)


def test_mean_by_count_is_over_all_subsets_of_a_size():
    found = findings.mean_by_count(table(TWO), **QUICK)
    assert found["modalities"].tolist() == [1, 2]
    assert found["value"].tolist() == pytest.approx([(0.2 + 0.6 + 0.4 + 0.8) / 4, 0.9])


def test_a_positive_gap_is_a_loss():
    found = findings.gap_to_full(table(TWO), **QUICK)
    assert found["subset"].tolist() == ["T1", "T1ce"]
    assert found["value"].tolist() == pytest.approx([0.6, 0.2])
    assert found[["low", "high"]].to_numpy() == pytest.approx(np.array([[0.6, 0.6], [0.2, 0.2]]))
    values = {("M", "T1", "ET"): [0.3], ("M", "T1ce", "ET"): [0.75], ("M", "T1+T1ce", "ET"): [0.5]}
    assert findings.gap_to_full(table(values))["value"].tolist() == pytest.approx([0.2, -0.25])


# ---- comparisons ---------------------------------------------------------------------------------------------------

GAINS = np.array([0.01, 0.02, 0.03, 0.04, 0.05])


def two_models(gains: np.ndarray = GAINS) -> pd.DataFrame:
    base = 0.3 + 0.1 * np.arange(len(gains))
    return table(
        {
            ("old", "T1", "ET"): base.tolist(),
            ("old", "T2", "ET"): base.tolist(),
            ("new", "T1", "ET"): (base + 2 * gains).tolist(),
            ("new", "T2", "ET"): base.tolist(),
        }
    )


def test_models_are_compared_by_the_cases_means_over_subsets():
    found = s.compare(two_models(), baseline="old", **QUICK).iloc[0]
    assert (found["model"], found["against"], found["region"]) == ("new", "old", "ET")
    assert found["difference"] == pytest.approx(GAINS.mean())
    assert 0.01 < found["low"] < found["difference"] < found["high"] < 0.05
    # five patients, all better: 2 / 2^5
    assert found["p"] == found["p_corrected"] == pytest.approx(1 / 16)
    assert (found["cases"], found["patients"]) == (5, 5)


def test_all_pairs_are_compared_without_a_baseline():
    frame = pd.concat([two_models(), two_models(-GAINS).replace({"model": {"new": "newer"}})])
    frame = frame.drop_duplicates(["model", "case", "subset"])
    found = s.compare(frame, **QUICK)
    assert found[["model", "against"]].values.tolist() == [["old", "new"], ["old", "newer"], ["new", "newer"]]
    assert found["p_corrected"].tolist() == pytest.approx([3 / 16] * 3)


def test_the_test_sees_one_difference_per_patient():
    patients = {"case0": "P", "case1": "P", "case2": "P", "case3": "Q", "case4": "R"}
    found = s.compare(two_models(), baseline="old", bootstrap=Bootstrap(patients, samples=200)).iloc[0]
    assert found["p"] == pytest.approx(2 / 2**3)
    assert (found["cases"], found["patients"]) == (5, 3)


def test_values_that_one_model_lacks_are_left_out_of_both():
    frame = two_models()
    frame.loc[(frame["model"] == "new") & (frame["case"] == "case4"), "value"] = NAN
    found = s.compare(frame, baseline="old", **QUICK).iloc[0]
    assert found["difference"] == pytest.approx(GAINS[:4].mean())
    assert found["cases"] == 4


def test_the_average_region_compares_the_same_regions_of_both():
    values = {("a", "T1", "WT"): [0.5], ("a", "T1", "ET"): [NAN], ("b", "T1", "WT"): [0.4], ("b", "T1", "ET"): [0.0]}
    found = s.compare(table(values), **QUICK)
    assert row(found, region="average")["difference"] == pytest.approx(0.1)
    assert math.isnan(row(found, region="ET")["difference"]) and row(found, region="ET")["cases"] == 0


def test_errors_of_volume_are_compared_by_size():
    values = {("a", "T1", "WT"): [-3.0, 1.0], ("b", "T1", "WT"): [1.0, 1.0]}
    assert s.compare(table(values, "volume_error_ml"), metric="volume_error_ml")["difference"].item() == 1.0


def test_equal_models_do_not_differ():
    found = s.compare(two_models(0 * GAINS), **QUICK).iloc[0]
    assert (found["difference"], found["low"], found["high"], found["p"]) == (0, 0, 0, 1)


def test_intervals_of_subsets_have_the_level_of_their_test():
    found = s.compare_subsets(two_models(), baseline="old", **QUICK)
    changed, same = row(found, subset="T1"), row(found, subset="T2")
    assert changed["difference"] == pytest.approx(2 * GAINS.mean()) and same["difference"] == 0
    assert (changed["p"], changed["p_corrected"], changed["level"]) == pytest.approx((1 / 16, 2 / 16, 0.975))
    assert (same["p"], same["p_corrected"], same["level"]) == pytest.approx((1, 1, 0.95))
    wide, narrow = (
        s.compare_subsets(two_models(), baseline="old", bootstrap=Bootstrap(samples=2000, level=level))
        for level in (0.95, 0.5)
    )
    assert wide["low"][0] < narrow["low"][0] < narrow["high"][0] < wide["high"][0]


def test_comparison_by_number_of_modalities():
    frame = two_models()
    both = frame[frame["subset"] == "T1"].assign(subset="T1+T2", modalities=2)
    found = s.compare_by_count(pd.concat([frame, both]), baseline="old", **QUICK)
    assert found["modalities"].tolist() == [1, 2]
    assert found["difference"].tolist() == pytest.approx([GAINS.mean(), 2 * GAINS.mean()])
    assert found["p_corrected"].tolist() == pytest.approx([2 / 16, 2 / 16])
    assert found["level"].tolist() == pytest.approx([0.975, 0.95])


def test_paired_differences():
    found = s.paired_differences(two_models(), baseline="old")
    assert found["case"].tolist() == [f"case{number}" for number in range(5)]
    assert found["difference"].tolist() == pytest.approx(GAINS.tolist())
    assert (set(found["model"]), set(found["against"]), set(found["region"])) == ({"new"}, {"old"}, {"ET"})


def test_a_comparison_needs_two_known_models():
    with pytest.raises(ValueError, match="at least two models, found M"):
        s.compare(table(TWO))
    with pytest.raises(ValueError, match="no model older; they have old, new"):
        s.compare(two_models(), baseline="older")
    with pytest.raises(ValueError, match="no model older"):
        s.compare_subsets(two_models(), baseline="older")


def test_holm_of_a_worked_example():
    p_values = np.array([0.01, 0.04, NAN, 0.03])
    adjusted, levels = s.holm(p_values)
    # 3 * 0.01; 2 * 0.03; 1 * 0.04, but never below the one before
    assert adjusted == pytest.approx([0.03, 0.06, NAN, 0.06], nan_ok=True)
    assert levels[[0, 1, 3]] == pytest.approx([1 - 0.05 / 3, 0.95, 0.975])
    assert s.holm(p_values, 0.9)[1][0] == pytest.approx(1 - 0.1 / 3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_bounded_by_bonferroni_and_keeps_the_order(values):
    p_values = np.array(values)
    adjusted = s.holm(p_values)[0]
    assert (p_values <= adjusted).all()
    assert (adjusted <= np.minimum(1, len(values) * p_values) + 1e-12).all()
    assert (np.diff(adjusted[np.argsort(p_values, kind="stable")]) >= 0).all()


def test_wilcoxon_drops_zeros_and_missing_values():
    patients = np.arange(7)
    differences = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 0.0, NAN])
    assert s.wilcoxon(differences, patients) == pytest.approx(2 / 2**5)
    many_zeros = np.array([*[0.0] * 15, 1, 2, 3, 4, 5])
    assert s.wilcoxon(many_zeros, np.arange(20)) == pytest.approx(2 / 2**5)  # exact, not approximated for 20 values
    assert s.wilcoxon(np.zeros(3), np.arange(3)) == 1
    assert math.isnan(s.wilcoxon(np.array([NAN]), np.arange(1)))
    # two time points that cancel out are no difference
    assert s.wilcoxon(np.array([1.0, -1.0]), np.array([0, 0])) == 1


def test_rounding_does_not_break_ties_of_the_wilcoxon_test():
    # 0.3 - 0.2 is a little less than 0.1: three gains of 0.1 and three losses are no difference
    differences = np.array([0.3 - 0.2] * 3 + [-0.1] * 3)
    assert s.wilcoxon(differences, np.arange(6)) == pytest.approx(1)


# ---- several training runs -------------------------------------------------------------------------------------------


def trainings(values: dict[str, np.ndarray]) -> pd.DataFrame:
    """Results from {model: values of shape (trainings, cases)} of one subset and region."""
    frames = [
        table({(model, "T1", "ET"): list(of_training)}).assign(training=number)
        for model, of_model in values.items()
        for number, of_training in enumerate(of_model)
    ]
    return pd.concat(frames, ignore_index=True)


def test_paired_trainings_of_a_worked_example():
    base = np.array([0.2, 0.4, 0.6])
    gains = np.array([[0.1], [0.2], [0.3]])
    found = s.compare(trainings({"new": base + gains, "old": np.tile(base, (3, 1))}), **QUICK).iloc[0]
    assert found["difference"] == pytest.approx(0.2) and found["by_training"] == pytest.approx([0.1, 0.2, 0.3])
    # cases do not differ, so the interval is the t interval over 0.1, 0.2, 0.3: t = 4.303, s = 0.1
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert (found["low"], found["high"]) == pytest.approx((0.2 - half, 0.2 + half))
    assert math.isnan(found["p"]) and math.isnan(found["p_corrected"])


def test_unequal_numbers_of_trainings_are_independent_samples():
    base = np.array([0.2, 0.4, 0.6])
    first, second = base + np.array([[0.1], [0.2], [0.3]]), base + np.array([[0.0], [0.02]])
    found = s.compare(trainings({"new": first, "old": second}), **QUICK).iloc[0]
    assert found["difference"] == pytest.approx(0.19) and "by_training" not in found
    half = math.hypot(4.302653 * 0.1 / math.sqrt(3), 12.706205 * 0.02 / 2)
    assert (found["low"], found["high"]) == pytest.approx((0.19 - half, 0.19 + half))
    by_subset = s.compare_subsets(trainings({"new": first, "old": second}), **QUICK).iloc[0]
    assert (by_subset["low"], by_subset["level"]) == pytest.approx((0.19 - half, 0.95))


def test_cases_and_trainings_add_in_quadrature():
    samples = [np.array([1.0, 3.0])]  # t = 12.706, s^2 / n = 1
    low, high = widen(np.array(2.0), np.array(-7.0), np.array(13.0), samples, 0.95)
    assert (low, high) == pytest.approx((2 - math.hypot(9, 12.706205), 2 + math.hypot(11, 12.706205)))
    assert widen(np.array(2.0), np.array(1.0), np.array(3.0), [], 0.95) == (1.0, 3.0)


def test_several_trainings_are_not_compared_with_one():
    frame = trainings({"new": np.full((3, 4), 0.5), "old": np.full((1, 4), 0.4)})
    with pytest.raises(ValueError, match=r"several training runs are compared with one \(new 3, old 1\)"):
        s.compare(frame)
    frame = trainings({"new": np.full((3, 4), 0.5), "old": np.full((2, 4), 0.4)})
    with pytest.raises(ValueError, match="same number of training runs"):
        s.rank_table(frame)


def test_a_training_with_two_values_of_a_case_is_refused():
    frame = trainings({"new": np.full((2, 4), 0.5), "old": np.full((2, 4), 0.4)})
    with pytest.raises(ValueError, match="appears twice"):
        cube(pd.concat([frame, frame.iloc[[0]]]), "dice")


def test_the_order_of_rows_does_not_mix_trainings():
    values = {"new": np.array([[0.5, 0.6], [0.7, 0.9]]), "old": np.array([[0.1, 0.2], [0.2, 0.3]])}
    data = cube(trainings(values), "dice")
    for model, of_model in zip(data.models, data.trainings, strict=True):
        assert of_model[:, :, 0, 0] == pytest.approx(values[model])
    assert data.values[0, :, 0, 0] == pytest.approx([0.6, 0.75])


def test_a_ranking_resamples_trainings_too():
    # a wins every case of two trainings and loses every case of the third
    a = np.array([[0.8] * 6, [0.8] * 6, [0.2] * 6])
    found = s.rank_table(trainings({"a": a, "b": np.full((3, 6), 0.5)}), bootstrap=Bootstrap(samples=4000))
    assert found[["model", "mean_rank"]].values.tolist() == [["a", pytest.approx(4 / 3)], ["b", pytest.approx(5 / 3)]]
    # a is first where the third training is drawn at most once: (2/3)^3 + 3 (1/3) (2/3)^2
    assert found["first"][0] == pytest.approx(20 / 27, abs=0.03)


# standard deviations in points of the differences between seeds, between cases and of their interaction, which give
# about the intervals over cases and over seeds of rows of benchmarks/results/accuracy_short.json
SPREADS = {"mstkd": (0.40, 0.4, 0.8), "dropout": (1.0, 1.2, 1.6), "smml": (2.3, 1.5, 2.0)}


def excluding_zero(spreads: tuple[float, float, float], effect: float = 0.0, repeats: int = 600) -> tuple[float, float]:
    """How often the interval over seeds and cases, and that over cases alone, exclude 0: 3 seeds, 24 cases.

    Every repetition is a region of one table.
    """
    generator = np.random.default_rng(0)
    seed, case, rest = (
        generator.normal(0, spread / 100, (*shape, repeats))
        for spread, shape in zip(spreads, ((3, 1), (1, 24), (3, 24)), strict=True)
    )
    difference = seed + case + rest + effect / 100
    place = np.indices(difference.shape).reshape(3, -1)
    new = pd.DataFrame({"training": place[0], "case": place[1], "region": place[2], "value": 0.5 + difference.ravel()})
    new = new.assign(model="new", trainer="Any", fold=0, subset="T1", modalities=1, metric="dice")
    frame = pd.concat([new, new.assign(model="old", value=0.5)])
    rates = []
    for results in (frame, frame.drop(columns="training").assign(fold=frame["training"])):
        found = s.compare(results, bootstrap=Bootstrap(samples=500))
        found = found[found["region"] != "average"]
        rates.append(float(((found["low"] > 0) | (found["high"] < 0)).mean()))
    return rates[0], rates[1]


@pytest.mark.parametrize("row", SPREADS)
def test_without_an_effect_the_interval_over_seeds_and_cases_keeps_its_level(row):
    both, cases_alone = excluding_zero(SPREADS[row])
    assert both <= 0.08
    assert cases_alone > 0.25


def test_a_large_effect_is_found():
    both, _ = excluding_zero(SPREADS["mstkd"], effect=3.0)
    assert both > 0.9
    both, _ = excluding_zero(SPREADS["dropout"], effect=10.0)
    assert both > 0.9


# ---- ranking -------------------------------------------------------------------------------------------------------


def ranked(c_values: list[float]) -> pd.DataFrame:
    values = {("c", "T1", "ET"): c_values, ("a", "T1", "ET"): [0.9, 0.9], ("b", "T1", "ET"): [0.8, 0.95]}
    return table(values)


def test_ranks_are_taken_within_each_case():
    found = s.rank_table(ranked([0.1, 0.1]), **QUICK)
    assert found["model"].tolist() == ["a", "b", "c"]
    assert found["mean_rank"].tolist() == [1.5, 1.5, 3.0]
    assert found["rank"].tolist() == [1, 1, 3]
    # c is last in every resample; a and b take turns, and tie when both cases are drawn
    assert found["first"][2] == 0 and found["low"][2] == found["high"][2] == 3
    assert 0.6 < found["first"][0] < 0.9 and 0.6 < found["first"][1] < 0.9


def test_models_that_win_equally_often_tie_in_spite_of_rounding():
    # a is better in 0, 2, 2 and 2 of the three subsets: 6 of 12, but means of thirds differ in the last digit
    wins = np.array([[0, 2, 2, 2], [0, 2, 2, 2], [0, 2, 2, 2]]) > np.arange(3)[:, None]
    values = {("a", subset, "ET"): won.astype(float).tolist() for subset, won in zip("XYZ", wins, strict=True)}
    values |= {("b", subset, "ET"): (~won).astype(float).tolist() for subset, won in zip("XYZ", wins, strict=True)}
    found = s.rank_table(table(values), bootstrap=Bootstrap(samples=2000))
    assert found["rank"].tolist() == [1, 1]
    # one of the two is best in each resample, and both in those where a wins six times
    assert found["first"].sum() > 1.2


def test_several_metrics_share_one_ranking_each_in_its_direction():
    distances = table({("a", "T1", "ET"): [9.0, 9.0], ("b", "T1", "ET"): [1.0, 1.0]}, "hd95")
    frame = pd.concat([ranked([0.1, 0.1]).query("model != 'c'"), distances])
    found = s.rank_table(frame, metrics=["dice", "hd95"], **QUICK)
    # a: dice 1, 2 and distances 2, 2; b: 2, 1 and 1, 1
    assert found[["model", "mean_rank"]].values.tolist() == [["b", 1.25], ["a", 1.75]]


def test_a_ranking_refuses_what_has_no_rank():
    with pytest.raises(ValueError, match=r"left out \(nan\), and these have no rank"):
        s.rank_table(ranked([0.1, NAN]))
    with pytest.raises(ValueError, match="at least two models, found a"):
        s.rank_table(ranked([0.1, 0.1]), models=["a"])
    distances = table({("a", "T1", "ET"): [9.0], ("b", "T1", "ET"): [1.0]}, "hd95")
    with pytest.raises(ValueError, match="not evaluated for the same models and cases"):
        s.rank_table(pd.concat([ranked([0.1, 0.1]).query("model != 'c'"), distances]), metrics=["dice", "hd95"])


# ---- plausibility --------------------------------------------------------------------------------------------------

NAMES = ("T1", "T1ce", "T2", "FLAIR")
SHOWS = {
    "WT": {"T1": 0.5, "T1ce": 0.55, "T2": 0.75, "FLAIR": 0.85},
    "ET": {"T1": 0.3, "T1ce": 0.75, "T2": 0.35, "FLAIR": 0.4},
}


def believable(
    shows: dict[str, dict[str, float]] = SHOWS, rename: dict[str, str] | None = None, patients: int = 8
) -> pd.DataFrame:
    """A case sees what its best modality shows, and a little more with every other one, no two of them the same."""
    rename = rename or {}
    values = {}
    for size in range(1, 5):
        for members in itertools.combinations(NAMES, size):
            subset = "+".join(rename.get(name, name) for name in members)
            for region, strength in shows.items():
                best = max(strength[name] for name in members) + 0.03 * (size - 1)
                best += sum(0.001 * 2 ** NAMES.index(name) for name in members)
                values["M", subset, region] = [best + 0.002 * (case - (patients - 1) / 2) for case in range(patients)]
    return table(values)


def warnings_of(frame: pd.DataFrame) -> list[str]:
    return plausibility_warnings(frame, **QUICK)


def test_what_the_modalities_show_raises_no_warning():
    assert warnings_of(believable()) == []
    assert warnings_of(believable(rename={"T1": "t1n", "T1ce": "t1c", "FLAIR": "t2f"})) == []


def test_swapped_channels_are_noticed():
    swap = {"T1ce": "FLAIR", "FLAIR": "T1ce"}
    swapped = {region: {swap.get(k, k): v for k, v in strength.items()} for region, strength in SHOWS.items()}
    (warning,) = warnings_of(believable({"ET": swapped["ET"]}))
    assert warning.startswith("M, ET: FLAIR adds more") and "than T1ce" in warning and "swapped?" in warning
    values = shapley(believable({"ET": swapped["ET"]})).set_index(["region", "modality"])["value"]
    assert f"by {100 * (values['ET', 'FLAIR'] - values['ET', 'T1ce']):.1f} points" in warning


def test_contrast_that_does_not_help_is_noticed():
    frame = believable({"ET": SHOWS["ET"]})
    with_it = frame["subset"].str.contains("T1ce")
    frame.loc[with_it, "value"] = 0.2
    found = warnings_of(frame[frame["modalities"] < 4])
    assert any("adding T1ce changes the mean by -" in warning for warning in found)


def test_oedema_seen_best_on_t1_is_noticed():
    swapped = dict(SHOWS["WT"], T1=0.85, FLAIR=0.5)
    found = warnings_of(believable({"whole tumor": swapped}))
    assert len(found) == 1 and found[0].startswith("M, whole tumor: T1 alone is better (85.1) than T2 alone (75.4)")


def test_a_subset_clearly_better_than_everything_is_noticed():
    frame = believable()
    frame.loc[(frame["modalities"] == 4) & (frame["region"] == "WT"), "value"] = 0.8
    found = warnings_of(frame)
    assert len(found) == 1 and "is better" in found[0] and "than the full input (80.0)" in found[0]


def test_weak_evidence_raises_no_warning():
    def lowered(patients: int, spread: float) -> list[str]:
        """The full input is 11 points worse than three modalities on average, more or less from case to case."""
        frame = believable({"WT": SHOWS["WT"]}, patients=patients)
        full = frame["modalities"] == 4
        losses = 0.14 + spread * np.linspace(-1, 1, patients)
        frame.loc[full, "value"] -= losses
        return warnings_of(frame)

    assert len(lowered(8, 0.0)) == 1
    assert lowered(5, 0.0) == []
    assert len(lowered(8, 0.05)) == 1
    assert lowered(8, 0.17) == []


def test_a_modality_that_was_never_removed_is_noticed():
    frame = believable()
    for subset, same in (("T2", "T1+T2"), ("T2+FLAIR", "T1+T2+FLAIR")):
        frame.loc[frame["subset"] == same, "value"] = frame.loc[frame["subset"] == subset, "value"].to_numpy()
    found = warnings_of(frame)
    assert found[0].startswith("M: T2, T1+T2 give the same value in every case")
    assert found[1].startswith("M: T2+FLAIR, T1+T2+FLAIR give")


def test_two_cases_are_too_few_for_a_warning():
    frame = believable()
    frame.loc[frame["subset"] == "T1+T2", "value"] = frame.loc[frame["subset"] == "T2", "value"].to_numpy()
    few = frame[frame["case"].isin(sorted(frame["case"].unique())[:2])]
    assert any("the same value" in text for text in warnings_of(frame)) and warnings_of(few) == []


def test_what_a_missing_modality_costs():
    rows = {"T1+T2": (0.5, 0.9), "T1+T1ce": (0.85, 0.8), "T1ce+T2": (0.9, 0.91), "T1+T1ce+T2": (0.9, 0.9)}
    frame = pd.DataFrame(
        [
            ("M", "t", "0", case, subset, subset.count("+") + 1, region, "dice", value)
            for case in ("a", "b")
            for subset, values in rows.items()
            for region, value in zip(("ET", "WT"), values, strict=True)
        ],
        columns=list(COLUMNS),
    )
    found = findings.Findings(frame)
    table = found.missing_one
    assert list(zip(table["modality"], table["region"], strict=True)) == [
        (name, region) for name in ("T1ce", "T2", "T1") for region in ("ET", "WT")
    ]
    assert table["value"].tolist() == pytest.approx([0.4, 0.0, 0.05, 0.1, 0.0, -0.01])
    assert found.headline.startswith("Without T1ce: ET -40.0 Dice points; without T2: WT -10.0; without T1: ET +0.0")
    assert findings.Findings(frame[frame["subset"] != "T1+T1ce+T2"]).headline is None


def test_values_that_repeat_by_themselves_are_not_suspicious():
    found = warnings_of(believable({"WT": SHOWS["WT"]}).assign(value=0.0))
    assert found == []


def test_rules_without_their_subsets_are_skipped():
    frame = believable()
    assert warnings_of(frame[frame["subset"].isin(["T1ce", "T1+T1ce+T2+FLAIR"])]) == []


# ---- the largest component -------------------------------------------------------------------------------------------


def test_the_change_by_the_largest_component_is_the_mean_over_subsets_and_regions():
    before = table(
        {
            ("m", "A", "x"): [0.5, 0.5, 0.5],
            ("m", "A", "y"): [0.2] * 3,
            ("m", "A+B", "x"): [0.6] * 3,
            ("m", "A+B", "y"): [0.4] * 3,
        }
    )
    after = table(
        {
            ("m", "A", "x"): [0.9, 0.3, 0.5],
            ("m", "A", "y"): [0.2] * 3,
            ("m", "A+B", "x"): [0.6] * 3,
            ("m", "A+B", "y"): [0.8, 0.4, 0.4],
        }
    )
    found = LargestComponent(before, after)
    assert found.difference == pytest.approx((0.8 / 4 - 0.2 / 4) / 3)
    assert (found.cases, found.better, found.worse) == (3, 1, 1)
    assert found.low < found.difference < found.high
    assert found.by_subset["A"] == pytest.approx({"x": 1.7 / 3, "y": 0.2})
    assert "+5.0 points [" in found.sentence and "better in 1 of 3 cases, worse in 1" in found.sentence
    assert LargestComponent(before, before).sentence is None
    # a case that two folds predicted counts once
    again = after[after["case"] == "case0"].assign(fold="1")
    twice = LargestComponent(
        pd.concat([before, before[before["case"] == "case0"].assign(fold="1")]), pd.concat([after, again])
    )
    assert twice.by_subset["A"] == pytest.approx(found.by_subset["A"])
    # the only false island of a region without a reference goes, and with it the value, by nnU-Net's rules
    false = table({("m", "A", "x"): [0.5, 0.0]})
    gone = LargestComponent(false, table({("m", "A", "x"): [0.5, float("nan")]}))
    assert gone.undefined == 1 and "without 1 values that are no longer defined" in gone.sentence
    # a region that counts as not found where it is small is no region more
    small = before[before["region"] == "x"].assign(region="x (min 9)", value=0.0)
    assert LargestComponent(pd.concat([before, small]), after).difference == pytest.approx(found.difference)
