"""Where a teacher is more right than its student."""

from __future__ import annotations

import torch
from torch.nn import functional

from nnunetv2_mstkd.losses.logits import check_logits, valid_map


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
    check_logits(student, teacher, regions)
    expected = tuple(student.shape) if regions else (student.shape[0], 1, *student.shape[2:])
    if tuple(target.shape) != expected:
        raise ValueError(f"target has shape {tuple(target.shape)}, expected {expected} with regions={regions}")
    valid = valid_map(valid, student)
    with torch.autocast(device_type=student.device.type, enabled=False):
        target = torch.where(valid, target, torch.zeros_like(target))

        def cross_entropy(logits: torch.Tensor) -> torch.Tensor:
            logits = torch.where(valid, logits.float(), 0.0)
            if regions:
                loss = functional.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
                return loss.sum(1, keepdim=True)
            return functional.cross_entropy(logits, target[:, 0].long(), reduction="none").unsqueeze(1)

        return (valid & (cross_entropy(teacher) < cross_entropy(student))).float()
