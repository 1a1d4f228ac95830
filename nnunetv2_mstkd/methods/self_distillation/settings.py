"""Settings of self-distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from nnunetv2_mstkd.training.settings import Range, Section


@dataclass(frozen=True, kw_only=True)
class SelfDistillationSettings(Section):
    """Which version of the model acts as its teacher; weight, ramp and period are in the section ``distillation``."""

    NAME: ClassVar[str] = "self_distillation"
    NETWORK_KEYS: ClassVar[tuple[str, ...]] = ()

    decay: Annotated[float, Range(0, 1, below=True)] = 0.0
    """0: the teacher is the model as it is now. Above 0: a moving average of its weights, of which this share is kept
    in each training step (a mean teacher; 0.99 averages about 100 steps)."""
