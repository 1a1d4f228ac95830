"""From cases with absent files to segmentations: nnU-Net's preprocessor, predictor and exporter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.inference.conditioning import conditioned, presence_of
from nnunetv2_mstkd.inference.members import each_member, num_members
from nnunetv2_mstkd.inference.workers import Backlog, ahead, workers
from nnunetv2_mstkd.nnunet.description import foreground_heads
from nnunetv2_mstkd.nnunet.entropy import Disagreement
from nnunetv2_mstkd.nnunet.input_folder import Case
from nnunetv2_mstkd.nnunet.model import free_memory, nnUNetPredictor, watched
from nnunetv2_mstkd.nnunet.preprocessing import export_case, preprocess_case

EXPORTS_AHEAD = 2
"""Cases beside those in the export processes whose logits may wait, as in nnU-Net: a slow disk must not fill memory."""


class Predicted(NamedTuple):
    """What a network says about a case."""

    logits: np.ndarray
    """Shape (K, *spatial), in the geometry of the preprocessed image."""
    presence: dict[str, float] | None
    """Probability that there is any voxel of each label or region, by name; None without a presence head."""
    disagreement: np.ndarray | None = None
    """Of the networks that are averaged, shape (*spatial); None: not asked for. See
    :class:`~nnunetv2_mstkd.nnunet.entropy.Disagreement`."""


def predict_logits(
    predictor: nnUNetPredictor,
    data: np.ndarray,
    availability: Sequence[bool],
    *,
    student: int | None = None,
    on_pass: Callable[[int, int], None] | None = None,
    disagreement: bool = False,
) -> Predicted:
    """Predict a preprocessed case.

    Parameters
    ----------
    data
        Array of float32, shape (C, *spatial), with zeros for absent modalities.
    availability
        True for each modality that the case has.
    student
        See :func:`~nnunetv2_mstkd.inference.conditioning.conditioned`.
    on_pass
        See :func:`~nnunetv2_mstkd.nnunet.model.watched`.
    disagreement
        Also compare the networks whose logits are averaged; see
        :func:`~nnunetv2_mstkd.inference.members.each_member`.
    """
    labels = predictor.label_manager
    between = Disagreement(labels.has_regions) if disagreement else None
    row = torch.tensor([list(availability)], dtype=torch.bool, device=predictor.device)
    with (
        each_member(predictor, None if between is None else between.add, student),
        watched(predictor, on_pass),
        conditioned(predictor.network, row, labels, student=student) as finish,
    ):
        logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data)).cpu().numpy()
        finished, scores = finish(logits[None])[0], presence_of(finish)
    heads = foreground_heads(predictor.dataset_json)
    presence = None if scores is None else {name: float(scores[0, head]) for name, head in heads.items()}
    return Predicted(finished, presence, None if between is None else between.map())


def predict_cases(
    predictor: nnUNetPredictor,
    cases: Sequence[Case],
    output: Path,
    *,
    student: int | None = None,
    save_probabilities: bool = False,
    preprocessing_processes: int = 0,
    export_processes: int = 0,
    progress: bool = False,
    save_uncertainty: bool = False,
    temperatures: Mapping[int, float] | None = None,
    largest_component: bool = False,
    on_written: Callable[[Case, float | None, dict[str, float] | None], None] = lambda case, entropy, presence: None,
) -> None:
    """Predict checked cases and write their segmentations.

    Parameters
    ----------
    cases
        Checked cases with at least one image each.
    output
        Existing folder for ``CASE`` + the data set's file ending.
    student
        See :func:`~nnunetv2_mstkd.inference.conditioning.conditioned`.
    save_probabilities
        Also write ``CASE.npz`` and ``CASE.pkl``, as nnU-Net does.
    preprocessing_processes, export_processes
        Number of background processes; 0 runs everything in this process.
    save_uncertainty
        Also write the entropy of each voxel and the disagreement of several networks; see
        :func:`~nnunetv2_mstkd.nnunet.preprocessing.export_case`.
    temperatures
        By number of modalities; saved probabilities and entropies are those of logits divided by them. None: as is.
    largest_component
        Write labels without the foreground outside its largest component.
    on_written
        Called for each case, with its entropy and what :class:`Predicted` says of presence, when its segmentation is in
        the folder.
    """
    plans, configuration, dataset_json = (
        predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json,
    )  # fmt: skip
    names = modalities.modality_names(dataset_json)
    several = num_members(predictor, student) > 1

    def written(label: tuple[Case, dict[str, float] | None], entropy: float | None) -> None:
        case, presence = label
        on_written(case, entropy, presence)
        bar.update()

    with (
        tqdm(total=len(cases), unit="case", disable=not progress) as bar,
        workers(preprocessing_processes, len(cases)) as preparing,
        workers(export_processes, len(cases)) as exporting,
    ):
        exports = Backlog(exporting, written)
        arguments = ((case, plans, configuration, dataset_json, predictor.verbose_preprocessing) for case in cases)
        prepared = ahead(preparing, preprocess_case, arguments, preprocessing_processes)
        try:
            for case, (data, properties) in zip(cases, prepared, strict=True):
                bar.set_description(f"{case.name} ({modalities.subset_name(case.availability, names)})")
                logits, presence, between = predict_logits(
                    predictor, data, case.availability, student=student, disagreement=save_uncertainty and several
                )
                what = case.name, output, logits, properties, configuration, plans, dataset_json, save_probabilities
                temperature = (temperatures or {}).get(sum(case.availability), 1.0)
                options = save_uncertainty, temperature, between, largest_component
                exports.submit((case, presence), export_case, *what, *options)
                exports.collect(export_processes + EXPORTS_AHEAD if export_processes else 0)
            exports.collect()
        finally:
            free_memory(predictor.device)
