"""Consistency of outputs between student and teacher: the output-level term of AdaMM's distillation (BBDM).

AdaMM: "No Modality Left Behind", whose released code inherits the term from SMU-Net.
"""

from __future__ import annotations

import torch

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

    Parameters
    ----------
    student, teacher : Tensor, shape (B, K, *spatial)
        Logits of K overlapping regions (sigmoid) or K classes (softmax, class 0 is the background).
    regions : bool
        True for region heads, False for softmax classes.
    valid : Tensor of bool, shape (B, 1, *spatial), optional
        False at voxels to leave out (ignore label).
    voxel_weight : Tensor, shape (B, 1, *spatial), at least 0, optional
        Factor w; the denominator does not depend on it, so that distillation fades as fewer voxels ask for it.

    Returns
    -------
    Tensor of float32, scalar in [0, 1]; 0 for equal logits and when no voxel is valid.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    if student.shape != teacher.shape or student.ndim < 3:
        raise ValueError(
            f"found student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)}, expected equal "
            "shapes (B, K, *spatial)"
        )
    with torch.autocast(device_type=student.device.type, enabled=False):
        ours, theirs = foreground_probabilities(student, regions), foreground_probabilities(teacher.detach(), regions)
        difference = (ours - theirs).square()
        size = ours.square() + theirs.square()
        if voxel_weight is not None:
            difference = difference * voxel_weight.detach()
        count: float | torch.Tensor = float(ours[0].numel())
        if valid is not None:
            difference, size = torch.where(valid, difference, 0.0), torch.where(valid, size, 0.0)
            count = valid.flatten(1).sum(1).clamp_min(1) * ours.shape[1]
        return (difference.flatten(1).sum(1) / (size.flatten(1).sum(1) + _FLOOR * count)).mean()


def foreground_probabilities(logits: torch.Tensor, regions: bool) -> torch.Tensor:
    """Sigmoid of regions, or softmax without class 0, in float32; shape (B, foreground heads, *spatial)."""
    return logits.float().sigmoid() if regions else logits.float().softmax(1)[:, 1:]
