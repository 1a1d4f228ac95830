"""Which cases of a fold a trainer uses, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.nnunet.case_facts import CaseFacts


def divide_cases(
    train: Sequence[str],
    validation: Sequence[str],
    facts: Mapping[str, CaseFacts],
    *,
    trains_on: Callable[[CaseFacts], bool],
    use_unlabelled: bool,
    fold: int | str,
    trainer: str,
) -> dict[str, Any]:
    """Divide the cases of a fold.

    Parameters
    ----------
    train, validation
        The fold's cases.
    facts
        What each of them has.
    trains_on
        Whether the trainer trains on a labelled case.
    use_unlabelled
        Whether it learns from complete cases without a label.
    fold, trainer
        For messages.

    Returns
    -------
    ``train`` and ``val``, in the order given; ``unlabelled``, training cases without a label that are used; and
    ``left_out``, the other training cases by reason.

    Raises
    ------
    InputError
        If there is nothing to train on, or nothing to validate on.
    """
    labelled = [case for case in train if facts[case].labelled]
    kept = [case for case in labelled if trains_on(facts[case])]
    unlabelled = [case for case in train if not facts[case].labelled]
    used = [case for case in unlabelled if use_unlabelled and facts[case].complete]
    validated = [case for case in validation if facts[case].labelled]
    if not kept:
        hint = "; teacher.cases=all trains a teacher on incomplete cases" if labelled else ""
        raise InputError(
            f"fold {fold} has no training case for {trainer}: {len(train)} training cases, {len(unlabelled)} "
            f"unlabelled and {len(labelled)} incomplete ones{hint}"
        )
    if not validated:
        raise InputError(
            f"fold {fold} has no validation case for {trainer}: {len(train)} training cases, {len(validation)} "
            f"validation cases without a label"
        )
    left_out = {"incomplete": sorted({*labelled} - {*kept}), "unlabelled": sorted({*unlabelled} - {*used})}
    return {"train": kept, "val": validated, "unlabelled": sorted(used), "left_out": left_out}


def describe_cases(split: Mapping[str, Any], facts: Mapping[str, CaseFacts], names: Sequence[str]) -> str | None:
    """Say in one line how many training cases lack modalities or a label; None if none does and all are used.

    ``split`` is from :func:`divide_cases`, ``names`` are those of the channels.
    """
    rows = [facts[case].present for case in split["train"]]
    counts = {name: sum(not row[channel] for row in rows) for channel, name in enumerate(names)}
    incomplete = sum(not all(row) for row in rows)
    others = [f"{len(split['unlabelled'])} unlabelled"] if split["unlabelled"] else []
    others += [f"{len(cases)} {reason} left out" for reason, cases in split["left_out"].items() if cases]
    if not incomplete and not others:
        return None
    without = ", ".join(f"{name} {number}" for name, number in counts.items() if number)
    lacking = [f"{incomplete} of them incomplete (without {without})"] if incomplete else []
    return f"training cases: {', '.join([f'{len(rows)} labelled', *lacking, *others])}"
