"""Multi-scale transformer knowledge distillation (MS-TKD) of MST-KDNet, equations (2)-(4).

Paper: "Bridging the Gap in Missing Modalities: Leveraging Knowledge Distillation and Style Matching for Brain Tumor
Segmentation", MICCAI 2025. The two summands of equation (4) are two functions, so that each has its own weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from nnunetv2_mstkd.losses.relative import ratio_of_sums, relative_difference, squared_sums, standardize_channels

# A standardised map of fewer positions is almost fixed by the standardisation itself and carries no pattern to match.
_FEWEST_POSITIONS = 8


def _check_pairs(student_maps: Sequence[torch.Tensor], teacher_maps: Sequence[torch.Tensor]) -> None:
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

    Parameters
    ----------
    student_maps, teacher_maps : sequence of L tensors, shape (B, heads, N, N)
        Row-stochastic attention maps (after the softmax) of the tapped layers, in the same order.

    Returns
    -------
    Tensor of float32, scalar in [0, 1].

    Raises
    ------
    ValueError
        If the numbers of maps or their shapes differ, or the list is empty.
    """
    _check_pairs(student_maps, teacher_maps)
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

    Parameters
    ----------
    student_maps, teacher_maps : sequence of tensors, shape (B, channels, *spatial)
        One map per level, in the same order; levels may differ in channels and grid.

    Returns
    -------
    Tensor of float32, scalar in [0, 2]; zero without a graph when no level has 8 positions.

    Raises
    ------
    ValueError
        If the numbers of maps or their shapes differ, or the list is empty.
    """
    _check_pairs(student_maps, teacher_maps)
    levels = [
        relative_difference(standardize_channels(student), standardize_channels(teacher.detach()))
        for student, teacher in zip(student_maps, teacher_maps, strict=True)
        if math.prod(student.shape[2:]) >= _FEWEST_POSITIONS
    ]
    if not levels:
        return torch.zeros((), dtype=torch.float32, device=student_maps[0].device)
    return torch.stack(levels).mean()
