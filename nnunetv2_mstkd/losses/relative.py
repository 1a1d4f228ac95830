"""Comparing tensors whatever their size and scale."""

from __future__ import annotations

import torch

_EPSILON = 1e-6


def squared_sums(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator and denominator of :func:`relative_difference`, without the 1e-6.

    They are apart so that one ratio can run over several pairs of tensors without concatenating them.

    Returns
    -------
    sum((a - b)^2) and sum(a^2) + sum(b^2) of every sample: two tensors of float32, shape (B,).
    """
    if a.shape != b.shape:
        raise ValueError(f"found tensors of shapes {tuple(a.shape)} and {tuple(b.shape)}, expected equal shapes")
    if a.ndim == 0:
        raise ValueError("found a scalar, expected a tensor whose first axis is the batch")
    with torch.autocast(device_type=a.device.type, enabled=False):
        a, b = a.float().reshape(a.shape[0], -1), b.float().reshape(b.shape[0], -1)
        return (a - b).square().sum(1), a.square().sum(1) + b.square().sum(1)


def ratio_of_sums(difference: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Mean over the batch of difference / (size + 1e-6): the scalar of :func:`relative_difference` from its two sums.

    Sums over several pairs of tensors, each from :func:`squared_sums`, can be added first.
    """
    with torch.autocast(device_type=difference.device.type, enabled=False):
        return (difference / (size + _EPSILON)).mean()


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared difference relative to the size of both tensors.

    ``rel(a, b) = sum((a - b)^2) / (sum(a^2) + sum(b^2) + 1e-6)`` per sample, then the mean over the batch. It is 0 for
    equal tensors, about 1 for unrelated ones, at most 1 for non-negative and at most 2 for any tensors, whatever the
    number of elements and their scale. MST-KDNet (MICCAI 2025) uses plain mean squared errors instead (equations 4, 5
    and 11), which need a weight of their own for every term (1e8 for attention maps). Nothing is detached here.

    ``a`` and ``b`` have the same shape (B, ...) and any floating type; ValueError otherwise.
    """
    return ratio_of_sums(*squared_sums(a, b))
