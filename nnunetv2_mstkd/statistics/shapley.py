"""What each modality contributes: exact Shapley values over all subsets.

The modalities are the players of a cooperative game whose value v(S) is the mean metric with the subset S. The Shapley
value (Shapley 1953) of a modality is its mean gain over all orders in which modalities can be added. With 2^C - 1
subsets evaluated nothing needs to be sampled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.evaluation.results import MODEL, REGION, SEPARATOR, VALUE
from nnunetv2_mstkd.metrics.conventions import metric_named
from nnunetv2_mstkd.statistics.bootstrap import SAMPLES, Cube, bootstrap_means, cube, interval, mean, patient_numbers

MAX_PLAYERS = 6
"""63 subsets; nobody evaluates more."""

MODALITY = "modality"


def shapley_values(
    game: Mapping[Iterable[str], float], players: Sequence[str], *, empty_value: float = 0.0
) -> dict[str, float]:
    """Exact Shapley values of a set function.

    phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! * (v(S + i) - v(S)). They add up to v(all) - v(nothing).

    Parameters
    ----------
    game:
        value by set of players, for each non-empty set: ``{("T1",): 0.6, ("T1", "T2"): 0.8, ...}``.
    players:
        one to six names.
    empty_value:
        v(nothing).

    Raises
    ------
    ValueError
        for more than six players, a set that is missing or given twice, or one with an unknown player.
    """
    _check_players(players)
    values = np.full(2 ** len(players), np.nan)
    given = np.zeros(len(values), dtype=bool)
    for members, value in game.items():
        code = _code(tuple(members), players)
        if given[code] or code == 0:
            raise InputError(f"the set {tuple(members)} is {'empty' if code == 0 else 'given twice'}")
        given[code], values[code] = True, value
    values[0], given[0] = empty_value, True
    if not given.all():
        raise InputError(f"the game has no value of {_names(int(np.flatnonzero(~given)[0]), players)}")
    return dict(zip(players, (shapley_matrix(len(players)) @ values).tolist(), strict=True))


def shapley_matrix(num_players: int) -> np.ndarray:
    """The matrix that turns the values of all sets into Shapley values.

    Returns
    -------
    Array of shape (players, 2^players). Bit p of a column's number tells whether player p is in the set.
    """
    codes = np.arange(2**num_players)
    sizes = np.array([int(code).bit_count() for code in codes])
    weights = np.array(
        [math.factorial(s) * math.factorial(num_players - s - 1) for s in range(num_players)]
    ) / math.factorial(num_players)
    rows = []
    for player in range(num_players):
        member = codes >> player & 1 == 1
        # a set gains its value where the player is its last member and loses it where the player is added to it
        rows.append(np.where(member, weights[sizes - 1], -weights[np.minimum(sizes, num_players - 1)]))
    return np.stack(rows)


def shapley(
    results: pd.DataFrame,
    *,
    metric: str = "dice",
    models: Sequence[str] | None = None,
    regions: Sequence[str] | None = None,
    patients: Mapping[str, str] | None = None,
    empty_value: float | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Shapley values of the modalities with bootstrap intervals over patients.

    Parameters
    ----------
    results:
        all 2^C - 1 subsets, C at most 6; see :data:`~nnunetv2_mstkd.evaluation.results.COLUMNS`.
    metric, models, regions:
        which values; default Dice, all models and regions.
    patients:
        patient by case; see :func:`~nnunetv2_mstkd.evaluation.results.patients_of`. None: every case is a patient.
    empty_value:
        v(nothing), the value without any input. 0, that is nothing segmented, is taken for metrics where higher is
        better; others have no such value and need one here.
    samples, seed, level:
        of the intervals.

    Returns
    -------
    Table with the columns model, region, modality, value, low, high.

    Raises
    ------
    ValueError
        for more than six modalities, missing subsets, or a metric that needs ``empty_value``.
    """
    if empty_value is None:
        if metric_named(metric).better <= 0:
            raise InputError(f"{metric} without any input has no natural value; give it as empty_value")
        empty_value = 0.0
    data = cube(results, metric, models=models, regions=regions)
    order = subset_columns(data)
    groups = patient_numbers(data.cases, patients)
    matrix = shapley_matrix(len(data.modalities))
    # (cases, models, regions, 2^C - 1), sets in the order of the matrix's columns
    values = data.values[:, :, order].transpose(1, 0, 3, 2)
    exact = _apply(matrix, mean(values, axis=0), empty_value)
    resampled = bootstrap_means(values.reshape(len(data.cases), -1), groups, samples, seed)
    spread = _apply(matrix, resampled.reshape(samples, *values.shape[1:]), empty_value)
    low, high = (limit.reshape(exact.shape) for limit in interval(spread.reshape(samples, -1), groups, level))
    rows = [
        (model, region, name, exact[m, r, i], low[m, r, i], high[m, r, i])
        for m, model in enumerate(data.models)
        for r, region in enumerate(data.regions)
        for i, name in enumerate(data.modalities)
    ]
    return pd.DataFrame(rows, columns=[MODEL, REGION, MODALITY, VALUE, "low", "high"])


def subset_columns(data: Cube) -> np.ndarray:
    """Where each set of modalities, coded 1 ... 2^C - 1, stands along the axis of subsets; all must be there."""
    _check_players(data.modalities)
    codes = [_code(subset.split(SEPARATOR), data.modalities) for subset in data.subsets]
    wanted = range(1, 2 ** len(data.modalities))
    missing = [code for code in wanted if code not in codes]
    if missing:
        names = ", ".join(_names(code, data.modalities) for code in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"Shapley values need all {len(wanted)} subsets; the results lack {names}{more}")
    return np.array([codes.index(code) for code in wanted])


def _apply(matrix: np.ndarray, values: np.ndarray, empty_value: float) -> np.ndarray:
    """Shapley values, shape (..., C), from the values of the non-empty sets, shape (..., 2^C - 1)."""
    return values @ matrix[:, 1:].T + empty_value * matrix[:, 0]


def _check_players(players: Sequence[str]) -> None:
    if not 1 <= len(players) <= MAX_PLAYERS:
        raise InputError(
            f"exact Shapley values are defined here for 1 to {MAX_PLAYERS} modalities ({2**MAX_PLAYERS - 1} subsets), "
            f"found {len(players)}"
        )
    if len(set(players)) < len(players):
        raise InputError(f"a player stands twice in {', '.join(players)}")


def _code(members: Sequence[str], players: Sequence[str]) -> int:
    unknown = [name for name in members if name not in players]
    if unknown:
        raise InputError(f"unknown player {unknown[0]!r}; known are {', '.join(players)}")
    return sum(1 << players.index(name) for name in set(members))


def _names(code: int, players: Sequence[str]) -> str:
    return SEPARATOR.join(name for number, name in enumerate(players) if code >> number & 1)
