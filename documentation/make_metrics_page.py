"""Write documentation/metrics.md from the tables of nnunetv2_mstkd/metrics/conventions.py.

python documentation/make_metrics_page.py
"""

from __future__ import annotations

import math
from pathlib import Path

from nnunetv2_mstkd.metrics.conventions import (
    CONVENTIONS,
    LESION_CONVENTIONS,
    LESION_RULES,
    METRICS,
    EmptyRule,
    LesionConvention,
)

PAGE = Path(__file__).with_name("metrics.md")
HEAD = """# Metrics and their conventions

Published numbers differ by these conventions more often than by their methods. `mstkd evaluate` prints the rules in use
below its tables. How to choose: [evaluation.md](evaluation.md#metrics). This page is made by
`documentation/make_metrics_page.py`.

## Metrics

| name | in tables | unit | better |
|---|---|---|---|
"""
EMPTY = """## Empty masks

The value of a metric if a mask is empty. *Left out*: the case has no value and is in no mean. *As computed*: the
formula holds.
"""
LESIONS = """## Lesion-wise conventions

`--lesion-convention`. Lesions of the reference whose dilations touch count as one, and a predicted lesion that touches
the dilation belongs to it. Lesions of the reference of at most the minimum volume are not scored. *Grouped*: predicted
components are grouped by dilation too, and groups of at most as many voxels as the minimum volume has mm3 are dropped.
*Joined*: lesions of a region that touch the same lesion of another region count as one.

| convention | dilation | minimum volume (mm3) | HD95 of a missed or false lesion | grouped | joined | source |
|---|---|---|---|---|---|---|
"""


def value(rule: float | str) -> str:
    """A rule's value in words."""
    if isinstance(rule, str):
        return rule
    return "left out" if math.isnan(rule) else f"{rule:g}"


def rules_table(rules: dict[str, EmptyRule], columns: tuple[str, str, str]) -> list[str]:
    """Lines of a table with the values of each metric."""
    head = [f"| metric | {' | '.join(columns)} |", "|---|---|---|---|"]
    return [*head, *(f"| {METRICS[name].label} | {' | '.join(map(value, rule))} |" for name, rule in rules.items()), ""]


def by_region(default: float, regions: dict[str, float]) -> str:
    """A value and the regions that have another one."""
    others: dict[float, list[str]] = {}
    for region, its_value in regions.items():
        others.setdefault(its_value, []).append(region)
    return "; ".join([f"{default:g}", *(f"{', '.join(names)} {its_value:g}" for its_value, names in others.items())])


def lesion_row(name: str, convention: LesionConvention) -> str:
    """The row of a lesion-wise convention."""
    penalty = "image diagonal" if convention.penalty_mm is None else f"{convention.penalty_mm:g} mm"
    joined = "; ".join(f"{region} by {', '.join(others)}" for region, others in convention.partners.items())
    return (
        f"| `{name}` | {by_region(convention.dilation, dict(convention.region_dilation))} "
        f"| {by_region(convention.min_volume, dict(convention.region_min_volume))} | {penalty} "
        f"| {'yes' if convention.group_predictions else 'no'} | {joined or 'no'} | {convention.source} |"
    )


def page() -> str:
    """The whole page as text."""
    better = {1: "higher", -1: "lower", 0: "closer to 0"}
    lines = [HEAD.rstrip()]
    lines += [f"| `{name}` | {one.label} | {one.unit} | {better[one.better]} |" for name, one in METRICS.items()]
    lines += ["", EMPTY]
    for name, convention in CONVENTIONS.items():
        lines += [f"### `--convention {name}`", "", f"{convention.source}.", ""]
        columns = ("both empty", "only the prediction empty", "only the reference empty")
        lines += rules_table(dict(convention.rules), columns)
    lines += [LESIONS.rstrip(), *(lesion_row(name, one) for name, one in LESION_CONVENTIONS.items()), ""]
    lines += ["In all of them:", ""]
    lines += rules_table(dict(LESION_RULES), ("nothing to score", "a missed lesion", "a false lesion"))
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
