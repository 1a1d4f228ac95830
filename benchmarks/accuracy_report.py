"""What `accuracy.py` leaves behind: all numbers as JSON, tables in Markdown, and one figure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from accuracy_rows import CHEAP_CONTROL, Row
from accuracy_verdict import DICE, SHORT, difference, only_full, regions_averaged
from gradient_ratio import judgement
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunetv2_mstkd.evaluation.results import (
    CASE,
    FOLD,
    METRIC,
    MODALITIES,
    MODEL,
    REGION,
    SUBSET,
    TRAINER,
    TRAINING,
    VALUE,
    patients_of,
    subset_size,
)
from nnunetv2_mstkd.phantom.dataset import DISCLAIMER
from nnunetv2_mstkd.statistics.bootstrap import AVERAGE, HIGH, LOW, Bootstrap
from nnunetv2_mstkd.statistics.findings import mean_by_count, summary
from nnunetv2_mstkd.statistics.trainings import widen

KIND_COLORS = {"floor": "0.5", "control": "tab:orange", "method": "tab:blue", "ablation": "tab:cyan"}


def row_numbers(results: pd.DataFrame, rows: Sequence[Row], best: str | None) -> dict[str, dict[str, Any]]:
    """Accuracy of the rows that were evaluated on all subsets, in Dice percent.

    Parameters
    ----------
    results:
        of these rows; seeds as ``training``.
    best:
        the best control, against which all others are compared.
    """
    dice = results[results[METRIC] == DICE]
    bootstrap = Bootstrap(patients_of(dice))
    averaged = regions_averaged(results)
    overall = summary(averaged, bootstrap=bootstrap).set_index(MODEL)
    counts = mean_by_count(averaged, bootstrap=bootstrap)
    seeds = averaged.groupby([MODEL, TRAINING])[VALUE].mean()
    numbers = {}
    for row in rows:
        own, of_row = overall.loc[row.name], dice[dice[MODEL] == row.name]
        by_count = counts[counts[MODEL] == row.name].set_index(MODALITIES)[VALUE]
        numbers[row.name] = {
            "mean": _over_seeds(*(100 * float(own[name]) for name in (VALUE, LOW, HIGH)), 100 * seeds[row.name]),
            "worst_subset": {own["worst_subset"]: 100 * float(own["worst"])},
            "by_modalities": {str(number): 100 * float(value) for number, value in by_count.items()},
            "regions": _by_region(of_row),
            "all_modalities": _by_region(only_full(of_row)),
            "by_subset": _percent(averaged[averaged[MODEL] == row.name].groupby(SUBSET, sort=False)[VALUE].mean()),
            "seeds": _percent(seeds[row.name]),
        }
        if best is not None and row.name != best:
            numbers[row.name]["minus_best_control"] = difference(results, row.name, best)
    return numbers


def _over_seeds(value: float, low: float, high: float, seeds: Sequence[float]) -> dict[str, float]:
    """A mean with its interval over cases, widened by the variation between trainings where there are several seeds."""
    samples = [np.asarray(seeds)] if len(seeds) > 1 else []
    limits = widen(np.array(value), np.array(low), np.array(high), samples, 0.95)
    return {VALUE: value, LOW: float(limits[0]), HIGH: float(limits[1])}


def _by_region(table: pd.DataFrame) -> dict[str, float]:
    means = table.groupby(REGION, sort=False)[VALUE].mean()
    return {**{SHORT.get(name, name): value for name, value in _percent(means).items()}, AVERAGE: 100 * means.mean()}


def _percent(values: pd.Series) -> dict[str, float]:
    return {str(name): 100 * float(value) for name, value in values.items()}


def dedicated_numbers(
    results: pd.DataFrame, dedicated: pd.DataFrame, rows: Sequence[Row], others: Sequence[str]
) -> list[dict[str, Any]]:
    """Networks of one subset against the models of all subsets, on that subset.

    Parameters
    ----------
    results, dedicated:
        of the models of all subsets, and of the networks of one subset each.
    rows:
        those of ``dedicated``.
    others:
        models of ``results`` to compare with.
    """
    numbers = []
    for row in rows:
        joined = pd.concat([dedicated[dedicated[MODEL] == row.name], results[results[SUBSET] == row.subset]])
        own = regions_averaged(joined[joined[MODEL] == row.name])[VALUE].mean()
        entry = {"row": row.name, "subset": row.subset, "dice": 100 * float(own)}
        entry["minus"] = {name: difference(joined, row.name, name) for name in others if name in set(results[MODEL])}
        numbers.append(entry)
    return numbers


def mean_gradients(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Gradient ratios by row, term and percent of the training, as means over the seeds."""
    lines = []
    for row, seeds in found.items():
        terms = dict.fromkeys((percent, name) for seed in seeds for percent, of in seed.items() for name in of)
        for percent, name in terms:
            entries = [seed[percent][name] for seed in seeds if name in seed.get(percent, {})]
            ratio, full = (float(np.mean([entry[key] for entry in entries])) for key in ("ratio", "full"))
            note = judgement(ratio, full)
            lines.append(
                {"row": row, "term": name, "percent": int(percent), "ratio": ratio, "full": full, "note": note}
            )
    return sorted(lines, key=lambda line: (list(found).index(line["row"]), line["term"], line["percent"]))


def control_at_equal_hours(
    numbers: Mapping[str, dict[str, Any]], longer: Mapping[str, Mapping[str, Any]], clock: str
) -> None:
    """Add to each row what the cheapest control reaches in the hours of that row, and the row's mean minus that.

    The control's mean is interpolated in the logarithm of its steps, between these numbers and those of a longer
    training. Rows that cost less than the control here, or more than there, get nothing.
    """
    if CHEAP_CONTROL not in numbers or CHEAP_CONTROL not in longer:
        return
    control, end = numbers[CHEAP_CONTROL], longer[CHEAP_CONTROL]
    if end["steps"] <= control["steps"]:
        return
    for name, entry in numbers.items():
        if name == CHEAP_CONTROL or not entry["cost"] or not control["cost"]:
            continue
        more = entry["cost"][clock] / control["cost"][clock]
        position = math.log(more) / math.log(end["steps"] / control["steps"])
        if 0 <= position <= 1:
            start = control["mean"][VALUE]
            dice = start + position * (end["mean"][VALUE] - start)
            entry["control_at_equal_hours"] = {
                "control": CHEAP_CONTROL,
                "steps": round(more * control["steps"]),
                "dice": dice,
                "minus": entry["mean"][VALUE] - dice,
            }


# ---- values by case ------------------------------------------------------------------------------------------------


def case_values(results: pd.DataFrame) -> dict[str, Any]:
    """Dice in percent by row, seed, region and subset: lists in the order of ``names``, the cases."""
    dice = results[results[METRIC] == DICE].sort_values(CASE, kind="stable")
    keys, values = [MODEL, TRAINING, REGION, SUBSET], {}
    for (model, seed, region, subset), part in dice.groupby(keys, sort=False):
        of_seed = values.setdefault(model, {}).setdefault(str(seed), {})
        of_seed.setdefault(region, {})[subset] = [round(100 * value, 2) for value in part[VALUE]]
    return {"names": sorted(dice[CASE].unique()), "values": values}


def results_of(cases: Mapping[str, Any]) -> pd.DataFrame:
    """The table of results that :func:`case_values` was given, to two decimals of a percent."""
    rows = [
        (model, "", "0", seed, case, subset, subset_size(subset), region, DICE, value / 100)
        for model, of_model in cases["values"].items()
        for seed, of_seed in of_model.items()
        for region, of_region in of_seed.items()
        for subset, of_subset in of_region.items()
        for case, value in zip(cases["names"], of_subset, strict=True)
    ]
    columns = [MODEL, TRAINER, FOLD, TRAINING, CASE, SUBSET, MODALITIES, REGION, METRIC, VALUE]
    return pd.DataFrame(rows, columns=columns).assign(**{TRAINER: "unknown"})


def compact_json(content: Mapping[str, Any]) -> str:
    """JSON with a list of numbers on one line."""
    return re.sub(r"\[[-\d.eE+,\s]+\]", lambda found: " ".join(found[0].split()), json.dumps(content, indent=1)) + "\n"


# ---- Markdown ------------------------------------------------------------------------------------------------------


def page(content: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """All tables."""
    about, numbers = content["about"], content["rows"]
    best = content["best_control"]
    counts = sorted({int(count) for entry in numbers.values() for count in entry.get("by_modalities", {})})
    regions = list(dict.fromkeys(name for entry in numbers.values() for name in entry.get("regions", {})))
    regions = [name for name in regions if name != AVERAGE]
    head = ["model", "steps", "mean [95 %]", *(f"{count} mod." for count in counts), *regions]
    head += [f"all: {name}" for name in regions]
    hours = about["clock"].replace("cpu_", "CPU ")
    at_hours = any("control_at_equal_hours" in entry for entry in numbers.values())
    head += [f"minus {best}" if best else "difference", "by seed", hours]
    head += [f"{CHEAP_CONTROL} in these hours (row minus it)"] if at_hours else []
    head += ["parameters", "memory"]
    body = []
    for row in rows:
        entry = numbers.get(row.name)
        if entry is None or "mean" not in entry:
            continue
        mean = entry["mean"]
        cells = [row.title, str(entry["steps"]), f"{mean[VALUE]:.1f} [{mean[LOW]:.1f}, {mean[HIGH]:.1f}]"]
        cells += [f"{entry['by_modalities'][str(count)]:.1f}" for count in counts]
        cells += [f"{entry[key][name]:.1f}" for key in ("regions", "all_modalities") for name in regions]
        less = entry.get("minus_best_control")
        by_seed = ", ".join(f"{value:+.2f}" for value in less["by_seed"]) if less else ""
        cells += [_with_limits(less) if less else "", by_seed]
        cost = _cost(entry["cost"], about["clock"])
        other = entry.get("control_at_equal_hours")
        cost[1:1] = [f"{other['dice']:.1f} ({other['minus']:+.1f})" if other else ""] if at_hours else []
        body.append([*cells, *cost])
    lines = ["# Accuracy under equal budgets", "", *_facts(about), "", *_table(head, body), ""]
    lines += [
        "Dice in percent, mean over cases; `mean` over subsets and regions, `all:` the input with all modalities. "
        f"Intervals: 95 %, over {_over(about)}. Steps: training steps of both stages together. "
        f"{hours[0].upper()}{hours[1:]}: of all stages, mean over seeds; memory: peak of the training process.",
        "",
    ]
    if at_hours:
        lines += [
            f"In these hours: the mean that `{CHEAP_CONTROL}` would have with the hours of the row, interpolated in "
            "the logarithm of its steps up to the next longer preset, whose first stage is longer too. Empty where a "
            "row costs less.",
            "",
        ]
    lines += [line for note in about.get("not_stored", ()) for line in (f"Not stored: {note}.", "")]
    lines += [
        "## Verdict",
        "",
        *(f"* {line['result']}: {line['claim']}: {line['found']}" for line in content["verdict"]),
    ]
    if content["subsets"]:
        several = len(about["seeds"]) > 1 and LOW in content["subsets"][0]
        over = "seeds and cases" if several else "cases alone, at corrected levels"
        lines += ["", f"## {content['student']} minus {best}, subset by subset", ""]
        body = [[line[SUBSET], _with_limits(line)] for line in content["subsets"]]
        lines += _table(["subset", f"difference [interval over {over}]"], body)
    if content["dedicated"]:
        others = content["dedicated"][0]["minus"]
        over = _over(about) if LOW in next(iter(others.values())) else "cases alone"
        lines += ["", "## A network for one subset alone", ""]
        body = [
            [entry["subset"], f"{entry['dice']:.1f}", *map(_with_limits, entry["minus"].values())]
            for entry in content["dedicated"]
        ]
        lines += [
            *_table(["subset", "Dice", *(f"minus {name}" for name in others)], body),
            "",
            f"Intervals: 95 %, over {over}.",
        ]
    if content["gradients"]:
        lines += ["", "## Gradient of each term over that of the segmentation loss", ""]
        lines += _table(
            ["model", "term", "training", "as weighted then", "at full weight", ""],
            [
                [
                    line["row"],
                    line["term"],
                    f"{line['percent']} %",
                    f"{line['ratio']:.1e}",
                    f"{line['full']:.1e}",
                    line["note"],
                ]
                for line in content["gradients"]
            ],
        )
    if about["not_measured"]:
        lines += ["", f"Not measured: {', '.join(about['not_measured'])}."]
    lines += ["", f"The data are synthetic: {DISCLAIMER}."] if _synthetic(about) else []
    return "\n".join([*lines, ""])


def _with_limits(entry: Mapping[str, Any]) -> str:
    """A difference and its interval over seeds and cases; of old results that lack the seeds, over cases."""
    low, high = (entry[LOW], entry[HIGH]) if LOW in entry else entry["over_cases"]
    return f"{entry['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"


def _over(about: Mapping[str, Any]) -> str:
    """What intervals are over."""
    return "seeds and cases" if len(about["seeds"]) > 1 else "cases alone, for these trained networks"


def _facts(about: Mapping[str, Any]) -> list[str]:
    data, budget = about["data"], about["budget"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    source = (
        f"Phantom, recipe {data['recipe']}, {data['spacing']} mm, {data['training_cases']} training"
        if _synthetic(about)
        else f"{data['name']}, {data['spacing']} mm, {data['training_cases']} labelled"
    )
    unlabelled = f", {data['unlabelled_cases']} unlabelled" if data.get("unlabelled_cases") else ""
    noise = f"boundaries of training labels moved by {data['label_noise']} mm; " if data.get("label_noise") else ""
    steps = f"{budget['first']} steps for teachers and other models to start from"
    rest = (
        f"{budget['hours']} hours for each model, these included"
        if "hours" in budget
        else f"{budget['student']} for what follows, {budget['total']} for models without a first stage"
    )
    return [
        f"Preset {about['preset']}, seeds {', '.join(map(str, about['seeds']))}; {about['machine']}; {about['date']}; "
        f"{versions}.",
        f"{source}{unlabelled} and {data['test_cases']} test cases; {noise}patch {data['patch']}, batch "
        f"{data['batch']}, widths {data['widths']}; {steps}, {rest}.",
    ]


def _synthetic(about: Mapping[str, Any]) -> bool:
    return "recipe" in about["data"]


def _cost(cost: Mapping[str, Any] | None, clock: str) -> list[str]:
    if not cost:
        return ["", "", ""]
    return [f"{cost[clock]:.2g}", f"{cost['parameters'] / 1e6:.2f} M", f"{cost['memory_mib']:.0f} MiB"]


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *body)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


# ---- figure --------------------------------------------------------------------------------------------------------


def figure(content: Mapping[str, Any], rows: Sequence[Row]) -> Figure:
    """Left the mean Dice by number of modalities, right the difference to the best control with its interval."""
    numbers = content["rows"]
    shown = [row for row in rows if "mean" in numbers.get(row.name, {})]
    drawing = Figure(figsize=(11, 1.6 + 0.4 * len(shown)), layout="constrained")
    FigureCanvasAgg(drawing)
    left, right = drawing.subplots(1, 2, sharey=True, width_ratios=(1.1, 1))
    places = np.arange(len(shown))
    counts = sorted({count for row in shown for count in numbers[row.name]["by_modalities"]})
    for place, row in zip(places, shown, strict=True):
        color, entry = KIND_COLORS[row.kind], numbers[row.name]
        for number in counts:
            value = entry["by_modalities"][number]
            # a marker, unlike a text, widens the axis; above the mean, which may be equal
            left.plot(value, place - 0.25, marker=f"${number}$", color="0.45", markersize=6, markeredgewidth=0.3)
        left.plot(entry["mean"][VALUE], place, marker="D", color=color, markersize=6, markeredgecolor="white")
        less = entry.get("minus_best_control")
        middle = less["difference"] if less else 0.0
        ends = [[middle - less["low"]], [less["high"] - middle]] if less else None
        right.errorbar(middle, place, xerr=ends, marker="D", color=color, markersize=6, capsize=3)
    left.set_yticks(places, [row.title for row in shown], fontsize=9)
    left.set_ylim(len(shown) - 0.4, -0.6)
    left.set_xlabel("Dice (%): mean over subsets, and with 1, 2 ... modalities")
    right.axvline(0, color="0.3", linewidth=0.8)
    right.set_xlabel(f"difference to {content['best_control'] or 'the best control'} (points, 95 %)")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
    kinds = [kind for kind in KIND_COLORS if any(row.kind == kind for row in shown)]
    handles = [
        left.plot([], [], marker="D", linestyle="none", color=KIND_COLORS[kind], label=kind)[0] for kind in kinds
    ]
    drawing.legend(handles=handles, loc="outside lower center", ncols=len(kinds), frameon=False, fontsize=9)
    return drawing
