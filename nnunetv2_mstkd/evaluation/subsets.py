"""The subsets of modalities to evaluate."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import InputError


def choose_subsets(names: Sequence[str], *, subsets: Sequence[str] = (), available: str | None = None) -> torch.Tensor:
    """Choose the subsets to evaluate, in the order of this package.

    Parameters
    ----------
    names:
        Names of the C channels.
    subsets:
        Subsets as text, ``["T1ce+FLAIR", "all"]``; empty: all of them.
    available:
        The modalities at hand, ``"T1,FLAIR"``: only their subsets are chosen; None: all modalities.

    Returns
    -------
    Tensor of bool, shape (S, C). All subsets of more than six modalities are refused.
    """
    there = modalities.parse_subset(modalities.ALL if available is None else available, names)
    if subsets:
        chosen = modalities.parse_subsets(subsets, names)
        beyond = chosen[(chosen & ~there).any(1)]
        if len(beyond):
            raise InputError(
                f"the subset {modalities.subset_name(beyond[0].tolist(), names)} is not within --available {available}"
            )
        order = sorted(range(len(chosen)), key=lambda row: (int(chosen[row].sum()), *(~chosen[row]).tolist()))
        return chosen[order]
    number = int(there.sum())
    if number > modalities.ENUMERATION_LIMIT:
        raise InputError(
            f"{number} modalities have {2**number - 1} subsets; name those to evaluate with --subsets, for example "
            f"--subsets all {names[0]}, or at most {modalities.ENUMERATION_LIMIT} modalities with --available"
        )
    if number == 1:
        return there[None]
    rows = torch.zeros(2**number - 1, len(names), dtype=torch.bool)
    rows[:, there] = modalities.all_subsets(number)
    return rows


def check_zero_is_missing(subsets: torch.Tensor, names: Sequence[str], schemes: Sequence[str]) -> None:
    """Refuse a subset without a channel whose normalisation turns zero into another value."""
    for channel, (name, scheme) in enumerate(zip(names, schemes, strict=True)):
        if not bool(subsets[:, channel].all()) and scheme not in modalities.ZERO_KEEPING_NORMALIZATIONS:
            raise InputError(
                f"{name} is absent from a subset, but {scheme} turns the zero image of an absent modality into another "
                f"value; evaluate only subsets with it, for example --subsets all"
            )
