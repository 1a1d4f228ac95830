"""Evaluating a model on many subsets of its modalities: one preprocessing per case, several subsets per forward pass.

The network runs in this process. Reading and preprocessing happen ahead of it, resampling and metrics behind it, both
in background processes.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.evaluation.cases import LabelledCase, check_cases, fold_cases, folder_cases, prepare
from nnunetv2_mstkd.evaluation.montage import Montage, SliceView, slice_images
from nnunetv2_mstkd.evaluation.records import CaseRecords, Collected
from nnunetv2_mstkd.evaluation.request import Request
from nnunetv2_mstkd.evaluation.results import AVERAGE, CASE, PATIENT, first_of
from nnunetv2_mstkd.evaluation.scoring import Rules, SubsetScore, rules_of, score_prediction
from nnunetv2_mstkd.evaluation.stacking import SubsetPredictor, default_stack
from nnunetv2_mstkd.evaluation.subsets import check_zero_is_missing, choose_subsets
from nnunetv2_mstkd.images.atomic import locked
from nnunetv2_mstkd.inference.workers import Backlog, ahead, workers
from nnunetv2_mstkd.metrics.conventions import CONVENTIONS, DICE
from nnunetv2_mstkd.nnunet import checkpoints, mask_differences
from nnunetv2_mstkd.nnunet.folders import (
    find_checkpoints,
    find_raw_folder,
    nnunet_folder,
    parse_folds,
    refuse_same_folder,
    trained_folds,
)
from nnunetv2_mstkd.nnunet.input_folder import Case
from nnunetv2_mstkd.nnunet.model import find_device, load_predictor
from nnunetv2_mstkd.nnunet.patients import patient_naming
from nnunetv2_mstkd.nnunet.per_channel import PER_CHANNEL, normalization

IMAGES_AHEAD = 2
"""Preprocessed images that wait for the network; each is as large as all channels of a case."""


@dataclass(frozen=True)
class Measured:
    """What an evaluation has measured, the rules of its values, and the records with the pictures."""

    found: Collected
    near: tuple[int, int] | None
    """As in ``found``; None: each subset was predicted alone."""
    rules: Rules
    settings: dict[str, Any]
    """What all results have in common, for summary.json."""
    records: CaseRecords

    @property
    def empty_dice(self) -> dict[tuple[str, str], float]:
        """Dice of a segmentation without any voxel, by case and region; 0 where the reference has the region."""
        both = float(CONVENTIONS[self.rules.convention].rules[DICE].both)
        return {
            (case, region): both
            for (_, case), lacking in self.found.lacking.items()
            for region, plain in self.rules.plain.items()
            if plain in lacking
        }


@dataclass
class OpenCase:
    """A case, and what is known of it so far."""

    case: LabelledCase
    scores: dict[str, SubsetScore]
    view: SliceView | None = None
    """The slices to show; None until the case is read."""
    images: list[np.ndarray] = field(default_factory=list)
    """The images in each of these slices, uint8, shape (C, rows, columns); empty before the first prediction."""

    def show(self, images: list[np.ndarray]) -> None:
        """Add the images in the slices: with mask_first each prediction sees only the channels of its subset."""
        known = self.images or images
        self.images = [
            np.where(old.any((1, 2), keepdims=True), old, new) for old, new in zip(known, images, strict=True)
        ]

    def montage(self) -> Montage:
        """The pictures of the subsets that were predicted in this run."""
        assert self.images and self.view is not None
        shown = {subset: score for subset, score in self.scores.items() if score.slices}
        first, *further = (
            Montage(
                view.axis,
                view.index,
                view.depth,
                images,
                view.reference,
                {subset: score.slices[n] for subset, score in shown.items()},
                {subset: score.entropies[n] for subset, score in shown.items()},
            )
            for n, (view, images) in enumerate(zip(self.view.every, self.images, strict=True))
        )
        return replace(first, further=tuple(further))


class Evaluator:
    """Predicts and measures what is not on record yet; model, options and cases are checked when it is made."""

    def __init__(self, request: Request) -> None:
        self.request = request
        others = {
            "folder of images": request.images,
            "folder of labels": request.labels,
            "model folder": request.model_folder,
        }
        for what, folder in others.items():
            if folder is not None:
                refuse_same_folder(request.output_folder, folder, what)
        self.predictors = self._load()
        self.model = next(iter(self.predictors.values()))
        self.names = modalities.modality_names(self.model.dataset_json)
        self.patient_of = patient_naming(self.model.dataset_json)
        self.subsets = self._choose_subsets()
        self.every_subset = len(self.subsets) == 2 ** len(self.names) - 1
        self.rules = self._rules()
        self._read_notes: dict[str, checkpoints.Notes] = {}
        self.mask_first, self.moved = False, list[str]()
        found = self._find_cases()
        self.settings = self._settings()
        self.records = CaseRecords(request.output_folder, self.settings, restart=request.restart)
        self.weights: dict[str, str] = {}
        for fold, predictor in self.predictors.items():
            fingerprints = [checkpoints.fingerprint(weights) for weights in predictor.list_of_parameters]
            self.records.use_weights(fold, "+".join(fingerprints))
            short = (each[: checkpoints.SHORT] for each in fingerprints)
            self.weights |= dict(zip(fold.split("+"), short, strict=True))
        self.cases = self._check(found)
        self._drop_subsets()
        self.unfinished = [each for each in self.cases if self._missing(each)]
        self.stack = self._stack()

    def run(self) -> Measured:
        """Predict and measure the missing subsets of all cases, and read all results.

        InputError if another process does that for one of the folds.
        """
        output = self.request.output_folder
        output.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            for fold in dict.fromkeys(each.case.fold for each in self.unfinished):
                busy = f"another process evaluates fold {fold} into {output}; wait for it, or choose another folder"
                held.enter_context(locked(output / f"fold_{fold}", busy))
            return self._run()

    def _run(self) -> Measured:
        request, tasks = self.request, sum(len(each.case.subsets(self.subsets)) for each in self.cases)
        missing = sum(len(self._missing(each)) for each in self.unfinished)
        self.records.begin()
        self._note_cases(complete=False)
        request.report(
            f"{self.settings['folder']}: cases: {len(self.cases)}, already evaluated: "
            f"{len(self.cases) - len(self.unfinished)}; subsets: {len(self.subsets)}, "
            f"{'one at a time' if self.stack == 1 else f'up to {self.stack} in one forward pass'}"
        )
        with (
            tqdm(total=tasks, initial=tasks - missing, unit="subset", disable=not request.progress) as bar,
            workers(request.preprocessing_processes, len(self.unfinished)) as preparing,
            workers(request.scoring_processes, missing) as scoring,
        ):
            for fold, predictor in self.predictors.items():
                cases = [each for each in self.unfinished if each.case.fold == fold]
                self._evaluate(predictor, cases, preparing, scoring, bar)
        self._note_cases(complete=self.every_subset)
        evaluated = [(each.case.fold, each.case.name, each.case.subsets(self.subsets)) for each in self.cases]
        found = self.records.collect(
            evaluated, model=request.name or self.settings["folder"], trainer=self.model.trainer_name
        )
        # not in the records: cases and folds may be added
        moved = {"moved_modalities": self.moved} if self.moved else {}
        settings = {**self.settings, "weights": self.weights, **moved, **self._cost()}
        settings["description"] = str(self.model.dataset_json.get("description") or "")
        if self.patient_of is not None:
            patients = found.results[CASE].map(self.patient_of)
            found = found._replace(results=found.results.assign(**{PATIENT: patients}))
        return Measured(found, found.near if self.stack > 1 else None, self.rules, settings, self.records)

    def _note_cases(self, complete: bool) -> None:
        """Note the validation cases of each fold, and whether all subsets of their modalities have results."""
        for fold in self.predictors if self.request.images is None else ():
            cases = [each.case.name for each in self.cases if each.case.fold == fold]
            self.records.note_cases(fold, cases, complete=complete)

    # ---- before the first prediction -------------------------------------------------------------------------------

    def _load(self) -> dict[str, Any]:
        """A predictor for each group of folds, by the folds as text: each fold alone, or all for a folder of images."""
        request = self.request
        device = find_device(request.device)
        if request.folds is None:
            folds = trained_folds(request.model_folder, request.checkpoint)
        else:
            folds = parse_folds(request.folds)
            find_checkpoints(request.model_folder, folds, request.checkpoint)
        groups = [(fold,) for fold in folds] if request.images is None else [folds]
        return {
            "+".join(map(str, group)): load_predictor(
                request.model_folder,
                group,
                request.checkpoint,
                device=device,
                trust=request.trust,
                tile_step_size=request.step_size,
                use_mirroring=request.mirroring,
                perform_everything_on_device=request.on_device,
                allow_tqdm=False,  # there is one bar, over cases and subsets
            )
            for group in groups
        }

    def _choose_subsets(self) -> dict[str, list[bool]]:
        rows = choose_subsets(self.names, subsets=self.request.subsets, available=self.request.available)
        check_zero_is_missing(rows, self.names, self.model.configuration_manager.normalization_schemes)
        return {modalities.subset_name(row, self.names): row for row in rows.tolist()}

    def _rules(self) -> Rules:
        if AVERAGE in self.model.dataset_json["labels"]:
            raise InputError(f"a label is called {AVERAGE!r}, as the mean over all of them; rename it in dataset.json")
        return rules_of(
            self.model.dataset_json,
            self.model.label_manager,
            metrics=self.request.all_metrics,
            convention=self.request.convention,
            lesion_convention=self.request.lesions,
            tolerance=self.request.tolerance,
            min_voxels=self.request.min_voxels,
        )

    def _find_cases(self) -> list[LabelledCase]:
        """All cases, each with the fold or folds that predict it."""
        request, dataset_json = self.request, self.model.dataset_json
        if request.images is not None and request.labels is not None:
            (folds,) = self.predictors
            cases = folder_cases(request.images, request.labels, folds, dataset_json, self.names, self._channels())
            self._choose_order([case.images for case in cases if case.images is not None])
            return cases
        if "all" in self.predictors:
            print("warning: fold all was trained on the very cases that it is evaluated on here", file=sys.stderr)
        self._choose_order()
        model = self.model.plans_manager, self.model.configuration_manager, dataset_json
        how: dict[str, Any] = {"from_images": self.mask_first, "report": request.report}
        how["processes"] = request.preprocessing_processes
        found = [case for fold in self.predictors for case in fold_cases(fold, self._notes(fold).split, *model, **how)]
        twice = [name for name, folds in Counter(case.name for case in found).items() if folds > 1]
        if twice:
            request.report(
                f"cases that validate in several folds, which were trained with different splits and count with their "
                f"mean: {first_of(twice)}"
            )
        return found

    def _choose_order(self, images: Sequence[Case] | None = None) -> None:
        """Decide whether modalities are removed before preprocessing, where the request leaves it open.

        They are where that changes the others, unless the model normalises each one by itself; ``images`` are those to
        evaluate, None: the training cases of the data set.
        """
        request, found = self.request, None
        plans, configuration = self.model.plans_manager, self.model.configuration_manager
        self.mask_first = bool(request.mask_first)
        if self.mask_first or normalization(configuration) == PER_CHANNEL or len(self.names) < 2:
            return
        raw = find_raw_folder(plans.dataset_name)
        if images is None:
            preprocessed = nnunet_folder("nnUNet_preprocessed") / plans.dataset_name
            found = mask_differences.of_data_set(preprocessed, raw, plans, configuration, self.names, request.report)
        else:
            found = mask_differences.of_images(images, plans, configuration, self.names)
        if not found:
            return
        possible = (images is not None or raw is not None) and (request.stack or 1) == 1
        self.mask_first = request.mask_first is None and possible
        if self.mask_first:
            what = "they are removed before preprocessing, as in mstkd predict (--no-mask-first: after it)"
        else:
            self.moved = list(found.moved)
            what = "they are removed after preprocessing, so mstkd predict will not tell what Dice to expect"
        request.report(f"{found}; {what}")

    def _cost(self) -> dict[str, float]:
        """Number of parameters of the network, and mean hours of training of the folds where checkpoints tell them."""
        cost: dict[str, float] = {"parameters": sum(each.numel() for each in self.model.network.parameters())}
        hours = [self._notes(fold).hours for fold in "+".join(self.predictors).split("+")]
        known = [each for each in hours if each is not None]
        return {**cost, "training_hours": float(np.mean(known))} if known else cost

    def _notes(self, fold: str) -> checkpoints.Notes:
        """What the checkpoint of a fold says about its training, which is read once."""
        if fold not in self._read_notes:
            file = self.request.model_folder / f"fold_{fold}" / self.request.checkpoint
            try:
                self._read_notes[fold] = checkpoints.read_notes(file)
            except InputError:
                if not self.request.trust:
                    raise
                self._read_notes[fold] = checkpoints.Notes(None, None)  # nnU-Net has loaded it
        return self._read_notes[fold]

    def _channels(self) -> list[int]:
        """The channels to use of a case.

        Not only those of a subset: what preprocessing sees must not depend on which subsets one call asks for.
        """
        return modalities.parse_subset(self.request.available or modalities.ALL, self.names).nonzero().ravel().tolist()

    def _check(self, found: Sequence[LabelledCase]) -> list[OpenCase]:
        """The cases that can be evaluated, read if they lack results; what is left out is reported."""
        request = self.request
        cases = [
            OpenCase(case, self.records.load(case.fold, case.name, self._seen(case), case.stamps()))
            for case in found
            if case.labelled
        ]
        if self.records.changed:
            request.report(f"evaluated again because label or images have changed, cases: {len(self.records.changed)}")
        unread = [each for each in cases if self._missing(each)]
        checked = check_cases(
            [each.case for each in unread],
            self.model.plans_manager,
            self.rules,
            self.names,
            threads=max(1, request.preprocessing_processes),
            progress=request.progress,
        )
        for each, (case, view) in zip(unread, checked, strict=True):
            each.case, each.view = case, view
        labelled = [each for each in cases if each.case.labelled]
        if len(labelled) < len(found):
            request.report(f"left out, labelled with nothing but ignore: {len(found) - len(labelled)} cases")
        empty = [each.case.name for each in labelled if not any(each.case.present)]
        if empty and request.available is None:
            raise InputError(f"case {empty[0]} has no modality: its images are all zero everywhere; leave it out")
        kept = [each for each in labelled if each.case.subsets(self.subsets)]
        if not kept:
            raise InputError(
                f"none of the {len(found)} cases can be evaluated: they have no label or not all modalities of a "
                f"subset ({first_of(list(self.subsets))})"
            )
        if len(kept) < len(labelled):
            names = [each.case.name for each in labelled if not each.case.subsets(self.subsets)]
            request.report(f"left out, no subset within their modalities: {first_of(names)}")
        return kept

    def _drop_subsets(self) -> None:
        """Forget the subsets that no case has, and report how many cases lack others."""
        of_cases = [each.case.subsets(self.subsets) for each in self.cases]
        absent = set(self.subsets).difference(*of_cases)
        if absent:
            names = [name for name in self.subsets if name in absent]
            self.request.report(f"left out, no case has all their modalities: {first_of(names)}")
            self.subsets = {name: row for name, row in self.subsets.items() if name not in absent}
        incomplete = sum(len(subsets) < len(self.subsets) for subsets in of_cases)
        if incomplete:
            self.request.report(
                f"{incomplete} of {len(self.cases)} cases lack modalities and are evaluated with those that they have"
            )

    def _seen(self, case: LabelledCase) -> list[str] | None:
        """The modalities of a case that preprocessing sees at once; None: only those of a subset at a time."""
        if self.mask_first:
            return None
        return [name for name, there in zip(self.names, case.given, strict=True) if there]

    def _settings(self) -> dict[str, Any]:
        """What all results of one output folder have in common."""
        request, rules = self.request, self.rules
        settings = {
            "folder": request.model_folder.resolve().name,
            "dataset": self.model.plans_manager.dataset_name,
            "source": "validation" if request.images is None else str(request.images.resolve()),
            "labels": None if request.labels is None else str(request.labels.resolve()),
            "checkpoint": request.checkpoint,
            "mirroring": request.mirroring,
            "step_size": request.step_size,
            "mask_first": self.mask_first,
            "channels": list(self.names),
            "regions": {name: list(labels) for name, labels in rules.regions.items()},
            "metrics": list(rules.metrics),
            "convention": rules.convention,
            "lesion_convention": rules.lesion_convention,
            "tolerance": rules.tolerance,
            "min_voxels": dict(rules.min_voxels) or None,  # None as in folders from before this option
        }
        if normalization(self.model.configuration_manager) == PER_CHANNEL:
            settings["normalization"] = PER_CHANNEL
        if request.images is not None and not self.mask_first:
            settings["preprocessed_from"] = [self.names[channel] for channel in self._channels()]
        return settings

    def _stack(self) -> int:
        """Subsets per forward pass; it shrinks if the device runs out of memory."""
        if self.mask_first:
            return 1
        batch_size = self.model.configuration_manager.batch_size
        return self.request.stack or default_stack(batch_size, len(self.subsets), self.model.device)

    # ---- predicting and measuring ----------------------------------------------------------------------------------

    def _evaluate(
        self, predictor: Any, cases: Sequence[OpenCase], preparing: Executor, scoring: Executor, bar: tqdm
    ) -> None:
        """Predict and measure the missing subsets of the cases of a predictor, which cannot be used afterwards."""
        model = predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
        jobs = [(each, subsets) for each in cases for subsets in self._batches(each)]
        stacked = SubsetPredictor(predictor, self.stack)
        backlog = Backlog(scoring, partial(self._add, bar))
        processes = self.request.scoring_processes
        arguments = ((each.case, self._absent(subsets), *model) for each, subsets in jobs)
        prepared = ahead(preparing, prepare, arguments, IMAGES_AHEAD)
        try:
            for (each, subsets), (data, properties) in zip(jobs, prepared, strict=True):
                case, view = each.case, each.view
                assert view is not None
                bar.set_description(f"fold {case.fold}, {case.name}")
                transpose = predictor.plans_manager.transpose_forward
                each.show([slice_images(data, properties, one, transpose) for one in view.every])
                rows = torch.tensor([self.subsets[subset] for subset in subsets])
                predicted = stacked.predict(torch.from_numpy(data), rows)
                for subset, (logits, presence) in zip(subsets, predicted, strict=True):
                    measured = logits, properties, case.label, *model, self.rules, view, presence
                    backlog.submit((each, subset), score_prediction, *measured)
                    # logits wait in memory for a free process
                    backlog.collect(processes + stacked.stack if processes else 0)
            backlog.collect()
        finally:
            stacked.close()
        self.stack = stacked.stack

    def _add(self, bar: tqdm, label: tuple[OpenCase, str], score: SubsetScore) -> None:
        """Add the result of a subset, and write those of a case that is complete."""
        each, subset = label
        each.scores[subset] = score
        if not self._missing(each):
            case = each.case
            self.records.save(case.fold, case.name, each.scores, each.montage(), self._seen(case))
            each.scores, each.images = {}, []  # on disk now; the pictures of many cases fill memory
        bar.update()

    def _missing(self, each: OpenCase) -> list[str]:
        """The subsets that a case has and that have no result."""
        return [subset for subset in each.case.subsets(self.subsets) if subset not in each.scores]

    def _batches(self, each: OpenCase) -> list[list[str]]:
        """The missing subsets, those together that are predicted from one preprocessed image."""
        missing = self._missing(each)
        return [[subset] for subset in missing] if self.mask_first else [missing]

    def _absent(self, subsets: Sequence[str]) -> tuple[int, ...]:
        """The channels to remove before preprocessing."""
        if not self.mask_first:
            return ()
        return tuple(channel for channel, available in enumerate(self.subsets[subsets[0]]) if not available)
