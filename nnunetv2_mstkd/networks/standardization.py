"""Standardising feature maps, for losses and networks that must not see their scale."""

from __future__ import annotations

import torch

_VARIANCE_FLOOR = 1e-5


def standardize_channels(x: torch.Tensor) -> torch.Tensor:
    """Standardise every channel of every sample over space: (x - mean) / sqrt(var + 1e-5), population variance.

    A constant channel, and so every channel of a grid of one position, becomes zero. The input is (B, C, *spatial) of
    any floating type with at least one spatial axis, the output float32 of the same shape.
    """
    if x.ndim < 3:
        raise ValueError(f"found a tensor of shape {tuple(x.shape)}, expected (B, C, *spatial)")
    space = tuple(range(2, x.ndim))
    with torch.autocast(device_type=x.device.type, enabled=False):
        centred = x.float()
        centred = centred - centred.mean(space, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(space, keepdim=True) + _VARIANCE_FLOOR)
