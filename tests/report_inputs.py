"""Results and pictures of three cases with three modalities, as an evaluation leaves them, and their report."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from nnunetv2_mstkd.evaluation.montage import Montage
from nnunetv2_mstkd.evaluation.results import COLUMNS, check_results
from nnunetv2_mstkd.evaluation.scoring import Rules
from nnunetv2_mstkd.reporting.page import FIGURE_TITLES, Pictures, html_report
from nnunetv2_mstkd.statistics.findings import Findings

EVIL = "<script>alert(1)</script>"
CASES = ("middling", EVIL, "fine")
LEVELS = {"middling": 0.6, EVIL: 0.3, "fine": 0.9}
MODALITIES = ("T1", '"><img src=x onerror=alert(2)>', "FLAIR & more")
RULES = Rules({"WT": (1, 2), "{{ 7 * 7 }}": (2,)}, (0, 1, 2, 3), metrics=("dice",), ignore_label=3)
RUN = {"channels": list(MODALITIES), "dataset": EVIL, "mirroring": True, "labels": None, "regions": {"WT": [1, 2]}}


def subsets(modalities: Sequence[str] = MODALITIES) -> list[str]:
    sizes = range(1, len(modalities) + 1)
    return ["+".join(part) for size in sizes for part in itertools.combinations(modalities, size)]


def results(modalities: Sequence[str] = MODALITIES, cases: Sequence[str] = CASES) -> pd.DataFrame:
    """Dice by case; each modality more adds a little, and so does the second region."""
    rows = [
        ("a <b>model</b>", "MSTKDTrainer", "0", case, subset, subset.count("+") + 1, region, "dice", value)
        for case in cases
        for subset in subsets(modalities)
        for number, region in enumerate(RULES.regions)
        for value in [LEVELS.get(case, 0.5) + 0.02 * subset.count("+") + 0.01 * number]
    ]
    return check_results(pd.DataFrame(rows, columns=list(COLUMNS)))


def montage(fold: str, case: str, modalities: Sequence[str] = MODALITIES) -> Montage:
    """A square of label 1 around one of label 2; each subset finds another part of it."""
    reference = np.zeros((40, 30), np.uint8)
    reference[10:20, 8:20] = 1
    reference[12:16, 10:14] = 2
    image = np.zeros((len(modalities), 40, 30), np.uint8)
    image[:, 4:36, 4:26] = 100
    image[-1, 10:20, 8:20] = 200
    found = {}
    for number, subset in enumerate(subsets(modalities)):
        found[subset] = reference.copy()
        found[subset][: 10 + number % 10] = 0
    return Montage(0, 11, 24, image, reference, found)


def with_further(fold: str, case: str) -> Montage:
    """The same, with two further slices, in which the image is darker and less is labelled."""
    first = montage(fold, case)
    further = []
    for index, less in ((5, 12), (17, 15)):
        other = montage(fold, case)
        other.reference[:less] = 0
        further.append(replace(other, index=index, images=other.images // 2))
    return replace(first, further=tuple(further))


def with_entropies(fold: str, case: str) -> Montage:
    """The slices of :func:`with_further`, with another entropy in each."""
    whole = with_further(fold, case)

    def add(each: Montage) -> Montage:
        maps = {subset: np.zeros((40, 30), np.uint8) for subset in each.segmentations}
        for number, entropy in enumerate(maps.values()):
            entropy[10:20, 8:20] = 5 * (each.index // 6 + number)
        return replace(each, entropies=maps)

    return replace(add(whole), further=tuple(map(add, whole.further)))


def report(
    folder: Path,
    frame: pd.DataFrame | None = None,
    *,
    number: int = 3,
    load: Callable[[str, str], Montage | None] = montage,
    near: tuple[int, int] | None = (5, 1000),
    run: dict | None = None,
    pages: dict | None = None,
    presence: pd.DataFrame | None = None,
) -> str:
    """The page, with figures of one colour."""
    figures = {}
    for name in FIGURE_TITLES:
        figures[name] = folder / name
        Image.new("RGB", (60, 40), "white").save(figures[name])
    findings = Findings(results() if frame is None else frame)
    pictures = Pictures(number, load)
    when = datetime(2026, 3, 4)
    return html_report(findings, RULES, run or RUN, near, figures, pictures, pages=pages, presence=presence, now=when)
