"""Evaluating a model on many subsets of its modalities: one preprocessing per case, several subsets per forward pass.

The network runs in this process. Reading and preprocessing happen ahead of it, resampling and metrics behind it, both
in background processes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.evaluation.cases import LabelledCase, check_cases, fold_cases, folder_cases, prepare
from nnunetv2_mstkd.evaluation.montage import Montage, SliceView, slice_images
from nnunetv2_mstkd.evaluation.records import CaseRecords
from nnunetv2_mstkd.evaluation.request import Request
from nnunetv2_mstkd.evaluation.scoring import Rules, SubsetScore, rules_of, score_prediction
from nnunetv2_mstkd.evaluation.stacking import SubsetPredictor, default_stack
from nnunetv2_mstkd.evaluation.subsets import check_zero_is_missing, choose_subsets
from nnunetv2_mstkd.inference.workers import Backlog, ahead, workers
from nnunetv2_mstkd.nnunet import checkpoints
from nnunetv2_mstkd.nnunet.evaluation_support import noted_split, refuse_same_folder, torch_device, trained_folds
from nnunetv2_mstkd.nnunet.model import load_predictor
from nnunetv2_mstkd.nnunet.model_folder import find_checkpoints, parse_folds

IMAGES_AHEAD = 2
"""Preprocessed images that wait for the network; each is as large as all channels of a case."""


@dataclass(frozen=True)
class Measured:
    """What an evaluation has measured.

    Attributes
    ----------
    results:
        The long table; see :data:`~nnunetv2_mstkd.evaluation.results.COLUMNS`.
    rules:
        The rules that the values were computed with.
    settings:
        What all results have in common, for summary.json.
    near:
        Numbers of voxels close to the decision and of all voxels; None: each subset was predicted alone.
    records:
        The records of all cases, which have their pictures.
    """

    results: pd.DataFrame
    rules: Rules
    settings: dict[str, Any]
    near: tuple[int, int] | None
    records: CaseRecords


def run(request: Request) -> Measured:
    """Predict and measure what is not on record yet. Everything is checked before the first prediction."""
    _refuse_other_folders(request)
    predictors = _load(request)
    first = next(iter(predictors.values()))
    names = modalities.modality_names(first.dataset_json)
    subsets = _choose_subsets(request, first, names)
    rules = _rules(request, first)
    cases = _find_cases(request, predictors, names)
    settings = _settings(request, first, names, rules)
    records = CaseRecords(request.output_folder, settings, restart=request.restart)
    for fold, predictor in predictors.items():
        records.use_weights(fold, "+".join(map(checkpoints.fingerprint, predictor.list_of_parameters)))
    opened = [OpenCase(case, records.load(case.fold, case.name)) for case in cases]
    unfinished = [each for each in opened if each.missing(subsets)]
    views = check_cases(
        [each.case for each in unfinished],
        first.plans_manager,
        rules,
        names,
        threads=max(1, request.preprocessing_processes),
        progress=request.progress,
    )
    records.begin()

    stack = _stack(request, first, len(subsets))
    request.report(
        f"{settings['folder']}: cases: {len(cases)}, already evaluated: {len(cases) - len(unfinished)}; "
        f"subsets: {len(subsets)}, {'one at a time' if stack == 1 else f'up to {stack} in one forward pass'}"
    )
    with (
        tqdm(total=len(cases) * len(subsets), unit="subset", disable=not request.progress) as bar,
        workers(request.preprocessing_processes, len(unfinished)) as preparing,
        workers(request.scoring_processes, len(unfinished) * len(subsets)) as scoring,
    ):
        bar.update(bar.total - sum(len(each.missing(subsets)) for each in unfinished))
        evaluator = Evaluator(
            subsets=subsets,
            rules=rules,
            records=records,
            views=views,
            preparing=preparing,
            scoring=scoring,
            processes=request.scoring_processes,
            bar=bar,
            stack=stack,
            mask_first=request.mask_first,
        )
        for fold, predictor in predictors.items():
            evaluator.evaluate(predictor, [each for each in unfinished if each.case.fold == fold])
    results, near = records.table(
        [(case.fold, case.name) for case in cases],
        list(subsets),
        model=request.name or settings["folder"],
        trainer=first.trainer_name,
    )
    return Measured(results, rules, settings, near if evaluator.stack > 1 else None, records)


# ---- before the first prediction -----------------------------------------------------------------------------------


def _refuse_other_folders(request: Request) -> None:
    """Refuse an output folder that is the model's, or holds the images or labels."""
    folders: dict[str, Path | None] = {
        "folder of images": request.images,
        "folder of labels": request.labels,
        "model folder": request.model_folder,
    }
    for what, folder in folders.items():
        if folder is not None:
            refuse_same_folder(request.output_folder, folder, what)


def _load(request: Request) -> dict[str, Any]:
    """A predictor for each group of folds, by the folds as text: each fold alone, or all together for other images."""
    folder, checkpoint = request.model_folder, request.checkpoint
    device = torch_device(request.device)
    if request.folds is None:
        folds = trained_folds(folder, checkpoint)
    else:
        folds = parse_folds(list(dict.fromkeys(request.folds)))
        find_checkpoints(folder, folds, checkpoint)
    groups = [(fold,) for fold in folds] if request.images is None else [folds]
    return {
        "+".join(map(str, group)): load_predictor(
            folder,
            group,
            checkpoint,
            device=device,
            trust=request.trust,
            tile_step_size=request.step_size,
            use_mirroring=request.mirroring,
            perform_everything_on_device=request.on_device,
            allow_tqdm=False,  # there is one bar, over cases and subsets
        )
        for group in groups
    }


def _choose_subsets(request: Request, predictor: Any, names: Sequence[str]) -> dict[str, list[bool]]:
    rows = choose_subsets(names, subsets=request.subsets, available=request.available)
    check_zero_is_missing(rows, names, predictor.configuration_manager.normalization_schemes)
    return {modalities.subset_name(row, names): row for row in rows.tolist()}


def _rules(request: Request, predictor: Any) -> Rules:
    return rules_of(
        predictor.dataset_json,
        predictor.label_manager,
        metrics=request.all_metrics,
        convention=request.convention,
        lesion_convention=request.lesions,
        tolerance=request.tolerance,
    )


def _stack(request: Request, predictor: Any, num_subsets: int) -> int:
    """Subsets per forward pass."""
    if request.mask_first:
        return 1
    return request.stack or default_stack(predictor.configuration_manager.batch_size, num_subsets, predictor.device)


def _find_cases(request: Request, predictors: Mapping[str, Any], names: Sequence[str]) -> list[LabelledCase]:
    """All cases, each with the folds that predict it."""
    if request.images is not None and request.labels is not None:
        (folds,) = predictors
        dataset_json = predictors[folds].dataset_json
        return folder_cases(request.images, request.labels, folds, dataset_json, names, _channels(request, names))
    if "all" in predictors:
        print("warning: fold all was trained on the very cases that it is evaluated on here", file=sys.stderr)
    return [
        case
        for fold, predictor in predictors.items()
        for case in fold_cases(
            fold,
            _noted_split(request, fold),
            predictor.plans_manager,
            predictor.configuration_manager,
            predictor.dataset_json,
            from_images=request.mask_first,
        )
    ]


def _channels(request: Request, names: Sequence[str]) -> list[int]:
    """The channels that a case has.

    Not only those of a subset: what preprocessing sees must not depend on which subsets one call asks for.
    """
    return modalities.parse_subset(request.available or modalities.ALL, names).nonzero().ravel().tolist()


def _noted_split(request: Request, fold: str) -> dict[str, list[str]] | None:
    try:
        return noted_split(request.model_folder / f"fold_{fold}" / request.checkpoint)
    except InputError:
        if request.trust:  # nnU-Net has loaded it
            return None
        raise


def _settings(request: Request, predictor: Any, names: Sequence[str], rules: Rules) -> dict[str, Any]:
    """What all results of one output folder have in common."""
    settings = {
        "folder": request.model_folder.resolve().name,
        "dataset": predictor.plans_manager.dataset_name,
        "source": "validation" if request.images is None else str(request.images.resolve()),
        "labels": None if request.labels is None else str(request.labels.resolve()),
        "checkpoint": request.checkpoint,
        "mirroring": request.mirroring,
        "step_size": request.step_size,
        "mask_first": request.mask_first,
        "channels": list(names),
        "regions": {name: list(labels) for name, labels in rules.regions.items()},
        "metrics": list(rules.metrics),
        "convention": rules.convention,
        "lesion_convention": rules.lesion_convention,
        "tolerance": rules.tolerance,
    }
    if request.images is not None and not request.mask_first:
        settings["preprocessed_from"] = [names[channel] for channel in _channels(request, names)]
    return settings


# ---- predicting and measuring --------------------------------------------------------------------------------------


@dataclass
class OpenCase:
    """A case, and what is known of it so far.

    Attributes
    ----------
    case:
        The case.
    scores:
        Its results by subset.
    images:
        The images in the slice to show, uint8, shape (C, rows, columns); None before the first prediction.
    """

    case: LabelledCase
    scores: dict[str, SubsetScore] = field(default_factory=dict)
    images: np.ndarray | None = None

    def missing(self, subsets: Mapping[str, Sequence[bool]]) -> list[str]:
        """The subsets without a result."""
        return [subset for subset in subsets if subset not in self.scores]

    def show(self, images: np.ndarray) -> None:
        """Add the images in the slice: with mask_first each prediction sees only the channels of its subset."""
        known = images if self.images is None else self.images
        self.images = np.where(known.any((1, 2), keepdims=True), known, images)

    def montage(self, view: SliceView) -> Montage:
        """The pictures of the subsets that were predicted in this run."""
        assert self.images is not None
        slices = {subset: score.slice for subset, score in self.scores.items() if score.slice is not None}
        return Montage(view.axis, view.index, view.depth, self.images, view.reference, slices)


@dataclass(kw_only=True)
class Evaluator:
    """Predicts and measures cases; everything that is the same for all of them.

    Attributes
    ----------
    subsets:
        The subsets to evaluate: name -> a bool per channel.
    rules:
        What is measured.
    records:
        Where the results of a complete case are written.
    views:
        The slice to show of each case, by fold and name.
    preparing, scoring:
        Executors for reading and preprocessing, and for resampling and metrics.
    processes:
        Number of processes of ``scoring``; 0: it runs in this process.
    bar:
        Counts cases x subsets.
    stack:
        Subsets per forward pass; it shrinks if the device runs out of memory.
    mask_first:
        Remove the absent channels before preprocessing, once per subset, instead of after it.
    """

    subsets: Mapping[str, Sequence[bool]]
    rules: Rules
    records: CaseRecords
    views: Mapping[tuple[str, str], SliceView]
    preparing: Executor
    scoring: Executor
    processes: int
    bar: tqdm
    stack: int
    mask_first: bool

    def evaluate(self, predictor: Any, cases: Sequence[OpenCase]) -> None:
        """Predict and measure the missing subsets of cases.

        Parameters
        ----------
        predictor:
            nnU-Net's predictor with the weights for ``cases``; it cannot be used afterwards.
        cases:
            Checked cases.
        """
        model = predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
        jobs = [(each, subsets) for each in cases for subsets in self._batches(each)]
        stacked = SubsetPredictor(predictor, self.stack)
        backlog = Backlog(self.scoring, self._add)
        arguments = ((each.case, self._absent(subsets), *model) for each, subsets in jobs)
        prepared = ahead(self.preparing, prepare, arguments, IMAGES_AHEAD)
        try:
            for (each, subsets), (data, properties) in zip(jobs, prepared, strict=True):
                case, view = each.case, self._view(each)
                self.bar.set_description(f"fold {case.fold}, {case.name}")
                each.show(slice_images(data, properties, view, predictor.plans_manager.transpose_forward))
                rows = torch.tensor([self.subsets[subset] for subset in subsets])
                for subset, logits in zip(subsets, stacked.logits(torch.from_numpy(data), rows), strict=True):
                    measured = logits, properties, case.label, *model, self.rules, view
                    backlog.submit((each, subset), score_prediction, *measured)
                    # logits wait in memory for a free process
                    backlog.collect(self.processes + stacked.stack if self.processes else 0)
            backlog.collect()
        finally:
            stacked.close()
        self.stack = stacked.stack

    def _batches(self, case: OpenCase) -> Iterator[list[str]]:
        """The subsets that are predicted from one preprocessed image."""
        missing = case.missing(self.subsets)
        if self.mask_first:
            yield from ([subset] for subset in missing)
        elif missing:
            yield missing

    def _absent(self, subsets: Sequence[str]) -> tuple[int, ...]:
        """The channels to remove before preprocessing."""
        if not self.mask_first:
            return ()
        return tuple(channel for channel, available in enumerate(self.subsets[subsets[0]]) if not available)

    def _view(self, case: OpenCase) -> SliceView:
        return self.views[case.case.fold, case.case.name]

    def _add(self, label: tuple[OpenCase, str], score: SubsetScore) -> None:
        """Add the result of a subset, and write those of a case that is complete."""
        case, subset = label
        case.scores[subset] = score
        if not case.missing(self.subsets):
            self.records.save(case.case.fold, case.case.name, case.scores, case.montage(self._view(case)))
            case.scores, case.images = {}, None  # on disk now; the pictures of many cases fill memory
        self.bar.update()
