"""The pure parts of benchmarks/accuracy.py: budgets, settings, the verdict and gradient ratios. Nothing is trained."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import accuracy
import accuracy_rows as table
from accuracy_report import control_at_equal_hours, page, results_of, row_numbers
from accuracy_verdict import best_of, difference, subset_differences, verdict
from gradient_ratio import gradient_norms, judgement, ratios
from measured_training import as_float32, kept_epochs, lower

from nnunetv2_mstkd import methods as trainers
from nnunetv2_mstkd.methods.configuration import complete_block, configure
from nnunetv2_mstkd.methods.mstkd.settings import TERMS
from nnunetv2_mstkd.nnunet.plans import BLOCK
from nnunetv2_mstkd.training.distillation import DistillationTrainer
from nnunetv2_mstkd.training.settings import SamplerSettings, ScheduleSettings
from nnunetv2_mstkd.training.step import Losses

NAMES = ("T1", "T1ce", "T2", "FLAIR")
RESULTS = Path(accuracy.__file__).parent / "results"
SUBSETS = ["+".join(chosen) for size in range(1, 5) for chosen in itertools.combinations(NAMES, size)]
REGIONS = ("whole tumor", "tumor core", "enhancing tumor")


# ---- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", table.PRESETS.values(), ids=list(table.PRESETS))
def test_every_row_gets_the_same_number_of_training_steps(preset):
    wanted = (preset.first_epochs + preset.student_epochs) * preset.iterations
    assert {row.name: row.iterations(preset) for row in table.ROWS} == {row.name: wanted for row in table.ROWS}


def test_names_are_unique_and_work_in_folder_names():
    names = [row.name for row in table.ROWS]
    assert len(set(names)) == len(names)
    assert not any("_" in name for name in names)


def test_each_distilling_row_names_the_teacher_of_its_trainer():
    for row in table.ROWS:
        trainer = getattr(trainers, row.trainer)
        if block_of(row)["teacher"]["joint"]:
            assert row.name == "mstkd-paper" and row.first is None
        elif issubclass(trainer, DistillationTrainer):
            assert row.first == trainer.teacher_trainer.__name__
        else:
            assert bool(row.first) == row.starts_from_first


def block_of(row: table.Row, preset: str = "cpu") -> dict:
    """The complete block of a row, derived as the benchmark derives it."""
    from step_cost import make_plans

    plans, _ = make_plans("small")
    chosen = table.PRESETS[preset]
    for name, parent, changes in (
        (row.first_stage(1), chosen.configuration, table.first_assignments(chosen, 1, row.variant)),
        (row.configuration(1), row.first_stage(1), row.assignments(chosen, 1)),
    ):
        plans["configurations"][name] = configure(plans, parent, name, assignments=changes)
    return complete_block(plans["configurations"][row.configuration(1)][BLOCK])


@pytest.mark.parametrize("row", table.ROWS, ids=[row.name for row in table.ROWS])
def test_settings_of_every_row_are_valid(row):
    block = block_of(row)
    preset = table.PRESETS["cpu"]
    schedule = ScheduleSettings(**block["schedule"])
    assert (schedule.seed, schedule.epochs, schedule.iterations) == (1, row.epochs(preset), preset.iterations)
    if row.starts_from_first:
        folder = f"{row.first}__nnUNetPlans__first_s1"
        assert schedule.init_from == f"Dataset903_Accuracy/{folder}/fold_0/checkpoint_final.pth"
    elif row.first:
        assert block["teacher"]["configuration"] == ("first-main_s1" if "main" in row.name else "first_s1")
    if row.subset:
        assert SamplerSettings(**block["sampler"]).build(NAMES).subsets == (
            tuple(name in row.subset.split("+") for name in NAMES),
        )


def test_ablations_take_away_what_they_say():
    off = {
        row.name: {term for term in TERMS if not block_of(row)["mstkd"][term]}
        for row in table.ROWS
        if row.trainer == "MSTKDTrainer"
    }
    assert off == {
        "mstkd": set(),
        "mstkd-zero": set(TERMS),
        "mstkd-separate": set(),
        "mstkd-main-zero": set(TERMS),
        "mstkd-main": set(),
        "mstkd-main-ms-tkd": {"discrepancy", "kl", "style", "adversarial"},
        "mstkd-strong": set(),
        "mstkd-paper": set(),
        "mstkd-no-ms-tkd": {"evd", "maps"},
        "mstkd-no-dmld": {"discrepancy", "kl"},
        "mstkd-no-gsme": {"style", "adversarial"},
        "mstkd-cold": set(),
        "mstkd-labelled": set(),
    }
    assert not block_of(table.chosen_rows(["mstkd-cold"])[0])["teacher"]["warm_start"]
    schedule = ScheduleSettings(**block_of(table.chosen_rows(["mstkd-paper"])[0])["schedule"])
    assert (schedule.optimizer, schedule.learning_rate) == ("adam", 1e-4)


def test_an_unknown_row_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="no row 'mstkdd'; there are full, dropout"):
        table.chosen_rows(["mstkd", "mstkdd"])


def test_first_stages_are_shared_within_a_seed_and_come_first(tmp_path):
    rows = table.chosen_rows(["mstkd", "mstkd-zero", "dropout-warm"])
    steps = accuracy.Benchmark(tmp_path, "tiny").steps(rows, [0, 1])
    titles = [step.title for step in steps]
    assert sum("MSTKDTeacherTrainer" in title for title in titles) == 2
    assert sum(title.startswith("train KDTeacherTrainer (first_s") for title in titles) == 2
    assert sum(title.startswith("gradients") for title in titles) == 2  # of mstkd alone
    before: set[str] = set()
    for step in steps:
        assert set(step.needs) <= before
        before.add(step.key)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_counts_a_shared_teacher_once():
    preset, seeds = table.PRESETS["cpu"], [0, 1, 2]
    one = table.estimated_hours(table.chosen_rows(["mstkd"]), preset, seeds)
    two = table.estimated_hours(table.chosen_rows(["mstkd", "mstkd-zero"]), preset, seeds)
    assert one["MSTKDTeacherTrainer"] == two["MSTKDTeacherTrainer"] > 0
    assert set(two) - set(one) == {"mstkd-zero"}


def test_an_evaluation_older_than_the_weights_is_not_done(tmp_path):
    step = accuracy.Benchmark(tmp_path, "tiny").steps(table.chosen_rows(["dropout"]), [0])[1]
    weights = step.model.folder / "fold_0" / "checkpoint_final.pth"
    for file in (weights, step.folder / "results.csv"):
        file.parent.mkdir(parents=True)
        file.touch()
    os.utime(weights, (1000, 1000))
    assert step.done()
    assert "--restart" not in step.command()
    os.utime(weights, (2e9, 2e9))
    assert not step.done()
    assert "--restart" in step.command()  # mstkd evaluate would refuse to mix two trainings


# ---- verdict -------------------------------------------------------------------------------------------------------


def results(models: dict[str, float], *, cases: int = 24, seeds: int = 5, base: float = 0.6) -> pd.DataFrame:
    """A table in which each model lies a fixed number of Dice points above ``base``, with equal noise by case."""
    noise = np.random.default_rng(0).normal(0, 0.02, (cases, len(SUBSETS), seeds))
    rows = [
        (model, "Any", "0", str(seed), f"case_{case:02d}", subset, subset.count("+") + 1, region, "dice",
         base + points / 100 + noise[case, number, seed] + 1e-4 * ((case + seed) % 3))
        for model, points in models.items()
        for case in range(cases)
        for number, subset in enumerate(SUBSETS)
        for seed in range(seeds)
        for region in REGIONS
    ]  # fmt: skip
    columns = ["model", "trainer", "fold", "training", "case", "subset", "modalities", "region", "metric", "value"]
    return pd.DataFrame(rows, columns=columns)


def judge(frame: pd.DataFrame, training_cases: int = 60) -> list[bool | None]:
    findings = verdict(
        frame, student="mstkd", controls=["dropout", "dropout-warm", "mstkd-zero"], floor="full",
        training_cases=training_cases, samples=300,
    )  # fmt: skip
    return [finding.met for finding in findings]


EQUAL = {"full": 0.0, "dropout": 0.0, "dropout-warm": 1.0, "mstkd-zero": 0.5}
# seeds, cases, WT, ET, gain, interval, subsets, full input


def test_everything_met():
    assert judge(results({**EQUAL, "mstkd": 2.6})) == [True] * 8


def test_the_gain_is_over_the_best_control_not_over_any():
    frame = results({**EQUAL, "mstkd": 2.4})  # 1.4 over the best, 2.4 over another
    assert best_of(frame, ["dropout", "dropout-warm", "mstkd-zero"]) == "dropout-warm"
    assert judge(frame) == [True, True, True, True, False, True, True, True]


def test_no_difference_is_missed():
    frame = results({**EQUAL, "mstkd": 1.0})
    assert judge(frame)[4:6] == [False, False]


def test_a_worse_subset_is_missed_and_named():
    frame = results({**EQUAL, "mstkd": 3.0})
    frame.loc[(frame["model"] == "mstkd") & (frame["subset"] == "T1+T2"), "value"] -= 0.04
    findings = verdict(frame, student="mstkd", controls=["dropout-warm"], floor="full", training_cases=60, samples=300)
    worse = next(finding for finding in findings if "no subset worse" in finding.claim)
    assert worse.met is False
    assert worse.found == "T1+T2 -2.0"


def test_the_full_input_is_judged_on_its_own():
    frame = results({**EQUAL, "mstkd": 3.0})
    frame.loc[(frame["model"] == "mstkd") & (frame["modalities"] == 4), "value"] -= 0.034
    assert judge(frame)[7] is False


def test_few_cases_or_seeds_and_easy_data_are_missed():
    frame = results({**EQUAL, "mstkd": 3.0}, cases=20, seeds=2, base=0.90)
    assert judge(frame)[:4] == [False, False, True, False]
    assert judge(results({**EQUAL, "mstkd": 3.0}), training_cases=59)[1] is False


def test_a_significant_loss_is_no_success():
    assert judge(results({**EQUAL, "mstkd": -2.0}))[4:7] == [False, False, False]


def test_a_missing_control_leaves_open_what_it_could_change():
    without = {name: value for name, value in EQUAL.items() if name != "dropout-warm"}
    assert judge(results({**without, "mstkd": 3.0}))[4:7] == [None, None, None]
    assert judge(results({**without, "mstkd": 0.6}))[4:7] == [False, None, None]
    assert judge(results({"full": 0.0, "mstkd": 3.0}))[4:7] == [None, None, None]


def test_without_the_student_nothing_is_claimed():
    assert judge(results(EQUAL)) == [None]


def test_unit_is_the_case():
    frame = results({"a": 0.0, "b": 1.0}, cases=7)
    found = difference(frame, "b", "a", samples=300)
    assert found["cases"] == 7
    assert found["difference"] == pytest.approx(1.0)


def lucky(frame: pd.DataFrame, points: tuple[float, ...], model: str = "b") -> pd.DataFrame:
    """A model with a number of points for the luck of each seed."""
    luck = frame["training"].astype(int).map(dict(enumerate(points))) / 100
    return frame.assign(value=frame["value"] + luck.where(frame["model"] == model, 0))


def test_the_luck_of_training_widens_intervals():
    frame = results({"a": 0.0, "b": 1.0}, cases=8, seeds=3)
    found = difference(lucky(frame, (-1, 0, 1)), "b", "a", samples=300)
    assert found["by_seed"] == pytest.approx([0.0, 1.0, 2.0])
    half = 4.302653 / 3**0.5  # cases do not differ; t times the standard deviation of 1
    assert (found["low"], found["high"]) == pytest.approx((1 - half, 1 + half))
    by_subset = subset_differences(lucky(frame, (-1, 0, 1)), "b", "a", samples=300)
    assert len(by_subset) == 15 and by_subset["low"].tolist() == pytest.approx([1 - half] * 15)


def test_one_seed_cannot_show_that_a_method_is_better():
    assert judge(results({**EQUAL, "mstkd": 3.0}, seeds=1))[4:7] == [True, None, None]


def test_a_gain_that_the_seeds_do_not_support_is_missed():
    frame = lucky(results({**EQUAL, "mstkd": 3.0}), (-6, 6, -3, 3, 0), "mstkd")
    assert judge(frame)[4:6] == [True, False]


# ---- report --------------------------------------------------------------------------------------------------------


def checked(content: dict) -> None:
    """Compute the table's numbers again from the values by case that are stored beside it."""
    frame = results_of(content["cases"])
    rows = [row for row in table.ROWS if row.name in content["rows"]]
    again = row_numbers(frame[frame["model"].isin(content["rows"])], rows, content["best_control"])
    for name, numbers in again.items():
        for key, value in numbers.items():
            assert flat(content["rows"][name][key]) == pytest.approx(flat(value), abs=0.02), (name, key)


def flat(value: object) -> list[float]:
    if isinstance(value, dict):
        return [number for each in value.values() for number in flat(each)]
    return [number for each in value for number in flat(each)] if isinstance(value, list) else [value]


def test_a_report_can_be_computed_again_from_its_own_values(tmp_path, monkeypatch):
    rows = table.chosen_rows(["full", "dropout-warm", "mstkd-zero", "mstkd"])
    models = {"full": -3.0, "dropout-warm": 0.3, "mstkd-zero": 0.5, "mstkd": 1.0}
    frame = lucky(results(models, cases=6, seeds=3), (-1, 0, 2), "mstkd")
    about = json.loads((RESULTS / "accuracy_short.json").read_text())["about"]
    shutil.copy(RESULTS / "accuracy_longer.json", tmp_path)
    cost = {"cpu_hours": 0.1, "hours": 0.1, "parameters": 1e6, "memory_mib": 1.0}
    for name, value in {
        "finished": (rows, []), "results": frame, "cost": cost, "gradients": [], "about": about, "_compare": None
    }.items():  # fmt: skip
        monkeypatch.setattr(accuracy.Benchmark, name, lambda *_, value=value: value)
    accuracy.Benchmark(tmp_path, "short").report([0, 1, 2], tmp_path)
    content = json.loads((tmp_path / "accuracy_short.json").read_text())
    checked(content)
    text = (tmp_path / "accuracy_short.md").read_text()
    assert "| MSTKDTrainer | 1200 |" in text and "-0.50, +0.50, +2.50" in text
    assert text == page(content, rows)
    # the best control as the student is compared with the next best
    accuracy.Benchmark(tmp_path, "short").report([0, 1, 2], tmp_path, "mstkd-zero")
    assert json.loads((tmp_path / "accuracy_short.json").read_text())["best_control"] == "dropout-warm"


PUBLISHED = sorted(RESULTS.glob("accuracy_*.json"))


@pytest.mark.parametrize("file", PUBLISHED, ids=[file.stem for file in PUBLISHED])
def test_published_tables_follow_from_what_is_stored(file):
    content = json.loads(file.read_text())
    rows = [row for row in table.ROWS if row.name in content["rows"]]
    assert file.with_suffix(".md").read_text() == page(content, rows)
    if "cases" in content:
        checked(content)
        return
    assert any("values by case" in note for note in content["about"]["not_stored"])
    best = content["rows"][content["best_control"]]
    for row in content["rows"].values():
        by_seed = list(row["seeds"].values())
        assert (
            row["mean"]["value"]
            == pytest.approx(np.mean(by_seed))
            == pytest.approx(np.mean(list(row["by_subset"].values())))
        )
        samples = {"mean": by_seed}
        if row is not best:
            samples["minus_best_control"] = [row["seeds"][seed] - best["seeds"][seed] for seed in best["seeds"]]
            assert row["minus_best_control"]["by_seed"] == pytest.approx(samples["minus_best_control"])
        for key, sample in samples.items():
            # the interval over cases and that over three seeds, in quadrature
            entry, value = row[key], np.mean(sample)
            luck = 4.302653 * np.std(sample, ddof=1) / 3**0.5
            low, high = entry["over_cases"]
            assert entry["low"] == pytest.approx(value - np.hypot(value - low, luck))
            assert entry["high"] == pytest.approx(value + np.hypot(high - value, luck))


def test_no_published_number_is_a_p_value_of_three_networks():
    for file in PUBLISHED:
        assert not re.search(r'"p(_corrected)?":', file.read_text())


def test_the_control_is_interpolated_at_the_hours_of_a_row():
    def row(dice: float, hours: float, steps: int) -> dict:
        return {"mean": {"value": dice}, "cost": {"hours": hours}, "steps": steps}

    numbers = {"dropout-warm": row(60, 1.0, 100), "slow": row(61, 2**0.5, 100), "fast": row(61, 0.9, 100)}
    numbers["slowest"] = row(61, 2.1, 100)
    control_at_equal_hours(numbers, {"dropout-warm": row(64, 5.0, 200)}, "hours")
    # half of a doubling of the steps; the hours of the other machine do not matter
    assert numbers["slow"]["control_at_equal_hours"] == {
        "control": "dropout-warm", "steps": 141, "dice": pytest.approx(62), "minus": pytest.approx(-1)
    }  # fmt: skip
    assert all("control_at_equal_hours" not in numbers[name] for name in ("dropout-warm", "fast", "slowest"))
    as_long = {"dropout-warm": row(60, 1.0, 200), "slow": row(61, 1.5, 200)}
    control_at_equal_hours(as_long, {"dropout-warm": row(64, 5.0, 200)}, "hours")
    assert "control_at_equal_hours" not in as_long["slow"]


# ---- gradients -----------------------------------------------------------------------------------------------------


def hand_made_step(weight: float) -> tuple[Losses, torch.Tensor]:
    """Segmentation loss with the gradient (3, 4), a term with the gradient (0, 2), and one without any."""
    parameter = torch.zeros(2, requires_grad=True)
    terms = {
        "segmentation": 3 * parameter[0] + 4 * parameter[1],
        "kl": 2 * parameter[1],
        "nowhere": torch.zeros(()),
    }
    total = terms["segmentation"] + weight * terms["kl"] + 0.5 * terms["nowhere"]
    return Losses(total, terms), parameter


def test_gradient_norms_of_a_hand_made_step():
    step, parameter = hand_made_step(0.25)
    found = gradient_norms(step, [parameter])
    assert found["segmentation"] == (1.0, 5.0)
    assert found["kl"] == (0.25, 2.0)
    assert found["nowhere"][1] == 0.0


def test_given_weights_win_over_inferred_ones():
    step, parameter = hand_made_step(0.25)
    step = step._replace(terms={name: (value + value) / 2 for name, value in step.terms.items()})
    assert gradient_norms(step, [parameter], {"kl": 0.7})["kl"] == (0.7, 2.0)
    assert gradient_norms(step, [parameter])["segmentation"] == (1.0, 5.0)


def test_ratios_use_the_weight_of_the_moment_and_the_full_one():
    step, parameter = hand_made_step(0.25)
    norms = gradient_norms(step, [parameter])
    found = ratios([norms, norms], {"kl": 0.5})
    assert found["kl"] == {"ratio": pytest.approx(0.25 * 2 / 5), "full": pytest.approx(0.5 * 2 / 5), "weight": 0.25}
    assert found["nowhere"]["ratio"] == 0.0


def test_a_dead_term_is_told_from_one_that_has_faded():
    assert judgement(0.01, 0.01) == ""
    assert judgement(9e-4, 9e-4) == "dead"
    assert judgement(0.0, 0.0) == "no gradient at this moment"
    assert judgement(0.0, 0.2) == "weight ramped or faded to nothing"


def test_weights_are_kept_at_five_and_fifty_percent():
    assert kept_epochs(100) == {5: 0.05, 50: 0.5}
    assert kept_epochs(3) == {1: 0.05, 2: 0.5}


class Output(NamedTuple):
    logits: torch.Tensor
    positions: torch.Tensor


class TwoLevels(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv3d(2, 3, 3, padding=1)

    def forward(self, x, *, named=False):
        self.seen = self.convolution(x)
        return Output(self.seen, torch.arange(3)) if named else [self.seen, x]


def test_a_network_runs_in_bfloat16_and_answers_in_float32():
    network, x = TwoLevels(), torch.randn(1, 2, 4, 4, 4)
    names, expected = list(network.state_dict()), network(x)[0]
    lower(network)
    fine, untouched = network(x)
    assert network.seen.dtype == torch.bfloat16
    assert (fine.dtype, untouched.dtype) == (torch.float32, torch.float32)
    assert 0 < (fine - expected).abs().max() < 0.05
    assert list(network.state_dict()) == names
    fine.sum().backward()
    assert network.convolution.weight.grad.dtype == torch.float32
    named = network(x, named=True)
    assert isinstance(named, Output) and named.logits.dtype == torch.float32 and named.positions.dtype == torch.int64


def test_a_copy_in_bfloat16_has_its_own_weights():
    network, x = TwoLevels(), torch.randn(1, 2, 4, 4, 4)
    lower(network)
    copied = copy.deepcopy(network)
    with torch.no_grad():
        copied.convolution.weight.zero_()
        copied.convolution.bias.fill_(2)
    assert (copied(x)[0] == 2).all() and not (network(x)[0] == 2).any()
    assert copied.seen.dtype == torch.bfloat16


@pytest.mark.parametrize("edges", [(2, 4, 4), (2, 2, 2), (4, 2, 2)])
def test_gradients_in_bfloat16_are_right_over_two_positions(edges):
    network, x = torch.nn.Conv3d(32, 32, 3, padding=1), torch.randn(2, 32, *edges)
    gradient = torch.randn(2, 32, *edges)
    network(x).backward(gradient)
    expected = network.weight.grad
    network.weight.grad = None
    lower(network)
    network(x).backward(gradient)
    assert (network.weight.grad - expected).abs().max() < 0.05 * expected.abs().max()


def test_outputs_without_floats_stay_what_they_are():
    assert as_float32((None, "text", [torch.ones(1, dtype=torch.bool)])) == (None, "text", [torch.tensor([True])])


@pytest.mark.parametrize("preset", table.PRESETS)
def test_all_trainings_of_a_preset_have_its_precision(tmp_path, preset):
    steps = accuracy.Benchmark(tmp_path, preset).steps(table.chosen_rows(["mstkd"]), [0])
    lowered = ["--bfloat16" in step.command() for step in steps if isinstance(step, accuracy.MeasuredTrain)]
    assert lowered == [table.PRESETS[preset].bfloat16] * 2
