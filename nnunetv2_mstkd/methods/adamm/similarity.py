"""How alike the adapters of different subsets are (AdaMM's Fig. 10)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch.nn import functional

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import InputError

COLUMNS = ("stage", "first", "second", "weights", "map", "chance")
"""Stage (E1: after the second encoder stage; D1: after the deepest decoder stage), two subsets, the two cosine
similarities, and the mean size of a cosine between all weights of two adapters that have not been trained."""


def adapter_similarity(network: Any, subsets: torch.Tensor, names: Sequence[str]) -> pd.DataFrame:
    """Compare the adapters of all pairs of subsets, at every stage.

    Parameters
    ----------
    network
        An :class:`~nnunetv2_mstkd.methods.adamm.network.AdaptiveUNet`.
    subsets
        Bool, (S, C). The full set is left out: it has no adapter.
    names
        Names of the C modalities.

    Returns
    -------
    Table with :data:`COLUMNS`, S^2 rows per stage. ``weights`` is the paper's: the cosine of all weights of two
    adapters, in which the random initial values of their first layers (down), which differ, never cancel out. Cosines
    of unrelated vectors of d numbers have a mean size of sqrt(2 / (pi d)), and the other weights start at zero, so d is
    the number of weights in down. ``chance`` is NaN for a factorised bank, whose subsets share parts from the start.
    ``map`` is the cosine of the matrices up . down, the adapters' linear parts: these start at zero, so only training
    shows in them. NaN where a matrix is still zero.

    Raises
    ------
    InputError
        If the network has no adapters, or fewer than two subsets have one.
    """
    if getattr(network, "encoder_adapters", None) is None:
        raise InputError("the network has no adapters; expected one of AdaMMTrainer with adamm.adapters = true")
    subsets = subsets[~subsets.all(1)]
    if len(subsets) < 2:
        raise InputError("similarity needs at least two subsets with adapters; the full set has none")
    texts = [modalities.subset_name(row, names) for row in subsets.tolist()]
    rows: list[tuple[Any, ...]] = []
    with torch.no_grad():
        selection = network.subsets(subsets)
        for letter, banks in (("E", network.encoder_adapters), ("D", network.decoder_adapters)):
            for number, bank in enumerate(banks, 1):
                down, down_bias, up, up_bias = bank.weights(selection)
                whole = torch.cat([part.flatten(1) for part in (down, down_bias, up, up_bias)], 1)
                cosines = zip(_cosines(whole), _cosines((up @ down).flatten(1)), strict=True)
                chance = math.nan if bank.factorised else math.sqrt(2 / (math.pi * down[0].numel()))
                rows += [
                    (f"{letter}{number}", first, second, weights, linear, chance)
                    for first, pair in zip(texts, cosines, strict=True)
                    for second, weights, linear in zip(texts, *pair, strict=True)
                ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _cosines(vectors: torch.Tensor) -> list[list[float]]:
    """Of S vectors with one another; NaN for a zero vector."""
    vectors = vectors.double()
    unit = functional.normalize(vectors, dim=1)
    unit[(vectors == 0).all(1)] = math.nan
    return (unit @ unit.T).tolist()
