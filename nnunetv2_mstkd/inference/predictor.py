"""The Python API of prediction: a trained model that segments cases with any subset of the modalities."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.images.atomic import locked, write_json
from nnunetv2_mstkd.images.writing import ImageInMemory, write_given
from nnunetv2_mstkd.inference.checks import Checker
from nnunetv2_mstkd.inference.conditioning import check_student
from nnunetv2_mstkd.inference.expected_dice import ENTROPY, Range, read_expected_dice, read_ranges, read_temperatures
from nnunetv2_mstkd.inference.members import num_members
from nnunetv2_mstkd.inference.prediction import predict_cases, predict_logits
from nnunetv2_mstkd.inference.record import Record
from nnunetv2_mstkd.inference.selection import dropped_channels, select
from nnunetv2_mstkd.inference.workers import refuse_imported_script
from nnunetv2_mstkd.nnunet import checkpoints, mask_differences, preprocessing
from nnunetv2_mstkd.nnunet.description import foreground_values
from nnunetv2_mstkd.nnunet.folders import FINAL, parse_folds, refuse_same_folder, trained_folds
from nnunetv2_mstkd.nnunet.input_folder import Case, Problem
from nnunetv2_mstkd.nnunet.model import find_device, free_memory, load_predictor
from nnunetv2_mstkd.nnunet.per_channel import PER_CHANNEL, normalization
from nnunetv2_mstkd.nnunet.preprocessing import DISAGREEMENT, UNCERTAINTY
from nnunetv2_mstkd.nnunet.reading import as_written


@dataclass(frozen=True, eq=False)
class Prediction:
    """The segmentation of one case.

    Attributes
    ----------
    segmentation
        Labels, as an array of the voxels that nnU-Net writes: shape (z, y, x), or (y, x) for two-dimensional images.
    available
        Names of the modalities that the case has, in channel order.
    expected_dice
        Mean Dice per region that an evaluation of the model found for these modalities; None without one. It describes
        the cases of that evaluation and is not a confidence for this one.
    presence
        Probability, by name, that the case has any voxel of a label or region; None if the model has no presence head
        (AdaMM has one).
    """

    segmentation: np.ndarray = field(repr=False)
    available: tuple[str, ...]
    expected_dice: Mapping[str, float] | None
    presence: Mapping[str, float] | None
    _probabilities: Callable[[], np.ndarray] = field(repr=False)
    _save: Callable[[Path], None] = field(repr=False)
    _save_uncertainty: Callable[[Path], None] = field(repr=False)

    @property
    def subset(self) -> str:
        """The available modalities as one name: ``"T1+FLAIR"``."""
        return modalities.SEPARATOR.join(self.available)

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Probability of each label or region, shape (K, z, y, x), as in nnU-Net's ``.npz`` files.

        Computed when it is first asked for. If the model's image reader reorients images, so are these.
        """
        return self._probabilities()

    def save(self, path: str | os.PathLike) -> None:
        """Write the segmentation with the geometry of the images, in any format of the model's image reader.

        Raises
        ------
        InputError
            If the reader does not know the format.
        """
        self._save(Path(path))

    def save_uncertainty(self, path: str | os.PathLike) -> None:
        """Write the map of ``mstkd predict --save-uncertainty``: the entropy of each voxel in percent of its maximum.

        Raises
        ------
        InputError
            If the reader does not know the format.
        """
        self._save_uncertainty(Path(path))


@dataclass(frozen=True)
class FolderResult:
    """What became of the cases of a folder.

    Attributes
    ----------
    predicted
        Names of the cases that were predicted.
    kept
        Number of cases that were predicted before.
    problems
        Problems of the cases that were left out, and of files that belong to none.
    record
        The file that says what each case was predicted from.
    subsets
        One line per subset: how many cases have it, and the Dice to expect; then one per case that is unlike those of
        the evaluation.
    """

    predicted: list[str]
    kept: int
    problems: list[Problem]
    record: Path
    subsets: list[str]


class Predictor:
    """A trained model that segments cases from any subset of its modalities.

    Models of any trainer work. nnU-Net's environment variables are not needed.

    Parameters
    ----------
    model_folder
        nnU-Net's folder of a trained model: ``.../TRAINER__PLANS__CONFIGURATION``.
    folds
        Folds whose weights are used, numbers or ``"all"``; the logits of several are averaged. None: all numbered folds
        that have the checkpoint.
    checkpoint
        File name of the checkpoint in each fold.
    device
        Where the network runs: ``"cuda"``, ``"cpu"``, ``"mps"`` or a torch device.
    mirroring
        Average over mirrored images, as nnU-Net does. Without it prediction is faster and a little less accurate.
    step_size
        Step of the sliding window as a fraction of the patch, above 0 and at most 1.
    student
        Student to predict with, from 1, for a model with several students (SMML). None: the mean of all.
    trust
        Let nnU-Net load the files, which executes whatever they contain.
    on_device
        Collect results on the device; set to False for images that are too large for it.
    verbose
        Print nnU-Net's own messages.
    calibrate
        Divide logits by the temperature that the evaluation of the model has for the case's number of modalities. It
        changes probabilities and entropies that are returned or saved, not labels.
    largest_component
        Keep only the largest component of all foreground, as nnU-Net's postprocessing may do. It changes labels, not
        probabilities. An evaluation of the model says what it changes.

    Attributes
    ----------
    modalities
        Names of the C modalities, in channel order.
    labels
        Label values of each label or region, without background and ignore label.
    ranges
        Ranges of the evaluation's cases by subset code; see
        :func:`~nnunetv2_mstkd.inference.expected_dice.read_ranges`.
    expected_dice
        Expected Dice by :func:`~nnunetv2_mstkd.modalities.subset_code` and region, from an evaluation of the model;
        empty without one.

    Raises
    ------
    MissingFileError, InputError
        If something is missing, damaged or does not fit together.
    UnsupportedError
        For the second stage of a cascade.

    Examples
    --------
    >>> from nnunetv2_mstkd import Predictor
    >>> predictor = Predictor(model_folder, folds=[0], device="cpu")
    >>> predictor.modalities
    ('T1', 'T1ce', 'T2', 'FLAIR')
    >>> result = predictor.predict({"T1": t1_file, "flair": flair_file})
    >>> result.available
    ('T1', 'FLAIR')
    >>> result.segmentation.shape == result.probabilities.shape[1:]
    True
    >>> result.save(output / "segmentation.nii.gz")
    """

    def __init__(
        self,
        model_folder: str | os.PathLike,
        folds: Sequence[int | str] | int | str | None = None,
        *,
        checkpoint: str = FINAL,
        device: str | torch.device = "cuda",
        mirroring: bool = True,
        step_size: float = 0.5,
        student: int | None = None,
        trust: bool = False,
        on_device: bool = True,
        verbose: bool = False,
        calibrate: bool = False,
        largest_component: bool = False,
    ) -> None:
        self.folder, self.checkpoint, self.student = Path(model_folder), checkpoint, student
        self.largest_component = largest_component
        if not self.folder.is_dir():
            raise MissingFileError(f"no model folder {self.folder}")
        if folds is None:
            self.folds = trained_folds(self.folder, checkpoint)
        else:
            self.folds = parse_folds([folds] if isinstance(folds, (int, str)) else folds)
        self._predictor = load_predictor(
            self.folder,
            self.folds,
            checkpoint,
            device=find_device(device),
            trust=trust,
            tile_step_size=step_size,
            use_mirroring=mirroring,
            perform_everything_on_device=on_device,
            verbose=verbose,
            verbose_preprocessing=verbose,
            allow_tqdm=False,  # one bar, over the cases
        )
        check_student(self._predictor.network, student)
        fingerprints = map(checkpoints.fingerprint, self._predictor.list_of_parameters)
        self.weights = dict(zip(map(str, self.folds), fingerprints, strict=True))
        own = normalization(self._predictor.configuration_manager)
        options = {"mirroring": mirroring, "step_size": step_size}
        self.temperatures: dict[int, float] = {}
        if calibrate:
            if student is not None:
                raise InputError("temperatures are those of the mean of both students; leave out one of the options")
            self.temperatures = read_temperatures(self.folder, own, self.weights, len(self.folds), options)
        self.modalities = modalities.modality_names(self._predictor.dataset_json)
        self.labels = foreground_values(self._predictor.dataset_json)
        self.expected_dice: dict[int, dict[str, float]] = {}
        self.ranges: dict[int, dict[str, Range]] = {}
        try:
            self.expected_dice = read_expected_dice(
                self.folder, self.modalities, own, self.weights, largest_component=largest_component
            )
            if self.expected_dice:
                networks = len(self.folds) if student is None else None
                self.ranges = read_ranges(self.folder, self.modalities, networks, options)
                if largest_component:  # the ranges of Dice are those of all foreground
                    self.ranges = {code: {ENTROPY: of[ENTROPY]} for code, of in self.ranges.items() if ENTROPY in of}
        except (ValueError, OSError) as error:  # nothing but --calibrate needs the evaluation
            print(f"warning: {error}", file=sys.stderr)
        self._checker = Checker(
            self.modalities,
            self._predictor.plans_manager.image_reader_writer_class,
            self._predictor.configuration_manager.normalization_schemes,
            self._predictor.configuration_manager.spacing,
        )

    # ---- one case ------------------------------------------------------------------------------------------------

    def predict(
        self,
        images: Mapping[str, str | os.PathLike | ImageInMemory],
        *,
        on_pass: Callable[[int, int], None] | None = None,
    ) -> Prediction:
        """Segment one case.

        Parameters
        ----------
        images
            The image of each modality. Modalities are named as in dataset.json, in upper or lower case. Those that are
            not named are absent, and so are images that are zero everywhere. An image is a file that the model's image
            reader can read, a ``SimpleITK.Image``, or an array of shape (z, y, x) with the spacing of its axes in mm.
            All must have the same grid.
        on_pass
            Called as ``on_pass(done, total)`` before each forward pass of the network. An exception raised there
            cancels the prediction.

        Returns
        -------
        The same labels as ``mstkd predict`` gives for these images.

        Raises
        ------
        InputError
            For an unknown modality, an unreadable image, voxels that are NaN, infinite or huge, a constant image,
            different grids, or if no modality is left.

        Examples
        --------
        >>> import SimpleITK
        >>> image = SimpleITK.ReadImage(str(t1_file))
        >>> array, spacing = SimpleITK.GetArrayFromImage(image), image.GetSpacing()[::-1]
        >>> predictor.predict({"T1": image}).available
        ('T1',)
        >>> predictor.predict({"T1": (array, spacing)}).subset
        'T1'
        """
        model = self._predictor
        plans, configuration, reader = model.plans_manager, model.configuration_manager, self._checker.reader
        with tempfile.TemporaryDirectory() as scratch:
            case = self._checked_case(images, Path(scratch))
            self._check_temperatures([case])
            data, properties = preprocessing.preprocess_case(case, plans, configuration, model.dataset_json)
        try:
            logits, presence, _ = predict_logits(model, data, case.availability, student=self.student, on_pass=on_pass)
        finally:
            free_memory(model.device)
        what = logits, properties, plans, configuration, model.label_manager
        segmentation = preprocessing.segment(*what)
        if self.largest_component:
            segmentation = preprocessing.keep_largest_component(segmentation, model.label_manager)
        temperature = self.temperatures.get(sum(case.availability), 1.0)
        return Prediction(
            segmentation=as_written(segmentation, properties, reader),
            available=self._available(case),
            expected_dice=self.expected_dice.get(modalities.subset_code(case.availability)),
            presence=presence,
            _probabilities=partial(preprocessing.probabilities, *what, temperature),
            _save=partial(preprocessing.write_segmentation, segmentation, properties, reader),
            _save_uncertainty=lambda path: preprocessing.write_segmentation(
                preprocessing.uncertainty(*what, temperature), properties, reader, path
            ),
        )

    def check(self, images: Mapping[str, str | os.PathLike | ImageInMemory]) -> tuple[tuple[str, ...], list[str]]:
        """Check images without predicting.

        An unknown modality or a missing file raises the same error as in :meth:`predict`.

        Returns
        -------
        The names of the modalities that :meth:`predict` would use, and a list of reasons for which it would refuse.

        Examples
        --------
        >>> predictor.check({"T1": t1_file, "flair": flair_file})
        (('T1', 'FLAIR'), [])
        """
        with tempfile.TemporaryDirectory() as scratch:
            case, problems = self._check(images, Path(scratch))
        return self._available(case), problems

    def _checked_case(self, images: Mapping[str, Any], scratch: Path) -> Case:
        """Make a checked case of the images."""
        case, problems = self._check(images, scratch)
        if problems:
            raise InputError(f"the case cannot be predicted: {'; '.join(problems)}")
        return case

    def _check(self, images: Mapping[str, Any], scratch: Path) -> tuple[Case, list[str]]:
        """Make a case of the images, those in memory as files in a scratch folder, and check it."""
        if not isinstance(images, Mapping):
            raise InputError(f"images is a {type(images).__name__}, expected a dict from modality to image")
        files: list[Path | None] = [None] * len(self.modalities)
        for name, image in images.items():
            channel = modalities.parse_modality(str(name), self.modalities)
            if files[channel] is not None:
                raise InputError(f"modality {self.modalities[channel]} is given twice")
            files[channel] = self._as_file(image, channel, scratch)
        if not images:
            raise InputError(f"no image is given; name at least one of {', '.join(self.modalities)}")
        case, problems = self._checker.check(Case("case", tuple(files)))
        return case, [problem.text for problem in problems]

    def _available(self, case: Case) -> tuple[str, ...]:
        """Names of the modalities of a case."""
        return tuple(name for name, there in zip(self.modalities, case.availability, strict=True) if there)

    def _as_file(self, image: Any, channel: int, scratch: Path) -> Path:
        if isinstance(image, (str, os.PathLike)):
            if not Path(image).is_file():
                raise MissingFileError(f"no file {image} (modality {self.modalities[channel]})")
            return Path(image)
        ending = self._predictor.dataset_json["file_ending"].removesuffix(".gz")  # no need to compress a scratch file
        path = scratch / f"in_memory_{channel:04d}{ending}"
        try:
            write_given(image, path)
        except InputError as error:
            raise InputError(f"the image of {self.modalities[channel]} {error}") from error
        return path

    def check_output(self, path: str | os.PathLike) -> None:
        """Raise InputError unless the model's image reader can write a file of this name."""
        preprocessing.check_ending(Path(path), self._checker.reader)

    # ---- a folder ------------------------------------------------------------------------------------------------

    def predict_folder(
        self,
        images: str | os.PathLike,
        output: str | os.PathLike,
        *,
        drop: str | None = None,
        skip_bad: bool = False,
        continue_prediction: bool = False,
        save_probabilities: bool = False,
        save_uncertainty: bool = False,
        part_id: int = 0,
        num_parts: int = 1,
        preprocessing_processes: int = 3,
        export_processes: int = 3,
        progress: bool = True,
    ) -> FolderResult:
        """Segment all cases of a folder, as ``mstkd predict`` does.

        All cases are checked before the first one is predicted. A file ``predictions.json`` next to the segmentations
        says which modalities each one was predicted from.

        Parameters
        ----------
        images
            Folder of ``CASE_000k`` files, any of which may be absent; only read.
        output
            Folder for the segmentations, created if necessary.
        drop
            Modalities to treat as absent, for example ``"T1ce,FLAIR"``.
        skip_bad
            Leave bad cases out instead of refusing all.
        continue_prediction
            Keep the cases of an earlier run whose images have not changed.
        save_probabilities
            Also write ``CASE.npz`` and ``CASE.pkl``, as nnU-Net does.
        save_uncertainty
            Also write ``uncertainty/CASE``, the entropy of each voxel in percent of its maximum, and, if several
            networks (folds or students) are averaged, ``disagreement/CASE``, how far they differ, in percent.
        part_id, num_parts
            Predict every ``num_parts``-th case, starting with number ``part_id``: several processes can share a folder.
        preprocessing_processes, export_processes
            Number of background processes; 0 runs everything in this process.
        progress
            Show a bar with case and subset.

        Raises
        ------
        MissingFileError, InputError
            If there is no input, if cases have problems (all are listed), or if an earlier run had other options.

        Examples
        --------
        >>> result = predictor.predict_folder(
        ...     images, output / "segmentations", preprocessing_processes=0, export_processes=0, progress=False
        ... )
        >>> result.predicted, result.kept, result.problems
        (['a', 'b'], 0, [])
        >>> result.subsets
        ['T1: 1', 'T1+FLAIR: 1']
        """
        refuse_imported_script(preprocessing_processes + export_processes)
        images, output = Path(images), Path(output)
        refuse_same_folder(output, images, "input folder")
        refuse_same_folder(output, self.folder, "model folder")
        if not 0 <= part_id < num_parts:
            raise InputError(f"-part_id is {part_id}, expected 0 to {num_parts - 1} with -num_parts {num_parts}")
        model, ending = self._predictor, self._predictor.dataset_json["file_ending"]
        written = ["{}" + ending, *(["{}.npz"] if save_probabilities else [])]
        if save_uncertainty:
            maps = [UNCERTAINTY, *([DISAGREEMENT] if num_members(model, self.student) > 1 else [])]
            written += [f"{folder}/{{}}{ending}" for folder in maps]
        # processes that share an output folder each write their own record
        file = output / ("predictions.json" if num_parts == 1 else f"predictions_part{part_id}of{num_parts}.json")
        run = self._describe(drop)
        record = Record(file, run, self.modalities, self.expected_dice, self.ranges, resume=continue_prediction)

        def is_done(case: Case) -> bool:
            there = all((output / each.format(case.name)).is_file() for each in written)
            if continue_prediction and there and not record.resumed:
                record.keep(case)  # of stock nnUNetv2_predict, which writes no record
            return continue_prediction and there and record.has(case)

        selection = select(
            images,
            ending,
            self._checker,
            drop=drop,
            part=slice(part_id, None, num_parts),
            is_done=is_done,
            skip_bad=skip_bad,
            threads=preprocessing_processes,
            progress=progress,
            verb="predicted",
        )
        self._check_temperatures(selection.cases)
        self._warn_of_differences(selection.cases)
        output.mkdir(parents=True, exist_ok=True)
        with locked(record.file, f"another process predicts into {output}; wait for it, or choose another folder"):
            # nnU-Net's postprocessing and evaluation look for these two
            write_json(output / "dataset.json", model.dataset_json)
            write_json(output / "plans.json", model.plans_manager.plans)
            if not continue_prediction:
                record.remove_stale()
            record.save()
            try:
                predict_cases(
                    model,
                    selection.cases,
                    output,
                    student=self.student,
                    save_probabilities=save_probabilities,
                    save_uncertainty=save_uncertainty,
                    temperatures=self.temperatures,
                    largest_component=self.largest_component,
                    preprocessing_processes=preprocessing_processes,
                    export_processes=export_processes,
                    progress=progress,
                    on_written=record.add,
                )
            finally:
                record.save()
        names = [case.name for case in selection.cases]
        lines = [*record.by_subset(), *record.flagged()]
        return FolderResult(names, selection.done, selection.problems, record.file, lines)

    def _check_temperatures(self, cases: Sequence[Case]) -> None:
        """Refuse to calibrate cases for whose number of modalities the evaluation has no temperature."""
        sizes = {sum(case.availability) for case in cases} - set(self.temperatures)
        if self.temperatures and sizes:
            raise InputError(
                f"the evaluation has no temperature for cases with {', '.join(map(str, sorted(sizes)))} of "
                f"{len(self.modalities)} modalities; evaluate all subsets, or predict without --calibrate"
            )

    def _warn_of_differences(self, cases: Sequence[Case]) -> None:
        """Say in one line if the intensities of incomplete cases depend on what they lack."""
        plans, configuration = self._predictor.plans_manager, self._predictor.configuration_manager
        if normalization(configuration) == PER_CHANNEL or all(all(case.availability) for case in cases):
            return
        found = mask_differences.of_images(cases, plans, configuration, self.modalities, number=5)
        if found:
            print(
                f"warning: {found}; this model was trained without input.normalization=per_channel, so incomplete "
                f"cases look different from those of its training",
                file=sys.stderr,
            )

    def _describe(self, drop: str | None) -> dict[str, Any]:
        """What the predictions of one output folder have in common, and what a continued run must repeat."""
        return {
            "model": self.folder.resolve().name,
            "dataset": self._predictor.plans_manager.dataset_name,
            "trainer": self._predictor.trainer_name,
            "checkpoint": self.checkpoint,
            "folds": list(self.folds),
            "student": self.student,
            "mirroring": self._predictor.use_mirroring,
            "step_size": self._predictor.tile_step_size,
            "channels": list(self.modalities),
            "weights": {fold: weights[: checkpoints.SHORT] for fold, weights in self.weights.items()},
            "calibrated": bool(self.temperatures),
            "temperatures": {str(size): value for size, value in self.temperatures.items()},
            "largest_component": self.largest_component,
            "dropped": [self.modalities[channel] for channel in dropped_channels(drop, self.modalities)],
        }
