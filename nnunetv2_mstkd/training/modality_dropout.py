"""nnU-Net with random missing modalities: the bar that published methods rarely clear, and the base of all others."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from nnunetv2.training.loss.dice import get_tp_fp_fn_tn
from nnunetv2.utilities.collate_outputs import collate_outputs
from torch import distributed as dist

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.training.base import SettingsTrainer, check_subsets
from nnunetv2_mstkd.training.settings import Settings
from nnunetv2_mstkd.training.step import StepLoss


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
        return super().step_loss(modalities.mask_modalities(data, availability), target)

    def step_loss(self, data: torch.Tensor, target: Any) -> StepLoss:
        return self.compute_loss(data, target, self.draw_availability(len(data)))

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

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        names = train_outputs[0]["names"]
        means = np.mean([output["terms"] for output in train_outputs], 0)
        if self.is_ddp:
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, means)
            means = np.mean(everyone, 0)
        super().on_train_epoch_end(train_outputs)
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
