"""Where a teacher is more right than its student."""

from __future__ import annotations

import torch

from nnunetv2_mstkd.losses.logits import cross_entropy_map, prepare


@torch.no_grad()
def teacher_advantage(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    *,
    regions: bool,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Where the teacher is more right than the student: a ``voxel_weight`` for losses of logits.

    1 where the teacher's cross-entropy against the label (binary cross-entropy summed over regions, or softmax
    cross-entropy) is strictly lower than the student's, else 0. Not part of MST-KDNet (MICCAI 2025), which copies the
    teacher everywhere: a teacher that is itself undertrained then holds the student back.

    ``target`` is the label; see :mod:`nnunetv2_mstkd.losses` for this and the other arguments.

    Returns
    -------
    Tensor of float32, shape (B, 1, *spatial), entries 0 or 1, without a graph; 0 at voxels that are not valid.
    """
    student, teacher, valid = prepare(student, teacher, regions, valid)
    expected = tuple(student.shape) if regions else tuple(valid.shape)
    if tuple(target.shape) != expected:
        raise ValueError(f"target has shape {tuple(target.shape)}, expected {expected} with regions={regions}")
    with torch.autocast(device_type=student.device.type, enabled=False):
        target = torch.where(valid, target, 0)
        ours, theirs = (cross_entropy_map(each, target, regions).sum(1, keepdim=True) for each in (student, teacher))
        return (valid & (theirs < ours)).float()
