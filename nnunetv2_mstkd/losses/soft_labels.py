"""The teacher's probabilities as soft labels."""

from __future__ import annotations

import torch

from nnunetv2_mstkd.losses.logits import divergence_map, mean_over_voxels, prepare


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
    student, teacher, valid = prepare(student, teacher.detach(), regions, valid)
    with torch.autocast(device_type=student.device.type, enabled=False):
        divergence = divergence_map(student, teacher, regions).mean(1, keepdim=True)
        return mean_over_voxels(divergence, valid, voxel_weight)
