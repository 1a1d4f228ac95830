"""Self-attention whose maps can be returned, and the pre-norm transformer block around it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional


def default_heads(width: int) -> int:
    """Number of heads of 32 ... 64 channels, as near to 48 as can be; where no divisor gives that, the nearest one."""
    divisors = [heads for heads in range(1, width + 1) if width % heads == 0]
    return min(divisors, key=lambda h: (not 32 <= width // h <= 64, abs(math.log2(width / h / 48)), h))


def positions_on(position: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Interpolate learned positions (1, width, *grid) to another grid, that of a smaller or larger patch."""
    if tuple(grid) == tuple(position.shape[2:]):
        return position
    mode = "trilinear" if len(grid) == 3 else "bilinear"
    return functional.interpolate(position, size=tuple(grid), mode=mode, align_corners=False)


class Attention(nn.Module):
    """Multi-head self-attention, A = softmax(q k^T / sqrt(d)) with d = width / heads channels (MST-KDNet, eq. 1)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: torch.Tensor, *, mask: torch.Tensor | None = None, return_attention: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over tokens (B, N, width); the maps are float32 of shape (B, heads, N, N), or None.

        ``mask``, bool (B, N), says which tokens are attended to, at least one per sample. Without maps PyTorch's fused
        kernel is used; both ways agree within 1e-5.
        """
        keys = None if mask is None else mask[:, None, None, :]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = None
        if return_attention:
            with torch.autocast(x.device.type, enabled=False):
                scores = q.float() @ k.float().transpose(-2, -1) / q.shape[-1] ** 0.5
                scores = scores if keys is None else scores.masked_fill(~keys, -torch.inf)
                attention = scores.softmax(-1)
            y = attention.to(v.dtype) @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        return self.out(y.transpose(1, 2).flatten(2)), attention


class TransformerBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(
        self, x: torch.Tensor, *, mask: torch.Tensor | None = None, return_attention: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens (B, N, width) to tokens of the same shape, with the attention maps or None."""
        y, attention = self.attention(self.norm1(x), mask=mask, return_attention=return_attention)
        x = x + y
        return x + self.mlp(self.norm2(x)), attention
