"""Global style matching (GSME) of MST-KDNet, equations (9)-(11).

Paper: "Bridging the Gap in Missing Modalities: Leveraging Knowledge Distillation and Style Matching for Brain Tumor
Segmentation", MICCAI 2025. Real is the teacher (all modalities), fake the student (missing modalities).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from nnunetv2_mstkd.losses.relative import relative_difference


def cross_correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Correlation over space between the channels of two feature maps.

    Channels are flattened over the V positions and become rows ``(x - mean) / sqrt(sum((x - mean)^2) + 1e-5 V)``; then
    ``M = a b^T`` (equation 10). The 1e-5 V is a variance floor of 1e-5: a constant channel correlates with nothing.

    Changed against MST-KDNet (MICCAI 2025): the paper multiplies raw rows, whose products grow with V and with the
    square of the features' scale; the released code divides that away until nothing (1e-15) is left. Nothing is
    detached here.

    Returns
    -------
    Tensor of float32, shape (B, Ca, Cb), entries in [-1, 1], of maps (B, Ca, *spatial) and (B, Cb, *spatial).
    """
    if a.ndim < 3 or a.shape[0] != b.shape[0] or a.shape[2:] != b.shape[2:]:
        raise ValueError(
            f"found features of shapes {tuple(a.shape)} and {tuple(b.shape)}, expected (B, Ca, *spatial) and "
            "(B, Cb, *spatial) with the same B and spatial"
        )
    with torch.autocast(device_type=a.device.type, enabled=False):
        first, second = (functional.layer_norm(each.float(), each.shape[2:]).flatten(2) for each in (a, b))
        return torch.bmm(first, second.transpose(1, 2)) / first.shape[2]


def style_matching(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Matching of the correlations between three feature maps.

    ``loss = mean over i of rel(M_i^f, M_i^m)`` with ``M_1 = corr(f_enc, f_dec)``, ``M_2 = corr(f_enc, f_t)`` and
    ``M_3 = corr(f_dec, f_t)`` (equations 10 and 11, second summand), corr the :func:`cross_correlation` and rel the
    relative difference of :func:`nnunetv2_mstkd.losses.relative.relative_difference`.

    Changed against MST-KDNet (MICCAI 2025): correlations instead of raw products, and rel instead of
    theta / (4 n^2) sum (M^f - M^m)^2, so that neither the grid nor the number of channels changes the weight. Any three
    maps on one grid will do; AdaMM's style term uses it too. The teacher gets no gradient.

    Parameters
    ----------
    student, teacher
        Three maps each, (f_enc, f_dec, f_t), of shapes (B, C_i, *spatial). Within a network all lie on one grid;
        channels may differ between the three but not between the networks.

    Returns
    -------
    Tensor of float32, scalar in [0, 2].
    """
    if len(student) != 3 or len(teacher) != 3:
        raise ValueError(
            f"found {len(student)} student and {len(teacher)} teacher maps, expected three each: (f_enc, f_dec, f_t)"
        )
    teacher = [feature.detach() for feature in teacher]
    terms = [
        relative_difference(cross_correlation(student[i], student[j]), cross_correlation(teacher[i], teacher[j]))
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    return torch.stack(terms).mean()


def adversarial_student_term(discriminator_logits: torch.Tensor) -> torch.Tensor:
    """What the student pays for being recognised: ``mean(-log sigmoid(D(f^m)))``.

    Equation (9) of MST-KDNet (MICCAI 2025), ``L_adv = log(1 - D(f^f)) + log D(f^m)``, is minimised by the
    discriminator; the student's share of it is changed to the non-saturating form, whose gradient does not vanish while
    the discriminator wins. ``discriminator_logits`` have any shape and come from a discriminator whose parameters
    require no gradient. The loss is at least 0, and log 2 when D cannot tell.
    """
    with torch.autocast(device_type=discriminator_logits.device.type, enabled=False):
        return functional.softplus(-discriminator_logits.float()).mean()


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of the discriminator, half for the teacher as real, half for the student as fake.

    ``1/2 mean(-log sigmoid(D(f^f))) + 1/2 mean(-log(1 - sigmoid(D(f^m))))``: the usual form of equation (9) of
    MST-KDNet (MICCAI 2025), which as printed has no lower bound. From logits of any shape: of the teacher's, and of the
    student's detached features. At least 0, and log 2 when D cannot tell.
    """
    with torch.autocast(device_type=real_logits.device.type, enabled=False):
        real = functional.softplus(-real_logits.float()).mean()
        fake = functional.softplus(fake_logits.float()).mean()
        return 0.5 * (real + fake)
