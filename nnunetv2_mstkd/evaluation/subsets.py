"""Evaluating a model on many subsets of its modalities: one preprocessing per case, several subsets per forward pass.

The network runs in this process. Reading and preprocessing go on before it, resampling and metrics behind it, both in
background processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from tqdm import tqdm

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.evaluation.case_records import CaseRecords
from nnunetv2_mstkd.evaluation.cases import LabelledCase, prepare
from nnunetv2_mstkd.evaluation.scoring import Rules, score_prediction
from nnunetv2_mstkd.evaluation.stacking import SubsetPredictor
from nnunetv2_mstkd.evaluation.strips import CaseStrip, View, background
from nnunetv2_mstkd.inference.workers import ahead

IMAGES_AHEAD = 2
"""Preprocessed images that wait for the network; each is as large as all channels of a case."""


def choose_subsets(names: Sequence[str], *, subsets: Sequence[str] = (), available: str | None = None) -> torch.Tensor:
    """The subsets to evaluate, in the order of this package.

    Parameters
    ----------
    names:
        of the C channels.
    subsets:
        as text, ``["T1ce+FLAIR", "all"]``; none: all of them.
    available:
        the modalities that there are, ``"T1,FLAIR"``: only their subsets; None: all.

    Returns
    -------
    Tensor of bool, shape (S, C).

    Raises
    ------
    ValueError
        for an unknown modality, a subset that stands twice or is not available, and where all subsets of more than six
        modalities are asked for.
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
    """Refuse a subset without a channel whose normalisation turns zero into another value.

    Raises
    ------
    ValueError
        naming the channel.
    """
    for channel, (name, scheme) in enumerate(zip(names, schemes, strict=True)):
        if not bool(subsets[:, channel].all()) and scheme not in modalities.ZERO_KEEPING_NORMALIZATIONS:
            raise InputError(
                f"{name} is absent from a subset, but {scheme} turns the zero image of an absent modality into another "
                f"value; evaluate only subsets with it, for example --subsets all"
            )


@dataclass(frozen=True)
class _Job:
    """An image to prepare, and the subsets (rows of the list) to predict it with."""

    case: LabelledCase
    rows: tuple[int, ...]
    absent: tuple[int, ...]


def evaluate_cases(
    predictor: nnUNetPredictor,
    cases: Sequence[LabelledCase],
    subsets: torch.Tensor,
    rules: Rules,
    records: CaseRecords,
    views: Mapping[tuple[str, str], View],
    *,
    stack: int,
    mask_first: bool,
    preparing: Executor,
    scoring: Executor,
    scoring_processes: int,
    bar: tqdm,
) -> int:
    """Predict and measure cases with every subset that their records do not have yet.

    Parameters
    ----------
    predictor:
        from :func:`~nnunetv2_mstkd.nnunet.model.load_predictor`; it is used up.
    cases:
        checked, all of them for the weights of ``predictor``.
    subsets:
        bool, shape (S, C).
    rules:
        what is measured.
    records:
        where results go; a case's file is written when it is complete.
    views:
        the slice of each case to keep for pictures, by fold and name, for all cases that are not complete.
    stack:
        subsets per forward pass.
    mask_first:
        remove the absent channels before preprocessing, once per subset, instead of after it.
    preparing, scoring:
        where reading and preprocessing, and resampling and metrics, run; ``scoring_processes`` of the latter.
    bar:
        counts cases x subsets.

    Returns
    -------
    The stack at the end, smaller than asked for where the device's memory did not suffice.
    """
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    dataset_json = predictor.dataset_json
    names = modalities.modality_names(dataset_json)
    texts = [modalities.subset_name(row, names) for row in subsets.tolist()]
    known = {case.name: records.load(case.fold, case.name) for case in cases}
    missing = {case.name: [row for row, text in enumerate(texts) if text not in known[case.name]] for case in cases}
    bar.update(sum(len(texts) - len(rows) for rows in missing.values()))
    jobs = list(_jobs(cases, missing, subsets, mask_first))
    stacked = SubsetPredictor(predictor, stack)
    pending: deque[tuple[LabelledCase, str, Future]] = deque()
    images: dict[str, np.ndarray] = {}

    def collect(limit: int) -> None:
        while pending and (len(pending) > limit or pending[0][2].done()):
            case, text, future = pending.popleft()
            scores = known[case.name]
            scores[text] = future.result()
            if all(each in scores for each in texts):
                view = views[case.fold, case.name]
                slices = {each: score.slice for each, score in scores.items() if score.slice is not None}
                strip = CaseStrip(view.axis, view.index, view.depth, images.pop(case.name), view.reference, slices)
                records.save(case.fold, case.name, scores, strip)
            bar.update()

    arguments = ((job.case, job.absent, plans, configuration, dataset_json) for job in jobs)
    prepared = ahead(preparing, prepare, arguments, IMAGES_AHEAD)
    try:
        for job, (data, properties) in zip(jobs, prepared, strict=True):
            bar.set_description(f"fold {job.case.fold}, {job.case.name}")
            view = views[job.case.fold, job.case.name]
            seen = background(data, properties, view, plans.transpose_forward)
            # with mask_first each image shows only the channels of its subset
            known_images = images.get(job.case.name, seen)
            images[job.case.name] = np.where(known_images.any((1, 2), keepdims=True), known_images, seen)
            logits = stacked.logits(torch.from_numpy(data), subsets[list(job.rows)])
            for row, of_subset in zip(job.rows, logits, strict=True):
                what = of_subset, properties, job.case.label, plans, configuration, dataset_json, rules, view
                task = scoring.submit(score_prediction, *what)
                pending.append((job.case, texts[row], task))
                # logits wait in memory for a free process
                collect(scoring_processes + stacked.stack if scoring_processes else 0)
        collect(0)
    finally:
        stacked.close()
    return stacked.stack


def _jobs(
    cases: Sequence[LabelledCase], missing: Mapping[str, Sequence[int]], subsets: torch.Tensor, mask_first: bool
) -> Iterator[_Job]:
    for case in cases:
        rows = tuple(missing[case.name])
        if not mask_first:
            if rows:
                yield _Job(case, rows, ())
            continue
        for row in rows:
            absent = tuple(torch.nonzero(~subsets[row]).ravel().tolist())
            yield _Job(case, (row,), absent)
