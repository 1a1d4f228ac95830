"""Names of the files of an evaluation and of a comparison, for modules that only look them up; stdlib only."""

from __future__ import annotations

from pathlib import Path

FOLDER = "subsets"
"""The evaluation's folder in the model folder."""

RESULTS = "results.csv"
SUMMARY = "summary.json"
"""``{"subsets": {"T1ce+FLAIR": {"WT": {"dice": 0.8, ...}, ...}, ...}, ...}``"""

TABLES = {"markdown": "tables.md", "latex": "tables.tex"}
REPORT = "report.html"
CASES = "cases"
"""Folder with ``fold_0/CASE.json``, the results of a case, and ``CASE.npz``, one slice of it."""

RUN = "run.json"
"""In that folder: the options of the evaluation, which all of its results share."""


def cases_file(output: Path, fold: int | str) -> Path:
    """The file of an evaluation that names the validation cases of a fold that it evaluates: ``{"cases": [...]}``."""
    return output / CASES / f"fold_{fold}.json"


COMPARISON = "comparison.html"
"""The file that ``mstkd compare`` writes last."""

PRESENCE = "presence.csv"
"""What the presence head of a model says of each case and subset, where it has one."""
