"""Patches that grow during a training: small and cheap first, the plan's own last.

Fischer et al., "Progressive Growing of Patch Size" (MICCAI 2024, arXiv 2407.07853; arXiv 2510.23241), measured with
nnU-Net: equal Dice in about half of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

EARLY_FOREGROUND = 0.5 / 0.33
"""Share of samples that must show foreground in the first phase over nnU-Net's, 0.33: small patches miss more of it."""

MOST_LEVELS = 8
"""Outputs of deep supervision that a network may have: nnU-Net's planner makes at most as many stages."""


class Phase(NamedTuple):
    """A part of a training with one patch size."""

    number: int
    """From 0."""
    patch: tuple[int, ...]
    """Voxels per axis."""
    foreground: float
    """Factor of the share of samples that must show foreground."""


def patch_sizes(patch: Sequence[int], strides: Sequence[int]) -> list[tuple[int, ...]]:
    """Return all patch sizes from the smallest legal one to the plan's, one axis growing at a time.

    Parameters
    ----------
    patch
        The plan's.
    strides
        Product of the network's strides per axis: a legal edge is a multiple of it. The bottleneck of the smallest
        patch has two positions per axis, where the plan's has as many: instance norm makes the same two numbers of any
        two positions, and has no gradient then.
    """
    current = [min(2 * stride, edge) for stride, edge in zip(strides, patch, strict=True)]
    sizes = [tuple(current)]
    while sizes[-1] != tuple(patch):
        axis = min(range(len(patch)), key=lambda axis: current[axis] / patch[axis])
        current[axis] = min(current[axis] + strides[axis], patch[axis])
        sizes.append(tuple(current))
    return sizes


def phase_of(epoch: int, epochs: int, phases: int, patch: Sequence[int], strides: Sequence[int]) -> Phase:
    """Return the phase of an epoch among ``phases`` equally long ones, of which the last has the plan's patch.

    There are at most as many phases as epochs.
    """
    phases = min(phases, epochs)
    if phases == 1:
        return Phase(0, tuple(patch), 1.0)
    number = min(phases - 1, epoch * phases // epochs)
    sizes = patch_sizes(patch, strides)
    done = number / (phases - 1)
    return Phase(number, sizes[math.floor(done * (len(sizes) - 1) + 0.5)], 1 + (EARLY_FOREGROUND - 1) * (1 - done))


def compile_each_size(phases: int) -> None:
    """Have torch.compile make one graph for each patch size, and keep all of them.

    From the second size on it would make graphs for any size, which fails where a shape decides how much is padded.
    """
    from torch._dynamo import config

    config.automatic_dynamic_shapes = False
    # Of each size: a student's graph, and a teacher's with and without labelled samples; and of nnU-Net's compiled Dice
    # one for each level of deep supervision, in training and in validation. Other sizes: validation, other batches.
    config.cache_size_limit = max(config.cache_size_limit, (phases + 2) * (3 + 2 * MOST_LEVELS))
