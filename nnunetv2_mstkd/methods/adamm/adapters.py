"""Adapters that depend on which modalities a sample has (AdaMM's adapter bank)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

MIN_HIDDEN = 8
"""An adapter has at least so many hidden channels."""


class Selection(NamedTuple):
    """Which weights of every bank the samples of a batch use."""

    partial: torch.Tensor
    """Float, (B,): 1 where a modality is absent, 0 for the full set, which passes unchanged."""
    row: torch.Tensor | None
    """Long, (B,): the subset's own row; 0 where it has none. None without such rows."""
    listed: torch.Tensor | None
    """Bool, (B,): has a row of its own. None where all subsets have one, or none has."""
    parts: torch.Tensor | None
    """Long, (B, C): row of each modality, m if available and C + m if absent. None without a factorised bank."""


class SubsetIndex(nn.Module):
    """From availability to rows of the banks, by arithmetic on tensors: nothing branches on the data.

    ``subsets`` are the codes (:func:`nnunetv2_mstkd.modalities.subset_code`) of those with a row of their own;
    ``factorised``: the others are composed of one adapter per modality.
    """

    table: torch.Tensor
    bits: torch.Tensor
    channels: torch.Tensor

    def __init__(self, num_modalities: int, subsets: Sequence[int], *, factorised: bool) -> None:
        super().__init__()
        self.factorised, self.num_rows = factorised, len(subsets)
        table = torch.full((2**num_modalities,), -1)
        table[list(subsets)] = torch.arange(len(subsets))
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("bits", 2 ** torch.arange(num_modalities), persistent=False)
        self.register_buffer("channels", torch.arange(num_modalities), persistent=False)

    def forward(self, availability: torch.Tensor) -> Selection:
        """Rows for availability of shape (B, C)."""
        row = listed = parts = None
        if self.num_rows:
            row = self.table[(availability * self.bits).sum(1)]
            listed = row >= 0 if self.factorised else None
            row = row.clamp_min(0)  # of the full set too: its update is multiplied by 0
        if self.factorised:
            parts = self.channels + torch.where(availability, 0, len(self.channels))
        return Selection((~availability.all(1)).float(), row, listed, parts)


class AdapterBank(nn.Module):
    """x + up(GELU(down(x))) with 1x1 convolutions whose weights depend on each sample's subset.

    AdaMM ("No Modality Left Behind") has one adapter per subset, chosen by a text key for a whole batch. Here the
    weights of all subsets are stacked, each sample of a batch takes its own, and every parameter takes part in every
    step. ``up`` starts at zero, so that the bank starts as the identity. Changed too: hidden width max(8, width // 4)
    instead of 64 everywhere, no dropout.

    ``num_rows`` subsets have an adapter of their own. ``factorised``: the others use the sum of C smaller adapters, one
    per modality, of which there are two: for an available modality and for an absent one. All hidden channels together
    are as many as one adapter's, rounded up.
    """

    def __init__(self, width: int, hidden: int, num_modalities: int, num_rows: int, *, factorised: bool) -> None:
        super().__init__()
        part = -(-hidden // num_modalities)
        hidden = part * num_modalities if factorised else hidden
        self.num_rows, self.factorised = num_rows, factorised
        if num_rows:
            self.down, self.down_bias = _random(num_rows, hidden, width), _zeros(num_rows, hidden)
            self.up, self.up_bias = _zeros(num_rows, width, hidden), _zeros(num_rows, width)
        if factorised:
            rows = 2 * num_modalities
            self.part_down, self.part_down_bias = _random(rows, part, width), _zeros(rows, part)
            self.part_up, self.part_up_bias = _zeros(rows, width, part), _zeros(rows, width)

    def forward(self, x: torch.Tensor, selection: Selection) -> torch.Tensor:
        """Features (B, width, *grid) to features of the same shape."""
        down, down_bias, up, up_bias = self.weights(selection)
        # the factor that spares the full set is cheaper on the weights than on the map
        partial = selection.partial[:, None, None]
        up, up_bias = up * partial, up_bias[..., None] * partial
        flat = x.flatten(2)
        hidden = functional.gelu(torch.baddbmm(down_bias[..., None], down, flat))
        # in the map's own precision: under autocast the sum would become a second map in float32
        return torch.baddbmm(flat + up_bias.to(flat.dtype), up, hidden).view_as(x)

    def weights(self, selection: Selection) -> tuple[torch.Tensor, ...]:
        """Weights and biases of down (B, hidden, width) and up (B, width, hidden) for each sample."""
        own: tuple[torch.Tensor, ...] = ()
        parts: tuple[torch.Tensor, ...] = ()
        if self.num_rows:
            own = tuple(stack[selection.row] for stack in (self.down, self.down_bias, self.up, self.up_bias))
        if self.factorised:
            chosen = selection.parts
            parts = (
                self.part_down[chosen].flatten(1, 2),
                self.part_down_bias[chosen].flatten(1),
                self.part_up[chosen].transpose(1, 2).flatten(2),
                self.part_up_bias[chosen].sum(1),
            )
        listed = selection.listed
        if not own or not parts or listed is None:
            return own or parts
        return tuple(
            torch.where(listed.reshape(-1, *[1] * (one.ndim - 1)), one, other)
            for one, other in zip(own, parts, strict=True)
        )


def _random(*shape: int) -> nn.Parameter:
    """As the weights of a linear layer whose inputs are the last axis."""
    bound = shape[-1] ** -0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))
