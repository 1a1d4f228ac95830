"""Measure a model on subsets of its modalities, and write tables, figures and a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.evaluation.request import Request
from nnunetv2_mstkd.evaluation.run import Evaluator
from nnunetv2_mstkd.images.atomic import locked
from nnunetv2_mstkd.inference.evaluation_files import RESULTS
from nnunetv2_mstkd.inference.workers import refuse_imported_script
from nnunetv2_mstkd.reporting.report import Evaluation, write_report


def evaluate(
    model_folder: Path | str,
    *,
    folds: Sequence[int | str] | None = None,
    checkpoint: str = "checkpoint_final.pth",
    trust: bool = False,
    name: str | None = None,
    images: Path | str | None = None,
    labels: Path | str | None = None,
    output: Path | str | None = None,
    subsets: Sequence[str] = (),
    available: str | None = None,
    mask_first: bool | None = None,
    metrics: Sequence[str] = ("dice", "hd95"),
    convention: str = "brats",
    lesion_convention: str | None = None,
    tolerance: float = 1.0,
    min_voxels: Mapping[str, int] | None = None,
    stack: int | None = None,
    pictures: int = 3,
    restart: bool = False,
    step_size: float = 0.5,
    mirroring: bool = True,
    device: str | torch.device = "cuda",
    on_device: bool = True,
    preprocessing_processes: int = 3,
    scoring_processes: int = 3,
    progress: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Evaluate a trained model (of any trainer) with subsets of its modalities, each case with the subsets that it has.

    Results are kept per case, so that an interrupted evaluation continues when it is called again.

    Parameters
    ----------
    model_folder:
        nnU-Net's folder of a trained model, with plans.json.
    folds:
        Folds to evaluate, each on its own validation cases, or averaged on ``images``; default all trained folds.
    checkpoint:
        File name of the checkpoint.
    trust:
        Let nnU-Net load the model, which executes whatever its files contain.
    name:
        Name of the model in tables; default the name of its folder.
    images, labels:
        Folders of ``CASE_000k`` and ``CASE`` files; default the validation cases of each fold.
    output:
        Output folder; default ``subsets`` in the model folder.
    subsets:
        Subsets to evaluate, such as ``["T1ce+FLAIR", "all"]``; default all of them.
    available:
        Evaluate only subsets of these modalities, such as ``"T1,FLAIR"``.
    mask_first:
        Remove channels before preprocessing, as if they had never existed; None: if that changes the others.
    metrics:
        Metrics to compute; Dice is always computed.
    convention:
        Rules for empty masks, ``"brats"`` or ``"nnunet"``.
    lesion_convention:
        Convention of lesion-wise metrics; default ``"brats2023_gli"``.
    tolerance:
        Tolerance of the normalised surface Dice in millimetres.
    min_voxels:
        Regions to score additionally as not found if fewer voxels are predicted, such as ``{"ET": 500}``.
    stack:
        Subsets per forward pass; the default depends on the batch size.
    pictures:
        Number of cases pictured in the report: 1 is the worst, 2 the worst and the best, and so on.
    restart:
        Discard earlier results.
    step_size, mirroring:
        Step of the sliding window, relative to the patch, and test-time mirroring.
    device:
        The device of the network.
    on_device:
        Collect the logits on the device; False for very large images.
    preprocessing_processes, scoring_processes:
        Background processes; 0: in this process.
    progress:
        Show a progress bar.
    report:
        Called with a line of text that says what is done next.

    Returns
    -------
    The tables, and the text that ``mstkd evaluate`` prints.

    Raises
    ------
    InputError, MissingFileError
        For options, models or cases that cannot be used; raised before anything is predicted.
    """
    options = locals().copy()  # all arguments
    refuse_imported_script(preprocessing_processes + scoring_processes)
    del options["pictures"]
    options["min_voxels"] = dict(min_voxels or {})
    request = Request(**options)
    if pictures < 0:
        raise InputError(f"--strips is {pictures}, expected a number of cases, or 0 for no pictures")
    measured = Evaluator(request).run()
    with locked(request.output_folder / RESULTS):  # evaluations of two folds may end at the same time
        return write_report(measured, request.output_folder, pictures)
