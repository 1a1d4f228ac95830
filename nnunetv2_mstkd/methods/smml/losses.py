"""What two students learn from one another: the constraints of SMML.

Paper: "Semantic-guided masked mutual learning" (SMML, AAAI 2025, arXiv 2507.07592). Where the terms act, what they read
and that their weights are 1 is certain from its released code; the functions themselves are missing there, so that
their formulas are reconstructions. Every term has a direction: the teacher side gets no gradient. Arguments are those
of :mod:`nnunetv2_mstkd.losses`; here either student is the teacher of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from nnunetv2_mstkd.losses.logits import cross_entropy_map, divergence_map, prepare, probabilities

MAX_EDGE = 8
"""Bottleneck features are pooled to at most so many positions per axis before they are compared."""

_EPSILON = 1e-6


def _correct(logits: torch.Tensor, label: torch.Tensor, regions: bool) -> torch.Tensor:
    return (logits > 0) == label.bool() if regions else logits.argmax(1, keepdim=True) == label


def _classes(label: torch.Tensor, heads: int, regions: bool) -> Iterator[tuple[slice, torch.Tensor]]:
    """For each class the channels of a divergence map and where in them the class is: inside and outside of a region
    are two classes."""
    for head in range(heads):
        if regions:
            inside = label[:, head : head + 1].bool()
            yield slice(head, head + 1), inside
            yield slice(head, head + 1), ~inside
        else:
            yield slice(0, 1), label == head


def reliable_exchange(
    student: torch.Tensor,
    teacher: torch.Tensor,
    label: torch.Tensor,
    *,
    regions: bool,
    valid: torch.Tensor | None = None,
    tau: float = 1.0,
    require_correct: bool = False,
    balanced: bool = True,
) -> torch.Tensor:
    """Pixel-level constraint L_pc: divergence from the peer at the voxels where the peer is the more reliable one.

    ``L = mean over classes k of mean over {v: y(v) = k, R(v) = 1} of tau^2 KL(p_t(v) || p_s(v))`` with ``R(v) =
    1[CE(p_t(v), y(v)) < CE(p_s(v), y(v))]``, where p is softened by tau in KL and not in R. Classes without a selected
    voxel do not count. Between two students no voxel is passed on in both directions. For region heads KL and R are
    those of each region's Bernoulli distribution, and inside and outside of a region are two classes. 0 when no voxel
    is selected.

    Parameters
    ----------
    student, teacher, label, regions, valid
        See :mod:`nnunetv2_mstkd.losses`.
    tau
        Temperature.
    require_correct
        Select only where the peer's most probable class is the label's.
    balanced
        False: one mean over all selected voxels.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher, valid = prepare(student, teacher.detach(), regions, valid)
        with torch.no_grad():
            selected = cross_entropy_map(teacher, label, regions) < cross_entropy_map(student, label, regions)
            if require_correct:
                selected &= _correct(teacher, label, regions)
            selected &= valid
        divergence = torch.where(selected, divergence_map(student, teacher, regions, tau), 0.0)
        if not balanced:
            return divergence.sum() / selected.sum().clamp_min(1)
        means, counts = [], []
        for channels, members in _classes(label, student.shape[1], regions):
            chosen = selected[:, channels] & members
            counts.append(chosen.sum())
            means.append(torch.where(chosen, divergence[:, channels], 0.0).sum() / counts[-1].clamp_min(1))
        return torch.stack(means).sum() / (torch.stack(counts) > 0).sum().clamp_min(1)


def _pool(x: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    pool: Callable = functional.adaptive_avg_pool3d if len(grid) == 3 else functional.adaptive_avg_pool2d
    return pool(x, grid)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(B, D, *grid) to (B * positions, D)."""
    return x.flatten(2).transpose(1, 2).flatten(0, 1)


def _relations(features: torch.Tensor, members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the normalised Gram matrix (N, N), and similarities to the class prototypes (N, K)."""
    unit = functional.normalize(features, dim=1, eps=_EPSILON)
    gram = functional.normalize(unit @ unit.T, dim=1, eps=_EPSILON)
    means = members.T @ features / members.sum(0).clamp_min(_EPSILON)[:, None]
    return gram, unit @ functional.normalize(means, dim=1, eps=_EPSILON).T


def relational_consistency(
    student: torch.Tensor,
    teacher: torch.Tensor,
    teacher_logits: torch.Tensor,
    label: torch.Tensor,
    *,
    regions: bool,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Feature-level constraint L_fc: relations among positions, and of positions to class prototypes, as in the peer.

    Every position of every sample is a row f_i of N, n_i its direction. With G the Gram matrix of the n_i, its rows
    scaled to length 1, and c_k the direction of the mean of the rows of class k (each row counts as much as it belongs
    to k),

    ``L = sum_i w_i (|G^s_i - G^t_i|^2 + mean over classes k that occur of (n^s_i . c^s_k - n^t_i . c^t_k)^2)``,

    w_i the entropy of the peer's prediction at i, normalised to sum 1. The first summand is the margin-aware
    distillation of MMANet (CVPR 2023), whose name and guard against NaN SMML's code has; the second is this package's
    reading of "inter-class relational knowledge". Zero for equal networks.

    ``student`` and ``teacher`` are features of the bottleneck, (B, D, *grid), which are pooled to at most 8 positions
    per axis; for the other arguments see :mod:`nnunetv2_mstkd.losses`.
    """
    with torch.autocast(student.device.type, enabled=False):
        grid = tuple(min(MAX_EDGE, edge) for edge in student.shape[2:])
        with torch.no_grad():
            logits = teacher_logits.float()
            share = torch.ones_like(logits[:, :1]) if valid is None else valid.float()
            cell = _pool(share, grid)
            p = _pool(torch.where(share > 0, probabilities(logits, regions), 0.0), grid) / cell.clamp_min(_EPSILON)
            entropy = torch.special.entr(p).sum(1)
            if regions:
                entropy = entropy + torch.special.entr(1 - p).sum(1)
                members = label.float()
            else:
                members = torch.cat([(label == head).float() for head in range(logits.shape[1])], 1)
            weight = entropy.flatten() * cell.flatten()
            weight = weight / weight.sum().clamp_min(_EPSILON)
            members = _rows(_pool(members * share, grid))
            occurs = (members.sum(0) > 0).float()
            teacher_gram, teacher_similarity = _relations(_rows(_pool(teacher.float(), grid)), members)
        gram, similarity = _relations(_rows(_pool(student.float(), grid)), members)
        positions = (gram - teacher_gram).square().sum(1)
        classes = (similarity - teacher_similarity).square() @ occurs / occurs.sum().clamp_min(1)
        return (weight * (positions + classes)).sum()
