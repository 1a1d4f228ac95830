"""The teacher's probabilities as soft labels."""

from __future__ import annotations

import torch
from torch.nn import functional

from nnunetv2_mstkd.losses.logits import check_logits, mean_over_voxels, probabilities, valid_map


def soft_label_divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    regions: bool,
    valid: torch.Tensor | None = None,
    voxel_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Kullback-Leibler divergence of the student's probabilities from the teacher's, mean over voxels.

    ``loss = mean over valid voxels of w KL(p^f || p^m)``: of each region's two outcomes, then the mean over regions, or
    of the classes. This is the distillation of Hinton et al. (2015) at temperature 1. The teacher gets no gradient.

    Arguments are those of :mod:`nnunetv2_mstkd.losses`. The loss is at least 0: 0 for equal logits and when no voxel is
    valid.
    """
    check_logits(student, teacher, regions)
    valid = valid_map(valid, student)
    with torch.autocast(device_type=student.device.type, enabled=False):
        # an invalid voxel may hold anything, NaN included
        student, teacher = (torch.where(valid, each.float(), 0.0) for each in (student, teacher.detach()))
        target = probabilities(teacher, regions)
        if regions:
            entropy = functional.binary_cross_entropy_with_logits
            loss = entropy(student, target, reduction="none") - entropy(teacher, target, reduction="none")
            loss = loss.mean(1, keepdim=True)
        else:
            loss = (target * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1, keepdim=True)
        return mean_over_voxels(loss, valid, voxel_weight)
