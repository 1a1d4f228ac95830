"""Dual-mode logit distillation (DMLD) of MST-KDNet, equations (5)-(8), and where to apply it.

Paper: "Bridging the Gap in Missing Modalities: Leveraging Knowledge Distillation and Style Matching for Brain Tumor
Segmentation", MICCAI 2025. Logit standardisation: Sun et al., "Logit Standardization in Knowledge Distillation", CVPR
2024. All functions take the highest-resolution logits only.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def _check_logits(student: torch.Tensor, teacher: torch.Tensor, regions: bool) -> None:
    if student.shape != teacher.shape or student.ndim < 3:
        raise ValueError(
            f"found student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)}, expected equal "
            "shapes (B, K, *spatial)"
        )
    if not regions and student.shape[1] < 2:
        raise ValueError("found one softmax channel, expected at least two; one overlapping region needs regions=True")


def _check_map(name: str, voxel_map: torch.Tensor, logits: torch.Tensor, *, boolean: bool) -> None:
    expected = (logits.shape[0], 1, *logits.shape[2:])
    if tuple(voxel_map.shape) != expected or (boolean and voxel_map.dtype != torch.bool):
        raise ValueError(
            f"{name} has shape {tuple(voxel_map.shape)} and type {voxel_map.dtype}, expected {expected}"
            + (" and torch.bool" if boolean else "")
        )


def _valid_map(valid: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    if valid is None:
        return torch.ones_like(logits[:, :1], dtype=torch.bool)
    _check_map("valid", valid, logits, boolean=True)
    return valid


def _weighted(values: torch.Tensor, voxel_weight: torch.Tensor | None) -> torch.Tensor:
    if voxel_weight is None:
        return values
    _check_map("voxel_weight", voxel_weight, values, boolean=False)
    return values * voxel_weight.detach().float()


def logit_discrepancy(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    regions: bool,
    valid: torch.Tensor | None = None,
    voxel_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Squared difference of the logits, relative to the teacher's (equation 5, changed).

    ``loss = sum(w (l^m - l^f)^2) / max(sum((l^f)^2), number of elements)`` over the valid voxels and the heads of the
    batch. For softmax heads the mean over the classes of each voxel is subtracted from both logits first.

    Changed against MST-KDNet (MICCAI 2025): the paper's plain mean squared error grows with the square of the teacher's
    confidence; the denominator takes that away and, being at least the number of elements, never amplifies small
    logits. A constant added to all classes changes no softmax, hence the subtraction. The teacher gets no gradient.

    Parameters
    ----------
    student, teacher : Tensor, shape (B, K, *spatial)
        Logits of K overlapping regions (sigmoid) or K classes (softmax).
    regions : bool
        True for region heads, False for softmax classes.
    valid : Tensor of bool, shape (B, 1, *spatial), optional
        False at voxels to leave out (ignore label), whatever they contain. None: all are valid.
    voxel_weight : Tensor, shape (B, 1, *spatial), at least 0, optional
        Factor w of each voxel's squared difference. The denominator does not depend on it, so that distillation fades
        as fewer voxels ask for it. None is the factor 1, the paper's formula.

    Returns
    -------
    Tensor of float32, scalar, at least 0; 0 when no voxel is valid.

    Raises
    ------
    ValueError
        If shapes or types do not fit.
    """
    _check_logits(student, teacher, regions)
    valid = _valid_map(valid, student)
    with torch.autocast(device_type=student.device.type, enabled=False):
        # Zeros come in before any arithmetic: 0 * NaN is NaN, in the gradient too.
        student = torch.where(valid, student.float(), 0.0)
        teacher = torch.where(valid, teacher.detach().float(), 0.0)
        if not regions:
            student = student - student.mean(1, keepdim=True)
            teacher = teacher - teacher.mean(1, keepdim=True)
        squared = (student - teacher).square().sum(1, keepdim=True)
        difference = torch.where(valid, _weighted(squared, voxel_weight), 0.0).sum()
        elements = valid.sum().float() * student.shape[1]
        # The numerator is 0 without a valid voxel; the 1 only avoids 0 / 0 there.
        return difference / torch.maximum(teacher.square().sum(), elements).clamp_min(1.0)


def _log_probabilities(logits: torch.Tensor, regions: bool, tau: float) -> torch.Tensor:
    if regions:
        logits = torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1)
    if logits.shape[1] == 2:
        # Two standardised entries are +-1 in some order; the plain tempered softmax keeps the confidence.
        return functional.log_softmax(logits / tau, dim=1)
    centred = logits - logits.mean(1, keepdim=True)
    return functional.log_softmax(centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + 1.0) / tau, dim=1)


def _group_mean(values: torch.Tensor, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    count = group.sum()
    return torch.where(group, values, 0.0).sum() / count.clamp_min(1).float(), (count > 0).float()


def standardized_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    regions: bool,
    target_foreground: torch.Tensor,
    valid: torch.Tensor | None = None,
    tau: float = 2.0,
    voxel_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Kullback-Leibler divergence of standardised logits, foreground and rest in equal parts (equations 6-8, changed).

    ``Z = (l - mean_k) / (tau sqrt(var_k + 1))``, ``q = softmax(Z)``, ``KL = sum_k q^f log(q^f / q^m)`` per voxel,
    population variance over the class axis, and

    ``loss = tau^2 * 1/2 (mean of w KL over the foreground + mean of w KL over the rest)``

    The foreground is the valid voxels where the target or the teacher (a region logit > 0, or another class above class
    0) is foreground. Regions become a class vector by a zero background logit in front, l = [0, l_1, ..., l_K]. A
    vector of two entries (two classes, or one region) is not standardised: ``q = softmax(l / tau)``.

    Changed against MST-KDNet (MICCAI 2025) and Sun et al. (CVPR 2024):

    * var + 1 instead of a standard deviation + 1e-7, whose gradient is about 1e6 at nearly equal logits;
    * the class axis is standardised, as Sun et al. do; the released MST-KDNet code standardises the last axis of space;
    * two entries standardise to +-1 whatever the logits, which leaves no gradient, hence the plain tempered softmax;
    * means per group, because a patch is mostly background, which would drown the tumour in a single mean.

    The teacher gets no gradient.

    Parameters
    ----------
    student, teacher : Tensor, shape (B, K, *spatial)
        Logits of K overlapping regions (sigmoid) or K classes (softmax, class 0 is the background).
    regions : bool
        True for region heads, False for softmax classes.
    target_foreground : Tensor of bool, shape (B, 1, *spatial)
        True where the label is not background; of no effect at voxels that are not valid.
    valid : Tensor of bool, shape (B, 1, *spatial), optional
        False at voxels to leave out (ignore label), whatever they contain. None: all are valid.
    tau : float
        Temperature, greater than 0. The released code uses 7.
    voxel_weight : Tensor, shape (B, 1, *spatial), at least 0, optional
        Factor w of each voxel's divergence. Means are over numbers of voxels, not over sums of weights, so that
        distillation fades as fewer voxels ask for it. None is the factor 1, the paper's formula.

    Returns
    -------
    Tensor of float32, scalar. A group without voxels is left out of the mean of the two; 0 when no voxel is valid.

    Raises
    ------
    ValueError
        If shapes or types do not fit or tau is not positive.
    """
    _check_logits(student, teacher, regions)
    _check_map("target_foreground", target_foreground, student, boolean=True)
    if tau <= 0:
        raise ValueError(f"found temperature tau = {tau}, expected a number greater than 0")
    valid = _valid_map(valid, student)
    with torch.autocast(device_type=student.device.type, enabled=False):
        student = torch.where(valid, student.float(), 0.0)
        teacher = torch.where(valid, teacher.detach().float(), 0.0)
        background = torch.zeros_like(teacher[:, :1]) if regions else teacher[:, :1]
        regions_or_classes = teacher if regions else teacher[:, 1:]
        teacher_foreground = regions_or_classes.amax(1, keepdim=True) > background
        foreground = target_foreground | teacher_foreground

        student_log = _log_probabilities(student, regions, tau)
        teacher_log = _log_probabilities(teacher, regions, tau)
        divergence = (teacher_log.exp() * (teacher_log - student_log)).sum(1, keepdim=True)
        divergence = _weighted(divergence, voxel_weight)
        inside, has_inside = _group_mean(divergence, valid & foreground)
        rest, has_rest = _group_mean(divergence, valid & ~foreground)
        return tau**2 * (inside + rest) / (has_inside + has_rest).clamp_min(1.0)


@torch.no_grad()
def teacher_advantage(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    *,
    regions: bool,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Where the teacher is more right than the student: a ``voxel_weight`` for the functions of this module.

    1 where the teacher's cross-entropy against the label (binary cross-entropy summed over regions, or softmax
    cross-entropy) is strictly lower than the student's, else 0. Not part of MST-KDNet (MICCAI 2025), which copies the
    teacher everywhere: a teacher that is itself undertrained then holds the student back.

    Parameters
    ----------
    student, teacher : Tensor, shape (B, K, *spatial)
        Logits of K overlapping regions (sigmoid) or K classes (softmax).
    target : Tensor
        Shape (B, K, *spatial) of 0 and 1 for regions, (B, 1, *spatial) of class numbers otherwise, of any type. Voxels
        that are not valid may hold anything.
    regions : bool
        True for region heads, False for softmax classes.
    valid : Tensor of bool, shape (B, 1, *spatial), optional
        False at voxels to leave out (ignore label); they get 0. None: all are valid.

    Returns
    -------
    Tensor of float32, shape (B, 1, *spatial), entries 0 or 1, without a graph.

    Raises
    ------
    ValueError
        If shapes or types do not fit.
    """
    _check_logits(student, teacher, regions)
    expected = tuple(student.shape) if regions else (student.shape[0], 1, *student.shape[2:])
    if tuple(target.shape) != expected:
        raise ValueError(f"target has shape {tuple(target.shape)}, expected {expected} with regions={regions}")
    valid = _valid_map(valid, student)
    with torch.autocast(device_type=student.device.type, enabled=False):
        target = torch.where(valid, target, torch.zeros_like(target))

        def cross_entropy(logits: torch.Tensor) -> torch.Tensor:
            logits = torch.where(valid, logits.float(), 0.0)
            if regions:
                loss = functional.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
                return loss.sum(1, keepdim=True)
            return functional.cross_entropy(logits, target[:, 0].long(), reduction="none").unsqueeze(1)

        return (valid & (cross_entropy(teacher) < cross_entropy(student))).float()
