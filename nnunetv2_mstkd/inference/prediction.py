"""From cases with absent files to segmentations: nnU-Net's preprocessor, predictor and exporter."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.helpers import empty_cache
from tqdm import tqdm

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.inference.input_folder import Case
from nnunetv2_mstkd.inference.presence_gate import PresenceGate
from nnunetv2_mstkd.inference.workers import ahead, workers
from nnunetv2_mstkd.nnunet.case_steps import export_case, preprocess_case
from nnunetv2_mstkd.nnunet.model import plain_network, set_availability


def is_written(name: str, output: Path, file_ending: str, save_probabilities: bool) -> bool:
    """Whether a case's output is there, by nnU-Net's own rule."""
    endings = [file_ending, ".npz"] if save_probabilities else [file_ending]
    return all((output / f"{name}{ending}").is_file() for ending in endings)


def predict_cases(
    predictor: nnUNetPredictor,
    cases: Sequence[Case],
    output: Path,
    *,
    save_probabilities: bool = False,
    preprocessing_processes: int = 0,
    export_processes: int = 0,
    progress: bool = False,
    on_written: Callable[[Case], None] = lambda case: None,
) -> None:
    """Predict checked cases.

    Parameters
    ----------
    predictor:
        from :func:`~nnunetv2_mstkd.nnunet.model.load_predictor`.
    cases:
        checked, with at least one image each.
    output:
        an existing folder for ``CASE`` + the data set's file ending.
    save_probabilities:
        also write ``CASE.npz`` and ``CASE.pkl``, as nnU-Net does.
    preprocessing_processes, export_processes:
        in the background; 0: in this process.
    progress:
        show a bar with case and subset.
    on_written:
        called for each case when its segmentation is in the folder.
    """
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    dataset_json = predictor.dataset_json
    names = modalities.modality_names(dataset_json)
    gate = PresenceGate(plain_network(predictor), predictor.label_manager)
    exports: deque[tuple[Case, Future]] = deque()

    def finish(limit: int) -> None:
        while exports and (len(exports) > limit or exports[0][1].done()):
            case, future = exports.popleft()
            future.result()
            on_written(case)
            bar.update()

    with (
        tqdm(total=len(cases), unit="case", disable=not progress) as bar,
        workers(preprocessing_processes, len(cases)) as preparing,
        workers(export_processes, len(cases)) as exporting,
    ):
        arguments = ((case, plans, configuration, dataset_json, predictor.verbose_preprocessing) for case in cases)
        prepared = ahead(preparing, preprocess_case, arguments, preprocessing_processes)
        try:
            for case, (data, properties) in zip(cases, prepared, strict=True):
                bar.set_description(f"{case.name} ({modalities.subset_name(case.availability, names)})")
                set_availability(predictor, case.availability)
                gate.start(predictor.device)
                logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data)).cpu().numpy()
                logits = gate.apply(logits[None])[0]
                task = exporting.submit(
                    export_case,
                    case.name,
                    output,
                    logits,
                    properties,
                    configuration,
                    plans,
                    dataset_json,
                    save_probabilities,
                )
                exports.append((case, task))
                finish(export_processes + 2 if export_processes else 0)  # as nnU-Net: a slow disk must not fill memory
            finish(0)
        finally:
            set_availability(predictor, None)
            gate.stop()
            compute_gaussian.cache_clear()
            empty_cache(predictor.device)
