"""What one training step yields, and a look at it before the optimiser moves: NaN never reaches the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from nnunetv2_mstkd.errors import DivergenceError
from nnunetv2_mstkd.training.distributed import gather

MAX_SKIPPED_STEPS = 20
"""Steps in a row that the gradient scaler may skip before a mixed-precision training counts as diverged."""
SKIPPED = f"gradients of {MAX_SKIPPED_STEPS} steps in a row"
MIN_SCALE = 2.0**-10
"""Of a gradient scaler, which begins with 2^16. It halves its scale at each step that it skips and doubles it after
2000 good ones, so one bad case in a hundred would lower it until all float16 gradients are 0."""

ANEW = "lower schedule.initial_lr and train anew: a continued training keeps the settings that it began with"
"""What to do where no case is to blame."""


LOGGED = ("total", "segmentation", "teacher", "unlabelled")
"""What the losses of a step are called that are no terms."""


class Target(NamedTuple):
    """The label at full resolution, as terms per voxel read it."""

    label: torch.Tensor
    """(B, 1, *spatial) integers, or (B, regions, *spatial) 0/1; the ignore label is replaced by background."""
    foreground: torch.Tensor
    """Bool, (B, 1, *spatial): any region or label above 0."""
    valid: torch.Tensor | None
    """Bool, (B, 1, *spatial): not the ignore label; None where the data set has none."""
    weight: torch.Tensor | None = None
    """Float, (B, 1, *spatial): how much each voxel counts in the logit terms; None: all alike."""


class Losses(NamedTuple):
    """The losses of one training step."""

    total: torch.Tensor
    """Scalar to differentiate."""
    terms: dict[str, torch.Tensor]
    """Unweighted scalars by name; ``segmentation`` is always among them."""
    adversary_input: tuple[torch.Tensor, float] | None = None
    """What the adversary's own step reads, without a graph, and its weight; None without an adversary."""


@dataclass(frozen=True)
class Term:
    """A weighted loss term beside the segmentation loss."""

    name: str
    """For the log; unique in a trainer."""
    weight: float
    """Factor of the term in the total; a term of weight 0 is neither computed nor logged."""
    function: Callable[[Any, Any, Any], torch.Tensor]
    """``function(student, teacher, target) -> scalar``, with what the two networks returned (logits at full
    resolution) and a :class:`Target`."""
    needs_teacher: bool = True
    """Whether it compares with a teacher. Ramp and fade act on these terms only, and they see only the samples that the
    teacher may judge: those of complete cases, for most trainers."""
    factor: Callable[[], float] | None = None
    """Factor of the weight at this iteration, of a term that needs the teacher; None: the trainer's
    ``teacher_factor``."""

    def value(self, student: Any, teacher: Any, target: Target) -> torch.Tensor:
        """Return what ``function`` returns; TypeError names the term if that is no scalar tensor."""
        found = self.function(student, teacher, target)
        if not isinstance(found, torch.Tensor) or found.ndim:
            shape = f" of shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else ""
            what = type(found).__name__ + shape
            raise TypeError(f"the term {self.name!r} returned {what}, expected a scalar tensor; reduce it with .mean()")
        return found


def active_terms(*terms: Term, reserved: Sequence[str] = LOGGED) -> tuple[Term, ...]:
    """Return the terms of weight above 0; the others are neither computed nor logged.

    Raises
    ------
    ValueError
        If a weight is negative, two terms have one name, or a term has a name of ``reserved``, which the log would mix
        up.
    """
    names = [term.name for term in terms]
    for term in terms:
        if not term.weight >= 0:
            raise ValueError(f"the term {term.name!r} has the weight {term.weight}, expected 0 or more")
        if term.name in reserved or names.count(term.name) > 1:
            raise ValueError(
                f"the name of the term {term.name!r} is in use: terms need names of their own, other than "
                f"{', '.join(reserved)}"
            )
    return tuple(term for term in terms if term.weight > 0)


def add_terms(
    total: torch.Tensor, values: dict[str, torch.Tensor], terms: Iterable[Term], output: Any, target: Target
) -> torch.Tensor:
    """Return a total with weighted terms that need no teacher, whose values are noted by name in ``values``."""
    for term in terms:
        values[term.name] = term.value(output, None, target)
        total = total + term.weight * values[term.name]
    return total


def rows_of(output: Any, rows: torch.Tensor | slice) -> Any:
    """Return some samples of what a network or a loader returned: tensors (B, ...), or tuples and lists of these.

    Scalars, such as a loss that the network has computed, and what is no tensor stay as they are.
    """
    if isinstance(output, torch.Tensor):
        return output[rows] if output.ndim else output
    if isinstance(output, (tuple, list)):
        parts = [rows_of(part, rows) for part in output]
        return output._make(parts) if hasattr(output, "_make") else type(output)(parts)
    return output


class LossMonitor:
    """Reads the losses of each step with a single copy to the host, and stops a training that diverges."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._suspects: Counter[str] = Counter()
        self.skipped_steps = 0
        """Steps in a row, up to the last one, that the gradient scaler has skipped."""
        self._scale: float | None = None

    def read(
        self, losses: Losses, grad_scaler: torch.amp.GradScaler | None, *, moment: str, cases: Sequence[str]
    ) -> dict[str, float]:
        """Return the values of the terms, after the backward pass and before the optimiser's step.

        ``moment`` (``epoch 3, iteration 17``) and ``cases``, the identifiers of the batch, are for the message.

        Raises
        ------
        DivergenceError
            Naming moment, terms and cases, if a loss is not finite, so that weights and last checkpoint stay good. A
            gradient scaler skips such a step, which is logged; 20 skipped steps in a row end the training, and so do
            single ones that are so frequent that its scale falls below :data:`MIN_SCALE`.
        """
        values = [losses.total, *losses.terms.values()]
        if grad_scaler is not None:
            values.append(grad_scaler.scale(torch.ones_like(losses.total)))
        # the one copy to the host; a second synchronisation is the scaler's own, in its step
        host = torch.stack([value.detach().float() for value in values]).cpu().numpy()
        if grad_scaler is not None:
            host, scale = host[:-1], float(host[-1])
            # the scaler shows by a smaller scale that it has skipped the step before
            skipped = self._scale is not None and scale < self._scale
            self.skipped_steps = self.skipped_steps + 1 if skipped else 0
            self._scale = scale
        found = dict(zip(["total", *losses.terms], host, strict=True))
        self._refuse_nan(found, moment, cases, mixed_precision=grad_scaler is not None)
        del found["total"]
        return found

    def _refuse_nan(
        self, values: Mapping[str, float], moment: str, cases: Sequence[str], *, mixed_precision: bool
    ) -> None:
        bad = [name for name, value in values.items() if not np.isfinite(value)]
        too_many = self.skipped_steps >= MAX_SKIPPED_STEPS
        if bad and mixed_precision:
            self._suspects.update(map(str, cases))
        worn = self._scale is not None and self._scale < MIN_SCALE
        worn = worn and not self.skipped_steps  # steps that are skipped in a row are counted instead
        suspects = Counter[str]()
        if worn or too_many:  # in all processes at the same step, because gradients are averaged
            suspects = sum(gather(self._suspects), suspects)
        likely = [case for case, _ in suspects.most_common(5)]
        if worn:
            often = ", ".join(likely) or "none: the losses were finite"
            raise DivergenceError(
                f"{moment}: steps were skipped so often that the scale of the gradients has fallen to {self._scale:g}, "
                f"at which float16 gradients vanish. Repair or leave out the cases of the skipped steps (most often: "
                f"{often}) and continue from the last checkpoint with --c, or {ANEW}"
            )
        if not bad and not too_many:
            return
        if not bad and likely:
            cases = likely  # of another process
        where = f"not finite in {moment}: {', '.join(bad or [SKIPPED])} (cases {', '.join(map(str, cases))})"
        if mixed_precision and not too_many:  # an overflow is normal: another scale may do
            self._log(f"{where}; the step is skipped")
            return
        raise DivergenceError(
            f"{where}. Nothing was saved. Look at these cases for NaN or extreme voxels and continue from the last "
            f"checkpoint with --c, or {ANEW}"
        )
