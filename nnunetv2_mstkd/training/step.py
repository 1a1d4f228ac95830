"""One step of training: the loss is read before the optimiser moves, so that NaN never reaches the weights."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_mstkd.errors import DivergenceError

MAX_SKIPPED_STEPS = 20
"""Steps in a row that the gradient scaler may skip before a mixed-precision training counts as diverged."""
SKIPPED = f"gradients of {MAX_SKIPPED_STEPS} steps in a row"


class StepLoss(NamedTuple):
    """What one forward pass of a training step yields.

    Attributes
    ----------
    total:
        scalar to differentiate.
    terms:
        unweighted scalars by name; ``segmentation`` is always among them.
    """

    total: torch.Tensor
    terms: dict[str, torch.Tensor]


class CheckedStepTrainer(nnUNetTrainer):
    """nnU-Net's training step, cut where others hook in: loss, backward pass, look at the loss, optimiser."""

    _skipped_steps = 0
    """Steps in a row, up to the last one, that the gradient scaler has skipped."""
    _scale: float | None = None
    """The gradient scaler's, at the last step."""
    _step_in_epoch = 0

    def optimise(self, batch: dict) -> dict:
        """One step of the optimiser. Returns ``loss`` as nnU-Net logs it, and the terms with their names.

        Raises
        ------
        FloatingPointError
            naming step, terms and cases, if the loss is not finite: before the optimiser's step, so that weights and
            last checkpoint stay good. A gradient scaler skips such a step, and the log tells of it; with one, 20
            skipped steps in a row are the end.
        """
        data, target = self._to_device(batch)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            step = self.step_loss(data, target)
        names = list(step.terms)
        values = [step.total, *step.terms.values()]
        self.backward(step.total)
        if self.grad_scaler is not None:
            values.append(self.grad_scaler.scale(torch.ones_like(step.total)))
        # the one copy to the host; a second synchronisation is the scaler's own, in its step
        host = torch.stack([value.detach().float() for value in values]).cpu().numpy()
        if self.grad_scaler is not None:
            host, scale = host[:-1], float(host[-1])
            self._count_skipped(scale)
        self._refuse_nan(dict(zip(["total", *names], host, strict=True)), batch)
        self._update()
        self.after_update(batch)
        return {"loss": host[1 + names.index("segmentation")], "terms": host[1:], "names": names}

    def step_loss(self, data: torch.Tensor, target: Any) -> StepLoss:
        """Forward pass and loss of one step, under autocast; nnU-Net's own here.

        Parameters
        ----------
        data:
            complete batch (B, C, *spatial) on the device.
        target:
            tensor, or a list of tensors under deep supervision.
        """
        loss = self.loss(self.network(data), target)
        return StepLoss(loss, {"segmentation": loss})

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss, scaled where the training is in mixed precision."""
        (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()

    def clipped_together(self) -> list[torch.nn.Module]:
        """Modules whose gradients are clipped to a norm of 12 (nnU-Net's), each for itself."""
        return [self.network]

    def after_update(self, batch: dict) -> None:
        """Hook for a second optimiser's own step."""

    def _clip(self) -> None:
        for module in self.clipped_together():
            torch.nn.utils.clip_grad_norm_(module.parameters(), 12)

    def _update(self) -> None:
        if self.grad_scaler is None:
            self._clip()
            self.optimizer.step()
            return
        self.grad_scaler.unscale_(self.optimizer)
        self._clip()
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _count_skipped(self, scale: float) -> None:
        # the scaler shows by a smaller scale that it has skipped the step before
        skipped = self._scale is not None and scale < self._scale
        self._skipped_steps = self._skipped_steps + 1 if skipped else 0
        self._scale = scale

    def _refuse_nan(self, values: dict[str, float], batch: dict) -> None:
        bad = [name for name, value in values.items() if not np.isfinite(value)]
        too_many = self._skipped_steps >= MAX_SKIPPED_STEPS
        if too_many:
            bad = bad or [SKIPPED]
        if not bad:
            return
        cases = ", ".join(map(str, batch.get("keys", ["unknown"])))
        where = (
            f"not finite in epoch {self.current_epoch}, iteration {self._step_in_epoch}: {', '.join(bad)} (cases "
            f"{cases})"
        )
        if self.grad_scaler is not None and not too_many:  # an overflow is normal: another scale may do
            self.print_to_log_file(f"{where}; the step is skipped")
            return
        raise DivergenceError(
            f"{where}. Nothing was saved. Look at these cases for NaN or extreme voxels, or lower "
            f"schedule.initial_lr; continue from the last checkpoint with --c"
        )

    def _to_device(self, batch: dict) -> tuple[torch.Tensor, Any]:
        data, target = batch["data"].to(self.device, non_blocking=True), batch["target"]
        if isinstance(target, list):
            return data, [level.to(self.device, non_blocking=True) for level in target]
        return data, target.to(self.device, non_blocking=True)

    def _autocast(self):
        # nnU-Net's rule: only CUDA gains from autocast
        if self.device.type == "cuda":
            return torch.autocast("cuda", enabled=True)
        return contextlib.nullcontext()
