"""nnU-Net with random missing modalities: the bar that published methods rarely clear, and the base of all others."""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from nnunetv2.training.loss.dice import get_tp_fp_fn_tn
from nnunetv2.utilities.collate_outputs import collate_outputs
from torch import distributed as dist

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.settings import Settings
from nnunetv2_mstkd.trainers.base import MAX_SKIPPED_STEPS, SKIPPED, SettingsTrainer, check_subsets


class StepLoss(NamedTuple):
    """What one forward pass of a training step yields.

    Attributes
    ----------
    total:
        scalar to differentiate.
    terms:
        unweighted scalars by name; ``segmentation`` is always among them.
    logits:
        finest student logits (B, K, *spatial).
    """

    total: torch.Tensor
    terms: dict[str, torch.Tensor]
    logits: torch.Tensor


class Target(NamedTuple):
    """The label at full resolution, as terms per voxel read it.

    Attributes
    ----------
    label:
        (B, 1, *spatial) integers, or (B, regions, *spatial) 0/1; the ignore label is replaced by background.
    foreground:
        bool, (B, 1, *spatial): any region or label above 0.
    valid:
        bool, (B, 1, *spatial): not the ignore label; None where the data set has none.
    weight:
        float, (B, 1, *spatial): how much each voxel counts in the logit terms; None: all alike.
    """

    label: torch.Tensor
    foreground: torch.Tensor
    valid: torch.Tensor | None
    weight: torch.Tensor | None = None


class ModalityDropoutTrainer(SettingsTrainer):
    """Each sample of a training batch keeps a random non-empty subset of its modalities; nothing else changes.

    Subsets are drawn after augmentation (which would make a zeroed channel non-zero) and applied on the device.
    Online validation goes through a fixed list of subsets, so that ``checkpoint_best`` is the best one for missing
    modalities; ``train_losses`` of nnU-Net's log is the segmentation loss alone.
    """

    @classmethod
    def check_plans(cls, configuration_manager, dataset_json: dict, settings: Settings) -> None:
        super().check_plans(configuration_manager, dataset_json, settings)
        check_subsets(cls, configuration_manager, dataset_json, settings)

    def adopt(self, settings: Settings) -> None:
        super().adopt(settings)
        names = modalities.modality_names(self.dataset_json)
        self.sampler = self.settings.sampler.build(names)
        self.validation_subsets = modalities.validation_subsets(len(names))
        self.num_val_iterations_per_epoch = max(
            self.num_val_iterations_per_epoch,
            math.ceil(len(self.validation_subsets) / self.configuration_manager.batch_size),
        )
        self._subset_generator = torch.Generator()
        self._subset_generator.seed()

    def _seed_everything(self, epoch: int) -> None:
        super()._seed_everything(epoch)
        if self.settings.schedule.seed is not None:
            self._subset_generator.manual_seed(int(torch.randint(2**31, ())))

    # ---- training ----------------------------------------------------------------------------------------------

    def draw_availability(self, batch_size: int) -> torch.Tensor:
        """Which modalities each sample keeps in this step: bool, (B, C), on the CPU."""
        return self.sampler.sample(batch_size, generator=self._subset_generator)

    def compute_loss(self, data: torch.Tensor, target: Any, availability: torch.Tensor) -> StepLoss:
        """Forward pass and loss of one step, under autocast.

        Parameters
        ----------
        data:
            complete batch (B, C, *spatial) on the device.
        target:
            tensor, or a list of tensors under deep supervision.
        availability:
            bool, (B, C).
        """
        output = self.network(modalities.mask_modalities(data, availability))
        loss = self.loss(output, target)
        return StepLoss(loss, {"segmentation": loss}, output[0] if isinstance(output, (list, tuple)) else output)

    def optimise(self, batch: dict) -> dict:
        data, target = self._to_device(batch)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            step = self.compute_loss(data, target, self.draw_availability(len(data)))
        names = list(step.terms)
        values = [step.total, *step.terms.values()]
        self.backward(step.total)
        if self.grad_scaler is not None:
            values.append(torch.isfinite(step.logits.detach()).all())
        # the one copy to the host in a step
        host = torch.stack([value.detach().float() for value in values]).cpu().numpy()
        self._refuse_nan(dict(zip(["total", *names], host, strict=False)), host, batch)
        self._update()
        self.after_update(batch)
        return {"loss": host[1 + names.index("segmentation")], "terms": host[1 : 1 + len(names)], "names": names}

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss, scaled where the training is in mixed precision."""
        (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()

    def clipped_together(self) -> list[torch.nn.Module]:
        """Modules whose gradients are clipped to a norm of 12 (nnU-Net's), each for itself."""
        return [self.network]

    def _clip(self) -> None:
        for module in self.clipped_together():
            torch.nn.utils.clip_grad_norm_(module.parameters(), 12)

    def _update(self) -> None:
        if self.grad_scaler is None:
            self._clip()
            self.optimizer.step()
            return
        before = self.grad_scaler.get_scale()
        self.grad_scaler.unscale_(self.optimizer)
        self._clip()
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        self.count_skipped_steps(before)

    def after_update(self, batch: dict) -> None:
        """Hook for a second optimiser's own step."""

    def _refuse_nan(self, values: dict[str, float], host: np.ndarray, batch: dict) -> None:
        """Stop before the optimiser's step, so that the last checkpoint stays good.

        Under mixed precision an overflow is normal, and the scaler skips the step; there the training stops at a
        non-finite term with finite logits, or after 20 skipped steps in a row.

        Raises
        ------
        FloatingPointError
            naming step, terms and cases.
        """
        bad = [name for name, value in values.items() if not np.isfinite(value)]
        if self.grad_scaler is not None:
            overflow = not host[-1]
            if self._skipped_steps < MAX_SKIPPED_STEPS and (not bad or overflow):
                return
            bad = bad or [SKIPPED]
        if bad:
            raise self.diverged(bad, batch)

    def read_target(self, target: torch.Tensor) -> Target:
        """Split nnU-Net's full-resolution target into label, foreground and valid voxels."""
        labels = self.label_manager
        if labels.has_regions:
            valid = ~target[:, -1:].bool() if labels.has_ignore_label else None
            label = target[:, :-1] if labels.has_ignore_label else target
            return Target(label, label.bool().any(1, keepdim=True), valid)
        valid = target != labels.ignore_label if labels.has_ignore_label else None
        label = target if valid is None else torch.where(valid, target, 0)
        return Target(label, label > 0, valid)

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

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        names = train_outputs[0]["names"]
        means = np.mean([output["terms"] for output in train_outputs], 0)
        if self.is_ddp:
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, means)
            means = np.mean(everyone, 0)
        super().on_train_epoch_end([{"loss": output["loss"]} for output in train_outputs])
        self.log_terms(dict(zip(names, means.tolist(), strict=True)))

    def log_terms(self, values: dict[str, float]) -> None:
        """One line in the log file, one entry in nnU-Net's logger."""
        self.terms.log(values, self.current_epoch)
        self.print_to_log_file("terms: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    # ---- online validation --------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._validation_step = 0

    def _validation_rows(self, batch_size: int) -> torch.Tensor:
        """Entries of the fixed list for this step: sample n of an epoch gets entry n mod S, whatever the ranks."""
        whole, offset = self.configuration_manager.batch_size, 0
        if self.is_ddp:
            rank, ranks = dist.get_rank(), dist.get_world_size()
            offset = rank * (whole // ranks) + min(rank, whole % ranks)
        first = self._validation_step * whole + offset
        return torch.arange(first, first + batch_size) % len(self.validation_subsets)

    def validation_step(self, batch: dict) -> dict:
        data, target = self._to_device(batch)
        rows = self._validation_rows(len(data))
        self._validation_step += 1
        with self._autocast():
            output = self.network(modalities.mask_modalities(data, self.validation_subsets[rows]))
            loss = self.loss(output, target)
        if self.enable_deep_supervision:
            output, target = output[0], target[0]
        counts = self._count(output, target)
        return {"loss": loss.detach().cpu().numpy(), "counts": counts, "rows": rows.numpy()}

    def _count(self, output: torch.Tensor, target: torch.Tensor) -> np.ndarray:
        """True positives, false positives and false negatives per sample and foreground head: (B, heads, 3)."""
        labels = self.label_manager
        mask = None
        if labels.has_regions:
            predicted = (output > 0).long()
            if labels.has_ignore_label:
                mask, target = ~target[:, -1:].bool(), target[:, :-1]
        else:
            predicted = torch.zeros_like(output, dtype=torch.long).scatter_(1, output.argmax(1, keepdim=True), 1)
            if labels.has_ignore_label:
                mask = target != labels.ignore_label
                target = torch.where(mask, target, 0)
        spatial = list(range(2, output.ndim))
        tp, fp, fn, _ = get_tp_fp_fn_tn(predicted, target, axes=spatial, mask=None if mask is None else mask.float())
        counts = torch.stack([tp, fp, fn], -1).cpu().numpy()
        return counts if labels.has_regions else counts[:, 1:]

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Dice per subset from that subset's pooled counts, then the mean over subsets."""
        collated = collate_outputs(val_outputs)
        counts, rows = collated["counts"], collated["rows"]
        counts, rows, loss = counts.reshape(-1, *counts.shape[2:]), rows.reshape(-1), np.mean(collated["loss"])
        if self.is_ddp:
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, (counts, rows, loss))
            counts = np.concatenate([entry[0] for entry in everyone])
            rows = np.concatenate([entry[1] for entry in everyone])
            loss = np.mean([entry[2] for entry in everyone])
        pooled = np.zeros((len(self.validation_subsets), *counts.shape[1:]))
        np.add.at(pooled, rows, counts)
        tp, fp, fn = np.moveaxis(pooled, -1, 0)
        size = 2 * tp + fp + fn
        dice = np.divide(2 * tp, size, out=np.full_like(size, np.nan), where=size > 0)
        # a subset with nothing to find and nothing found says nothing; NaN would stay in nnU-Net's moving average
        mean = np.nan_to_num(_nanmean(_nanmean(dice, 1), 0))
        self.logger.log("mean_fg_dice", float(mean), self.current_epoch)
        self.logger.log("dice_per_class_or_region", _nanmean(dice, 0).tolist(), self.current_epoch)
        self.logger.log("val_losses", loss, self.current_epoch)


def _nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean over the entries that are not NaN; NaN, without NumPy's warning, where there is none."""
    known = ~np.isnan(values)
    count = known.sum(axis)
    return np.where(count > 0, np.where(known, values, 0.0).sum(axis) / np.maximum(count, 1), np.nan)
