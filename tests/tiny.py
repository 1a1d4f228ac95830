"""Tiny trainers on hand-made plans: those of :mod:`nnunetv2_mstkd.testing`, and what only our own tests need."""

from __future__ import annotations

from typing import Any

from nnunetv2_mstkd.methods.mstkd.settings import TERMS
from nnunetv2_mstkd.testing import (
    DATASET,
    LABELS,
    REGIONS,
    batch,
    dataset_json,
    give_teacher,
    make_trainer,
    plans,
    same,
    state,
    wake,
    write_empty_data,
)

__all__ = [
    "DATASET", "LABELS", "LABELS_WITH_IGNORE", "NO_TERMS", "REGIONS", "REGIONS_WITH_IGNORE", "batch", "dataset_json",
    "give_teacher", "make_trainer", "memory", "plans", "same", "state", "wake",
    "write_empty_data",
]  # fmt: skip

LABELS_WITH_IGNORE = {**LABELS, "ignore": 3}
REGIONS_WITH_IGNORE = {**REGIONS, "ignore": 3}

NO_TERMS: dict[str, dict[str, Any]] = {
    "mstkd": dict.fromkeys(TERMS, 0),
    "distillation": {"where": "everywhere", "soft_labels": 0},
    "adamm": {"consistency": 0, "content": 0, "style": 0, "adversarial": 0},
    "medmap": {"weight": 0},
    "smml": {"pixel": 0, "feature": 0},
    "mmformer": {"separate": 0},
    "rfnet": {"separate": 0},
    "teacher": {"warm_start": False},
}
"""Settings with which the distilling trainers need no teacher."""


def memory(trainer: Any) -> list[Any]:
    """What the optimiser remembers of past gradients."""
    content = trainer.optimizer.state_dict()
    return [member["state"] for member in content.get("members", [content])]
