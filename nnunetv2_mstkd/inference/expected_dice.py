"""The Dice to expect of each subset of modalities, from an evaluation of the model."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.inference import evaluation_files
from nnunetv2_mstkd.metrics.conventions import postprocessed_regions

SUMMARY = Path(evaluation_files.FOLDER, evaluation_files.SUMMARY)

LARGEST_COMPONENT = "largest_component"
"""Section of the summary: what keeping only the largest component of the foreground changes."""


def read_expected_dice(
    model_folder: Path,
    names: Sequence[str],
    normalization: str = "plans",
    weights: Mapping[str, str] | None = None,
    *,
    largest_component: bool = False,
) -> dict[int, dict[str, float]]:
    """Read the mean Dice per subset and region from the evaluation in a model folder.

    Parameters
    ----------
    names
        Names of the C channels.
    normalization
        The model's, see :func:`nnunetv2_mstkd.nnunet.per_channel.normalization`.
    weights
        Of the model, for :func:`check_weights`; None: not checked.
    largest_component
        The Dice of the largest component of the foreground alone.

    Returns
    -------
    :func:`~nnunetv2_mstkd.modalities.subset_code` -> region -> Dice between 0 and 1. Empty without an evaluation. A
    region without a finite Dice (nothing to find in any case) is left out.

    Raises
    ------
    InputError
        If the file is no evaluation, or one that did not see what prediction sees.
    """
    file = model_folder / SUMMARY
    if not file.is_file():
        return {}
    expected: dict[int, dict[str, float]] = {}
    with _refused_unless_understood(file):
        content = json.loads(file.read_text(encoding="utf-8"))
        measured = content.get(LARGEST_COMPONENT) or {"subsets": {}} if largest_component else content
        for text, regions in measured["subsets"].items():
            code = modalities.subset_code(modalities.parse_subset(text, names))
            values = {region: measures.get("dice") for region, measures in regions.items()}
            known = {region: dice for region, dice in values.items() if dice is not None and math.isfinite(dice)}
            postprocessed = postprocessed_regions(known)  # prediction does not do that step
            expected[code] = {region: float(dice) for region, dice in known.items() if region not in postprocessed}
    check_weights(content, weights, file)
    check_same_input(content, normalization, file, "no Dice to expect")
    if largest_component and not expected:
        raise InputError(
            f"no Dice to expect: the evaluation in {file} did not measure the largest component alone; evaluate again "
            f"with --restart"
        )
    return expected


def check_same_input(content: Mapping[str, Any], normalization: str, file: Path, otherwise: str) -> None:
    """Raise InputError, with what follows from it, if an evaluation's networks saw other images than in prediction."""
    moved, found = list(map(str, content.get("moved_modalities", ()))), content.get("normalization", "plans")
    if found != normalization:
        reason, option = f"the model now has input.normalization={normalization}", "--restart"
    elif moved:
        reason = f"removing modalities before preprocessing, as prediction does, changes {', '.join(moved)}"
        option = "--restart --mask-first"
    else:
        return
    raise InputError(f"{otherwise}: {reason}, which the evaluation in {file} did not see; evaluate again with {option}")


def check_weights(content: Mapping[str, Any], weights: Mapping[str, str] | None, file: Path) -> None:
    """Raise InputError if an evaluation is of other folds than a model's, or of other weights in one that both have.

    Parameters
    ----------
    content
        Of ``summary.json``; one of an earlier version does not say which weights it is of.
    weights
        By fold, what :func:`~nnunetv2_mstkd.nnunet.checkpoints.fingerprint` gives; it may be shortened in ``content``.
    """
    evaluated = content.get("weights") or {}
    if weights and evaluated and not weights.keys() & evaluated.keys():
        raise InputError(
            f"the evaluation in {file} is of fold {' and '.join(evaluated)}, not of {' and '.join(weights)}; evaluate "
            f"the folds that predict, too"
        )
    for fold, found in evaluated.items():
        if weights is not None and not weights.get(fold, found).startswith(found):
            raise InputError(
                f"the evaluation in {file} is of other weights of fold {fold}; evaluate again with --restart"
            )


Range = tuple[float, float]

MIN_CASES = 10
"""The range of fewer cases says little about the next one."""

ENTROPY = "entropy"
"""Key of the range of entropies, beside those of the regions' Dice."""


TEMPERATURE = "temperature"
"""Key of the temperatures by number of modalities, in the section ``calibration``."""


def read_temperatures(
    model_folder: Path,
    normalization: str | None = None,
    weights: Mapping[str, str] | None = None,
    networks: int = 1,
    options: Mapping[str, Any] | None = None,
) -> dict[int, float]:
    """Read the temperature for each number of modalities from the evaluation in a model folder.

    Parameters
    ----------
    normalization
        For :func:`check_same_input`; None, for a network that only sees complete input: not checked.
    weights
        Of the model, for :func:`check_weights`.
    networks
        How many are averaged. A mean of networks is less certain than each of them and has another temperature.
    options
        Of the prediction, such as ``mirroring``, which averages, too; None: not checked.

    Raises
    ------
    MissingFileError
        Without an evaluation, or with one that did not count logits.
    InputError
        If the file is no evaluation, or one of other images, weights, options or numbers of networks.
    """
    file = model_folder / SUMMARY
    if file.is_file():
        with _refused_unless_understood(file):
            content = json.loads(file.read_text(encoding="utf-8"))
            section = content.get("calibration") or {}
            found = {int(size): float(value) for size, value in section.get(TEMPERATURE, {}).items()}
            if not all(math.isfinite(value) and value > 0 for value in found.values()):
                raise ValueError(f"a temperature is not above 0: {found}")
            averaged = _numbers_of_networks(content) - {networks}
        check_weights(content, weights, file)
        if normalization is not None:
            check_same_input(content, normalization, file, "no temperatures")
        different = _different_options(content, options)
        if different:
            raise InputError(f"the temperatures in {file} are those of a prediction with {' and '.join(different)}")
        if averaged:
            raise InputError(
                f"the temperatures in {file} are those of {' and '.join(map(_of_networks, sorted(averaged)))}, and "
                f"here {_of_networks(networks)} predicts; "
                + ("choose a fold with -f" if averaged == {1} else "choose the folds that were evaluated together")
            )
        if found:
            return found
    raise MissingFileError(
        f"{model_folder} has no temperature to calibrate with; fit it on the validation cases with 'mstkd evaluate -m "
        f"{model_folder}'{' --restart' if file.is_file() else ''}"
    )


def _numbers_of_networks(content: Mapping[str, Any]) -> set[int]:
    """How many networks an evaluation has averaged."""
    return {len(folds.split("+")) for folds in content.get("folds", ())}


def _of_networks(number: int) -> str:
    return "a single network" if number == 1 else f"the mean of {number} networks"


def _different_options(content: Mapping[str, Any], options: Mapping[str, Any] | None) -> list[str]:
    """The options of an evaluation that a prediction has otherwise."""
    return [
        f"{key.replace('_', ' ')} {content[key]}"
        for key, value in (options or {}).items()
        if key in content and content[key] != value
    ]


def read_ranges(
    model_folder: Path,
    names: Sequence[str],
    networks: int | None = 1,
    options: Mapping[str, Any] | None = None,
) -> dict[int, dict[str, Range]]:
    """Read the lowest and highest value of the cases of an evaluation, by subset.

    Parameters
    ----------
    names
        Names of the C channels.
    networks, options
        As for :func:`read_temperatures`; None: other networks than were evaluated. With others, the entropy is another
        one, too, and its range is left out.

    Returns
    -------
    :func:`~nnunetv2_mstkd.modalities.subset_code` -> region, and :data:`ENTROPY`, -> range. Empty without an
    evaluation, or with one of fewer than :data:`MIN_CASES` cases, whose range says little.

    Raises
    ------
    InputError
        If the file is no evaluation.
    """
    file = model_folder / SUMMARY
    if not file.is_file():
        return {}
    with _refused_unless_understood(file):
        content = json.loads(file.read_text(encoding="utf-8"))
        others = networks is None or _numbers_of_networks(content) - {networks}
        alike = not others and not _different_options(content, options)
        return {
            modalities.subset_code(modalities.parse_subset(text, names)): {
                key: (float(low), float(high)) for key, (low, high) in ranges.items() if alike or key != ENTROPY
            }
            for text, ranges in content.get("ranges", {}).items()
            if content["cases_by_subset"][text] >= MIN_CASES
        }


@contextlib.contextmanager
def _refused_unless_understood(file: Path) -> Iterator[None]:
    """Raise InputError for what goes wrong in reading a summary that is none of this model's."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} is not an evaluation of this model's subsets ({type(error).__name__}: {error}); evaluate again"
        ) from error


def format_dice(dice: Mapping[str, float] | None) -> str:
    """Return `` (expected Dice: WT 0.912, TC 0.874)``, or nothing where nothing is known."""
    values = ", ".join(f"{region} {value:.3f}" for region, value in (dice or {}).items())
    return f" (expected Dice: {values})" if values else ""
