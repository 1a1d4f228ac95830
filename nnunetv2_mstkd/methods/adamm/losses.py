"""The terms of AdaMM ("No Modality Left Behind") that no other method uses.

The output-level term of its distillation (BBDM), which its released code inherits from SMU-Net; lesion presence and the
reliability weight that follows from it (LGRM).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from nnunetv2_mstkd.losses.logits import (
    check_logits,
    dice_sums,
    foreground_masks,
    foreground_probabilities,
    soft_dice,
    where_valid,
)

_FLOOR = 1e-3


def probability_consistency(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    regions: bool,
    valid: torch.Tensor | None = None,
    voxel_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Squared difference of the foreground probabilities, relative to how much foreground both see.

    ``loss = sum(w (p^m - p^f)^2) / (sum((p^m)^2 + (p^f)^2) + 1e-3 n)`` per sample over its n valid voxels and
    foreground heads, then the mean over the batch.

    Changed against AdaMM's released code, a mean squared error with a weight that rises to 10: that falls with the
    lesion's share of the patch; here a lesion of any size counts alike down to about a thousandth of the patch, below
    which the floor keeps noise from being amplified. The teacher gets no gradient.

    Arguments are those of :mod:`nnunetv2_mstkd.losses`. The loss is in [0, 1]: 0 for equal logits and when no voxel is
    valid.
    """
    check_logits(student, teacher, regions)
    with torch.autocast(device_type=student.device.type, enabled=False):
        ours, theirs = (
            foreground_probabilities(where_valid(each, valid), regions) for each in (student, teacher.detach())
        )
        difference = (ours - theirs).square()
        size = ours.square() + theirs.square()
        if voxel_weight is not None:
            difference = difference * where_valid(voxel_weight.detach(), valid)
        count: float | torch.Tensor = float(ours[0].numel())
        if valid is not None:
            difference, size = torch.where(valid, difference, 0.0), torch.where(valid, size, 0.0)
            count = valid.flatten(1).sum(1).clamp_min(1) * ours.shape[1]
        return (difference.flatten(1).sum(1) / (size.flatten(1).sum(1) + _FLOOR * count)).mean()


class Presence(NamedTuple):
    """What a patch contains."""

    target: torch.Tensor
    """Float, (B, H): 1 where foreground head h has a voxel in the sample."""
    known: torch.Tensor
    """Bool, (B,): False for a sample without a valid voxel, about which nothing can be said."""


def presence_target(label: torch.Tensor, heads: int, *, regions: bool, valid: torch.Tensor | None = None) -> Presence:
    """Which of the H foreground heads (regions, or classes without the background) have any voxel in each sample."""
    found = label.bool() if regions else foreground_masks(label, heads + 1)
    found = (found if valid is None else found & valid).flatten(2).any(2)
    known = torch.ones_like(found[:, 0]) if valid is None else valid.flatten(1).any(1)
    return Presence(found.float(), known)


def presence_loss(logits: torch.Tensor, presence: Presence) -> torch.Tensor:
    """Binary cross-entropy of the presence logits (B, H), mean over the samples of which something is known, else 0."""
    with torch.autocast(device_type=logits.device.type, enabled=False):
        loss = functional.binary_cross_entropy_with_logits(logits.float(), presence.target, reduction="none").mean(1)
        known = presence.known.float()
        return (loss * known).sum() / known.sum().clamp_min(1.0)


def presence_gap(logits: torch.Tensor, presence: Presence) -> torch.Tensor:
    """``|q - t|``, how wrong the presence head is: (B, H) in [0, 1], without a graph; 0 where nothing is known."""
    with torch.autocast(device_type=logits.device.type, enabled=False):
        return (logits.detach().float().sigmoid() - presence.target).abs() * presence.known[:, None]


def reliability_dice(
    logits: torch.Tensor,
    label: torch.Tensor,
    gap: torch.Tensor,
    *,
    regions: bool,
    batch_dice: bool,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the reliability weight r = 1 + gap adds to the Dice part of a segmentation loss.

    ``loss = mean over samples and heads of gap (1 - Dice)``: added to nnU-Net's own loss it makes that loss's Dice part
    ``r (1 - Dice)``. Dice is soft, with nnU-Net's sums (no squares), over the foreground heads.

    Changed against AdaMM's released code: the weight is detached (there the product also trains the presence head), and
    cross-entropy stays as it is.

    Parameters
    ----------
    logits, label, regions, valid
        See :mod:`nnunetv2_mstkd.losses`.
    gap
        :func:`presence_gap`, (B, H).
    batch_dice
        Dice of the whole batch, as the plans may ask for; the gap is averaged over the batch then.
    """
    with torch.autocast(device_type=logits.device.type, enabled=False):
        found = foreground_probabilities(where_valid(logits, valid), regions)
        wanted = label.bool() if regions else foreground_masks(label, logits.shape[1])
        if valid is not None:
            found, wanted = torch.where(valid, found, 0.0), wanted & valid
        overlap, size = dice_sums(found, wanted)
        if batch_dice:
            overlap, size, gap = overlap.sum(0), size.sum(0), gap.mean(0)
        return (gap * (1 - soft_dice(overlap, size))).mean()
