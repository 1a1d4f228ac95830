"""The relative forms of MST-KDNet's terms that no other method uses: MS-TKD, equations (2)-(4), and DMLD, (5)-(8).

Paper: "Bridging the Gap in Missing Modalities: Leveraging Knowledge Distillation and Style Matching for Brain Tumor
Segmentation", MICCAI 2025. The two summands of equation (4) are two functions, so that each has its own weight. Logit
standardisation: Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024. Style matching (GSME),
equations (9)-(11), is in :mod:`nnunetv2_mstkd.losses.style`, the published forms in
:mod:`nnunetv2_mstkd.methods.mstkd.published`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from nnunetv2_mstkd.losses.logits import check_map, prepare, weigh
from nnunetv2_mstkd.losses.relative import ratio_of_sums, relative_difference, squared_sums

# A standardised map of fewer positions is almost fixed by the standardisation itself and carries no pattern to match.
_FEWEST_POSITIONS = 8


def check_pairs(student_maps: Sequence[torch.Tensor], teacher_maps: Sequence[torch.Tensor]) -> None:
    """Raise ValueError unless both networks give equally many maps of equal shapes, at least one."""
    if len(student_maps) == 0 or len(student_maps) != len(teacher_maps):
        raise ValueError(
            f"found {len(student_maps)} student and {len(teacher_maps)} teacher maps, expected equal numbers, "
            "at least 1 each"
        )
    for index, (student, teacher) in enumerate(zip(student_maps, teacher_maps, strict=True)):
        if student.shape != teacher.shape:
            raise ValueError(
                f"map {index} has shape {tuple(student.shape)} in the student and {tuple(teacher.shape)} in the "
                "teacher, expected equal shapes"
            )


def _extreme_values(maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    # Times N the mean entry is 1 for any N. The ratio ignores a common factor; without it the products, about N^-2,
    # would sink below the 1e-6 that guards the division.
    attention = torch.stack([attention_map.float() * attention_map.shape[-1] for attention_map in maps], dim=1)
    return attention, tuple(
        extreme.unsqueeze(1) for extreme in (attention.amax(1), attention.amin(1), attention.mean(1))
    )


def extreme_value_distillation(
    student_maps: Sequence[torch.Tensor], teacher_maps: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Extreme-value distillation of attention maps, the first summand of MS-TKD.

    With A_max, A_min and A_mean the element-wise maximum, minimum and mean over the L extracted attention maps
    (equation 2), ``EV_1 = A_max * A``, ``EV_2 = A_min * A``, ``EV_3 = A_mean * A`` for each extracted A (equation 3),
    and

    ``loss = mean over samples of sum((EV^f - EV^m)^2) / (sum((EV^f)^2) + sum((EV^m)^2) + 1e-6)``

    (first half of equation 4, changed) where both sums run over the three EVs, the L maps, heads, rows and columns.

    Changed against MST-KDNet (MICCAI 2025): equation (4) is a mean squared error. Rows of A sum to 1 over N tokens, so
    an EV is about N^-2 and the error about N^-4, which is why the released code multiplies by 1e8. The ratio has no
    such factor: it is between 0 and 1 for any N. The relative weight of layers and EVs is that of the paper. The
    teacher gets no gradient.

    Both networks give L row-stochastic attention maps (B, heads, N, N), after the softmax, of the tapped layers in the
    same order. Other numbers or shapes of maps raise ValueError.
    """
    check_pairs(student_maps, teacher_maps)
    with torch.autocast(device_type=student_maps[0].device.type, enabled=False):
        student, student_extremes = _extreme_values(student_maps)
        teacher, teacher_extremes = _extreme_values([teacher_map.detach() for teacher_map in teacher_maps])
        sums = [
            squared_sums(student_extreme * student, teacher_extreme * teacher)
            for student_extreme, teacher_extreme in zip(student_extremes, teacher_extremes, strict=True)
        ]
        difference, size = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
        return ratio_of_sums(difference, size)


def multiscale_map_matching(student_maps: Sequence[torch.Tensor], teacher_maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Matching of the transformer's multi-scale maps, the second summand of MS-TKD.

    ``loss = mean over levels of rel(S(z^m), S(z^f))``   (second half of equation 4, changed)

    with S the standardisation of every channel over space, (z - mean) / sqrt(var + 1e-5), and rel the relative
    difference of :func:`nnunetv2_mstkd.losses.relative.relative_difference`. Levels of fewer than 8 positions are left
    out.

    Changed against MST-KDNet (MICCAI 2025): the paper's mean squared error of raw maps depends on the scale that each
    level happens to have and asks the student to copy it; here where a feature is active is matched, not how strongly
    the network scales it, and every level counts the same. The teacher gets no gradient.

    Both networks give one map (B, channels, *spatial) per level, in the same order; levels may differ in channels and
    grid. The loss is in [0, 2], and zero without a graph when no level has 8 positions. ValueError if maps do not fit.
    """
    check_pairs(student_maps, teacher_maps)
    levels = [
        relative_difference(*(functional.layer_norm(z.float(), z.shape[2:]) for z in (student, teacher.detach())))
        for student, teacher in zip(student_maps, teacher_maps, strict=True)
        if math.prod(student.shape[2:]) >= _FEWEST_POSITIONS
    ]
    if not levels:
        return torch.zeros((), dtype=torch.float32, device=student_maps[0].device)
    return torch.stack(levels).mean()


# ---- DMLD: the highest-resolution logits -----------------------------------------------------------------------------


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

    Arguments are those of :mod:`nnunetv2_mstkd.losses`. The loss is at least 0, and 0 when no voxel is valid.
    """
    student, teacher, valid = prepare(student, teacher.detach(), regions, valid)
    with torch.autocast(device_type=student.device.type, enabled=False):
        if not regions:
            student = student - student.mean(1, keepdim=True)
            teacher = teacher - teacher.mean(1, keepdim=True)
        squared = (student - teacher).square().sum(1, keepdim=True)
        difference = torch.where(valid, weigh(squared, voxel_weight), 0.0).sum()
        elements = valid.sum().float() * student.shape[1]
        # The numerator is 0 without a valid voxel; the 1 only avoids 0 / 0 there.
        return difference / torch.maximum(teacher.square().sum(), elements).clamp_min(1.0)


def class_logits(logits: torch.Tensor, regions: bool) -> torch.Tensor:
    """Logits of classes as they are; those of overlapping regions with a zero background logit in front."""
    return torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1) if regions else logits


def _log_probabilities(logits: torch.Tensor, regions: bool, tau: float) -> torch.Tensor:
    logits = class_logits(logits, regions)
    if logits.shape[1] == 2:
        # Two standardised entries are +-1 in some order; the plain tempered softmax keeps the confidence.
        return functional.log_softmax(logits / tau, dim=1)
    centred = logits - logits.mean(1, keepdim=True)
    return functional.log_softmax(centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + 1.0) / tau, dim=1)


def _divergence(student: torch.Tensor, teacher: torch.Tensor, regions: bool, tau: float) -> torch.Tensor:
    """KL of each voxel, (B, 1, *spatial)."""
    student_log, teacher_log = (_log_probabilities(each, regions, tau) for each in (student, teacher))
    return (teacher_log.exp() * (teacher_log - student_log)).sum(1, keepdim=True)


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
    separate: bool = False,
    voxel_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Kullback-Leibler divergence of standardised logits, foreground and rest in equal parts (equations 6-8, changed).

    ``Z = (l - mean_k) / (tau sqrt(var_k + 1))``, ``q = softmax(Z)``, ``KL = sum_k q^f log(q^f / q^m)`` per voxel,
    population variance over the class axis, and

    ``loss = tau^2 * 1/2 (mean of w KL over the foreground + mean of w KL over the rest)``

    The foreground is the valid voxels where the target or the teacher (a region logit > 0, or another class above class
    0) is foreground. Regions become a class vector by a zero background logit in front, l = [0, l_1, ..., l_K]. A
    vector of two entries (two classes, or one region) is not standardised: ``q = softmax(l / tau)``. Such a vector
    couples the regions: where the student is too low in one of them, the others are pushed down as well. ``separate``
    regions have a vector [0, l_k] and a divergence each, which are added.

    Changed against MST-KDNet (MICCAI 2025) and Sun et al. (CVPR 2024):

    * var + 1 instead of a standard deviation + 1e-7, whose gradient is about 1e6 at nearly equal logits;
    * the class axis is standardised, as Sun et al. do; the released MST-KDNet code standardises the last axis of space;
    * two entries standardise to +-1 whatever the logits, which leaves no gradient, hence the plain tempered softmax;
    * means per group, because a patch is mostly background, which would drown the tumor in a single mean.

    The teacher gets no gradient. A group without voxels is left out of the mean of the two; 0 when no voxel is valid.
    Means are over numbers of voxels, not over sums of weights.

    Parameters
    ----------
    student, teacher, regions, valid, voxel_weight
        See :mod:`nnunetv2_mstkd.losses`.
    target_foreground
        Bool (B, 1, *spatial), True where the label is not background; of no effect at voxels that are not valid.
    tau
        Temperature, greater than 0. The released code uses 7.
    separate
        Compare the two outcomes of each region by themselves; classes are not changed.
    """
    check_map("target_foreground", target_foreground, student, boolean=True)
    if tau <= 0:
        raise ValueError(f"found temperature tau = {tau}, expected a number greater than 0")
    student, teacher, valid = prepare(student, teacher.detach(), regions, valid)
    with torch.autocast(device_type=student.device.type, enabled=False):
        background = torch.zeros_like(teacher[:, :1]) if regions else teacher[:, :1]
        regions_or_classes = teacher if regions else teacher[:, 1:]
        teacher_foreground = regions_or_classes.amax(1, keepdim=True) > background
        foreground = target_foreground | teacher_foreground

        parts = [slice(head, head + 1) for head in range(student.shape[1])] if regions and separate else [slice(None)]
        each = [_divergence(student[:, part], teacher[:, part], regions, tau) for part in parts]
        divergence = weigh(torch.cat(each, 1).sum(1, keepdim=True), voxel_weight)
        inside, has_inside = _group_mean(divergence, valid & foreground)
        rest, has_rest = _group_mean(divergence, valid & ~foreground)
        return tau**2 * (inside + rest) / (has_inside + has_rest).clamp_min(1.0)
