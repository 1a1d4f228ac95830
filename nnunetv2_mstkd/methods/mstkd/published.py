"""MST-KDNet's terms as published: plain squared errors, equations (2)-(8) and (10)-(12).

Paper: "Bridging the Gap in Missing Modalities: Leveraging Knowledge Distillation and Style Matching for Brain Tumor
Segmentation", MICCAI 2025. Where it is silent (reductions over layers and heads, the constants) these are the forms of
the released code. As there, the gradient of every term but the adversarial one reaches both networks: only a frozen
teacher stays as it is. The package's own forms are in :mod:`nnunetv2_mstkd.methods.mstkd.losses` and
:mod:`nnunetv2_mstkd.losses.style`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from nnunetv2_mstkd.losses.logits import (
    foreground_masks,
    foreground_probabilities,
    mean_over_voxels,
    prepare,
    probabilities,
    valid_map,
    where_valid,
)
from nnunetv2_mstkd.methods.mstkd.losses import check_pairs, class_logits

_NO_SPREAD = 1e-7
_EMPTY = 1e-7


def _summed_errors(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean squared error of each pair, summed over the pairs."""
    check_pairs(student, teacher)
    return torch.stack([(s.float() - t.float()).square().mean() for s, t in zip(student, teacher, strict=True)]).sum()


def extreme_values(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Extreme-value distillation of attention maps, first half of equation (4).

    ``loss = sum over EVs and layers of MSE(EV^f, EV^m)``, ``EV_1 = A_max * A``, ``EV_2 = A_min * A``, ``EV_3 = A_mean *
    A`` with the element-wise maximum, minimum and mean over the L layers (equations 2 and 3). Entries of A are about
    1/N for N tokens, so the loss is about N^-4: the released weight is 1e8.

    Both networks give L attention maps (B, heads, N, N), after the softmax. ValueError if they do not fit.
    """

    def extremes(maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        stacked = torch.stack([each.float() for each in maps])
        return [extreme * stacked for extreme in (stacked.amax(0), stacked.amin(0), stacked.mean(0))]

    check_pairs(student, teacher)
    with torch.autocast(device_type=student[0].device.type, enabled=False):
        return len(student) * _summed_errors(extremes(student), extremes(teacher))


def multiscale_maps(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Matching of the multi-scale maps, second half of equation (4): ``sum over levels of MSE(z^f, z^m)``.

    Both networks give one map (B, channels, *spatial) per level, in the same order. ValueError if they do not fit.
    """
    with torch.autocast(device_type=student[0].device.type, enabled=False):
        return _summed_errors(student, teacher)


def content(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared error of what the decoders start from, (B, channels, *grid): in the released code, not the paper."""
    return multiscale_maps([student], [teacher])


def probability_error(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    regions: bool,
    valid: torch.Tensor | None = None,
    voxel_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Squared error of the networks' outputs, equation (5): ``sum over heads of mean over voxels of w (p^m - p^f)^2``.

    The paper writes l for the outputs; the released code compares *probabilities* of the foreground heads, as is done
    here. Arguments are those of :mod:`nnunetv2_mstkd.losses`; 0 when no voxel is valid.
    """
    student, teacher, valid = prepare(student, teacher, regions, valid)
    with torch.autocast(device_type=student.device.type, enabled=False):
        found, wanted = (foreground_probabilities(each, regions) for each in (student, teacher))
        return mean_over_voxels((found - wanted).square().sum(1, keepdim=True), valid, voxel_weight)


def standardized_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    regions: bool,
    valid: torch.Tensor | None = None,
    tau: float = 7.0,
    voxel_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Kullback-Leibler divergence of standardised logits, equations (6)-(8).

    ``Z = (l - mean_k) / ((std_k + 1e-7) tau)``, ``q = softmax(Z)``, ``loss = tau^2 / K mean over voxels of w sum_k q^f
    log(q^f / q^m)`` with the sample's standard deviation over the K classes, as Sun et al. (CVPR 2024) define it, and
    the released code's mean over classes. That code standardises over the last axis of space instead, which the
    equations do not say. The square root of the variance has a floor of 1e-7, so that equal logits have a gradient. Two
    classes, or one region, standardise to the same two numbers whatever the logits: the published term is then without
    a gradient.

    Arguments are those of :mod:`nnunetv2_mstkd.losses`; regions become classes by a zero background logit in front.
    ``tau`` is above 0. The loss is 0 when no voxel is valid.
    """
    student, teacher, valid = prepare(student, teacher, regions, valid)

    def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
        logits = class_logits(logits, regions)
        centred = logits - logits.mean(1, keepdim=True)
        variance = centred.square().sum(1, keepdim=True) / (logits.shape[1] - 1)
        spread = (variance + _NO_SPREAD**2).sqrt() + _NO_SPREAD
        return functional.log_softmax(centred / (spread * tau), dim=1)

    with torch.autocast(device_type=student.device.type, enabled=False):
        found, wanted = log_probabilities(student), log_probabilities(teacher)
        divergence = (wanted.exp() * (wanted - found)).mean(1, keepdim=True)
        return tau**2 * mean_over_voxels(divergence, valid, voxel_weight)


def style(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Global style matching, second half of equation (11) without its factor theta.

    ``loss = sum over pairs of 1 / (4 n n') sum_ij (M_ij^f - M_ij^m)^2``, mean over the batch, with ``M_1 = G_enc
    G_dec^T``, ``M_2 = G_enc G_t^T`` and ``M_3 = G_dec G_t^T`` (equation 10), G the n x V matrix of a map's n channels
    at V positions. The paper's n^2 is n n' where the two maps have n and n' channels. Sums over positions are plain,
    so the loss grows with V^2 and the fourth power of the features' scale.

    Both networks give (f_enc, f_dec, f_t), each (B, channels, *grid) on one grid.
    """

    def products(maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        rows = [each.float().flatten(2) for each in maps]
        return [torch.bmm(rows[i], rows[j].transpose(1, 2)) for i, j in ((0, 1), (0, 2), (1, 2))]

    check_pairs(student, teacher)
    with torch.autocast(device_type=student[0].device.type, enabled=False):
        return _summed_errors(products(student), products(teacher)) / 4


def dice(
    logits: torch.Tensor, label: torch.Tensor, *, regions: bool, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Dice loss of equation (12) as released: ``sum over heads of 1 - 2 sum p y / (sum p^2 + sum y^2)``.

    Sums run over the voxels of the whole batch, with 1e-7 in the denominator; classes count with their background.

    Parameters
    ----------
    logits
        (B, K, *spatial), of classes or regions.
    label
        (B, K, *spatial) of 0 and 1 for regions, or (B, 1, *spatial) class numbers.
    valid
        Bool (B, 1, *spatial), or None: all.
    """
    with torch.autocast(device_type=logits.device.type, enabled=False):
        found = probabilities(where_valid(logits, valid), regions)
        if not regions:
            label = torch.cat([label == 0, foreground_masks(label, found.shape[1])], 1)
        wanted, valid = label.float(), valid_map(valid, logits)
        found, wanted = (torch.where(valid, each, 0.0).transpose(0, 1).flatten(1) for each in (found, wanted))
        size = found.square().sum(1) + wanted.square().sum(1)
        return (1 - 2 * (found * wanted).sum(1) / (size + _EMPTY)).sum()
