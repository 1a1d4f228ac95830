"""Learning from unlabelled images: what another prediction is certain of is the label."""

from __future__ import annotations

import torch
from torch.nn import functional

from nnunetv2_mstkd.losses.logits import (
    check_logits,
    dice_sums,
    foreground_masks,
    foreground_probabilities,
    probabilities,
    soft_dice,
)


def pseudo_label_loss(
    student: torch.Tensor,
    guide: torch.Tensor,
    *,
    regions: bool,
    confidence: float = 0.7,
    temperature: float = 1.0,
    dice: float = 1.0,
) -> torch.Tensor:
    """Cross-entropy where the guide is certain, plus a soft Dice with its decisions.

    ``loss = mean over all voxels of [certain] CE(student, p) + dice (1 - mean soft Dice(student, decision of p))``, p
    the guide's probabilities. Regions: binary cross-entropy per region, certain where max(p, 1 - p) > confidence,
    decided at p > 0.5. Classes: cross-entropy with the soft target p, certain where the largest p > confidence, decided
    by the largest p; Dice over the foreground classes. Dice runs over all voxels of a sample. After FixMatch (Sohn et
    al., NeurIPS 2020), with soft targets and a guide that sees all modalities.

    Parameters
    ----------
    student, guide, regions
        See :mod:`nnunetv2_mstkd.losses`; the guide takes the teacher's place and gets no gradient.
    confidence
        From 0.5 to below 1.
    temperature
        Of the guide: its logits are divided by it, which changes no decision.
    dice
        Weight of the Dice.

    Returns
    -------
    Scalar of float32, at least 0.
    """
    check_logits(student, guide, regions)
    with torch.autocast(device_type=student.device.type, enabled=False):
        student, target = student.float(), probabilities(guide.detach() / temperature, regions)
        if regions:
            loss = functional.binary_cross_entropy_with_logits(student, target, reduction="none")
            certain, decided = torch.maximum(target, 1 - target) > confidence, target > 0.5
        else:
            loss = functional.cross_entropy(student, target, reduction="none").unsqueeze(1)
            certain = target.amax(1, keepdim=True) > confidence
            decided = foreground_masks(target.argmax(1, keepdim=True), target.shape[1])
        cross_entropy = torch.where(certain, loss, 0.0).mean()
        overlap, size = dice_sums(foreground_probabilities(student, regions), decided)
        return cross_entropy + dice * (1 - soft_dice(overlap, size)).mean()
