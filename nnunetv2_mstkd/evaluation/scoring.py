"""From the logits of a subset to its metrics; runs in background processes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.evaluation.montage import SliceView, slice_entropy
from nnunetv2_mstkd.evaluation.results import NOTED
from nnunetv2_mstkd.images.completeness import check_complete
from nnunetv2_mstkd.images.geometry import last_line
from nnunetv2_mstkd.metrics import overlap
from nnunetv2_mstkd.metrics.calibration import LOWEST, logit_counts
from nnunetv2_mstkd.metrics.conventions import (
    BRATS,
    DICE,
    HD95,
    LESION_DICE,
    LESION_HD95,
    LESION_RULES,
    NSD,
    REGION_SPELLINGS,
    empty_rules_text,
    known_name,
    lesion_convention_named,
    min_voxels_region,
)
from nnunetv2_mstkd.metrics.lesionwise import lesionwise_regions
from nnunetv2_mstkd.metrics.surface import check_tolerance
from nnunetv2_mstkd.nnunet.description import foreground_heads, foreground_values
from nnunetv2_mstkd.nnunet.entropy import case_entropy
from nnunetv2_mstkd.nnunet.input_folder import file_stamp
from nnunetv2_mstkd.nnunet.preprocessing import as_preprocessed, keep_largest_component, segment

NEAR = 0.05
"""Logit. Another stack size changes logits by rounding, far less than this; voxels farther away keep their label."""

PSEUDO_SPACING = 999
"""nnU-Net's readers give a 2-D image an axis of one voxel with this spacing, or so many times the largest other one."""


class _Grid(NamedTuple):
    """Where masks lie, in millimetres."""

    spacing: Sequence[float]
    """Of the axes of the masks."""
    thickness: float
    """Across them, where they are of a slice; 1 where it is unknown."""


def _thickness(across: Sequence[float], spacing: Sequence[float]) -> float:
    """The product of the spacings across a slice, without those that stand for none."""
    return float(np.prod([step for step in across if 0 < step < PSEUDO_SPACING * min(1, max(spacing))]))


@dataclass(frozen=True)
class Rules:
    """What is measured, and how: names of metrics and rules are from :mod:`~nnunetv2_mstkd.metrics.conventions`."""

    regions: Mapping[str, tuple[int, ...]]
    """Label values of each region, by name."""
    labels: tuple[int, ...]
    """All values that a label image may have, including the ignore label."""
    metrics: tuple[str, ...] = (DICE, HD95)
    ignore_label: int | None = None
    """Voxels with this label count neither as predicted nor as reference; None: there is no such label."""
    convention: str = BRATS
    lesion_convention: str | None = None
    tolerance: float = 1.0
    """Of the normalised surface Dice, in millimetres."""
    min_voxels: Mapping[str, int] = field(default_factory=dict)
    """These regions are also scored as not found where they are predicted with fewer voxels than the number."""

    def __post_init__(self) -> None:
        # both refuse unknown names
        empty_rules_text(self.convention, self.metrics, lesion_convention=self.lesion_convention)
        check_tolerance(self.tolerance)
        for region, voxels in self.min_voxels.items():
            if region not in self.regions:
                raise InputError(
                    f"--et-min: the data set has no region {region}; it has {', '.join(self.regions)}; name one: "
                    f"--et-min REGION={voxels}"
                )
            if voxels < 1:
                raise InputError(f"--et-min is {voxels} for {region}, expected at least 1 voxel")
        if self._of_lesions():
            settings = lesion_convention_named(str(self.lesion_convention))
            for region, partners in settings.partners.items():
                missing = [name for name in partners if name not in self.regions]
                if region in self.regions and missing:
                    raise InputError(
                        f"{self.lesion_convention} joins the lesions of {region} by those of {', '.join(partners)}, "
                        f"and dataset.json has no label {', '.join(missing)}; take another --lesion-convention"
                    )

    @property
    def scored(self) -> tuple[str, ...]:
        """Names of the regions in the results: each one, and after it the one of :attr:`min_voxels`."""
        names = []
        for region in self.regions:
            names.append(region)
            if region in self.min_voxels:
                names.append(min_voxels_region(region, self.min_voxels[region]))
        return tuple(names)

    @property
    def plain(self) -> dict[str, str]:
        """The region of :attr:`regions` that each of :attr:`scored` is, postprocessed or not."""
        postprocessed = {min_voxels_region(region, voxels): region for region, voxels in self.min_voxels.items()}
        return {region: postprocessed.get(region, region) for region in self.scored}

    @property
    def note(self) -> dict[str, Any]:
        """What the note below a table of results says about the rules, as arguments of ``subset_table``."""
        return {name: getattr(self, name) for name in NOTED}

    def _of_lesions(self) -> bool:
        return any(name in LESION_RULES for name in self.metrics)

    def score(
        self, prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]
    ) -> dict[str, dict[str, float]]:
        """All metrics of all regions of a pair of label images of equal shape: region -> metric -> value.

        The spacing is in millimetres per axis. Axes with a single voxel are dropped: a slice has no surface in space.
        Its thickness counts in volumes only.
        """
        # one axis stays if all are single
        kept = [axis for axis, size in enumerate(reference.shape) if size > 1] or [0]
        shape = tuple(reference.shape[axis] for axis in kept)
        prediction, reference = prediction.reshape(shape), reference.reshape(shape)
        across = [spacing[axis] for axis in range(len(spacing)) if axis not in kept]
        spacing = [spacing[axis] for axis in kept]
        grid = _Grid(spacing, _thickness(across, spacing))
        predicted, wanted = self._masks(prediction, reference), self._masks(reference, reference)
        scores = self._score(predicted, wanted, grid, self.regions)
        for region, voxels in self.min_voxels.items():
            found = scores[region]
            if np.count_nonzero(predicted[region]) < voxels:
                emptied = {**predicted, region: np.zeros_like(predicted[region])}
                found = self._score(emptied, wanted, grid, [region])[region]
            scores[min_voxels_region(region, voxels)] = dict(found)
        return {name: scores[name] for name in self.scored}

    def _score(
        self,
        predicted: Mapping[str, np.ndarray],
        wanted: Mapping[str, np.ndarray],
        grid: _Grid,
        names: Iterable[str],
    ) -> dict[str, dict[str, float]]:
        """The metrics of some regions; lesions of all of them may decide about each other."""
        scores = {name: self._score_region(predicted[name], wanted[name], grid) for name in names}
        if self._of_lesions():
            convention = str(self.lesion_convention)
            lesions = lesionwise_regions(predicted, wanted, grid.spacing, convention, thickness=grid.thickness)
            for name, of_region in scores.items():
                values = {LESION_DICE: lesions[name].dice, LESION_HD95: lesions[name].hd95_mm}
                of_region |= {metric: value for metric, value in values.items() if metric in self.metrics}
        return scores

    def _masks(self, segmentation: np.ndarray, reference: np.ndarray) -> dict[str, np.ndarray]:
        masks = {name: np.isin(segmentation, labels) for name, labels in self.regions.items()}
        if self.ignore_label is not None:
            counted = reference != self.ignore_label
            masks = {name: mask & counted for name, mask in masks.items()}
        return masks

    def _score_region(self, prediction: np.ndarray, reference: np.ndarray, grid: _Grid) -> dict[str, float]:
        scores = overlap.score(
            prediction,
            reference,
            grid.spacing,
            thickness=grid.thickness,
            convention=self.convention,
            tolerance=self.tolerance,
            surfaces=HD95 in self.metrics or NSD in self.metrics,
        )
        return {name: scores[name] for name in self.metrics if name not in LESION_RULES}


def rules_of(dataset_json: Mapping[str, Any], labels: Any, **options: Any) -> Rules:
    """The rules for a data set: its regions, or its labels if it has none.

    ``labels`` is nnU-Net's label manager, ``options`` are further attributes of :class:`Rules`; in ``min_voxels``
    ``ET`` and ``WT`` stand for the regions that are called so in other words.
    """
    regions = foreground_values(dataset_json)
    known = [int(label) for label in labels.all_labels]
    ignore = None if labels.ignore_label is None else int(labels.ignore_label)
    wanted = options.pop("min_voxels", {})
    spelled = {known_name(name, REGION_SPELLINGS): name for name in regions}
    sizes = {name if name in regions else spelled.get(name, name): voxels for name, voxels in wanted.items()}
    everything = tuple(sorted({0, *known, *([] if ignore is None else [ignore])}))
    return Rules(regions, everything, ignore_label=ignore, min_voxels=sizes, **options)


def read_label(path: Path, reader: type[Any], labels: Sequence[int]) -> tuple[np.ndarray, dict]:
    """Read a reference segmentation with nnU-Net's reader class of the plans; refuse values other than ``labels``.

    Returns
    -------
    Integers, shape (x, y, z) in the reader's order of axes, and the reader's properties.
    """
    if not path.is_file():
        raise MissingFileError(f"the label {path} does not exist")
    try:
        check_complete(path)
        values, properties = reader().read_seg(str(path))
    except MemoryError:
        raise
    except Exception as error:  # each reader's library has its own errors, and nnU-Net asserts
        raise InputError(f"the label {path} cannot be read ({last_line(error)})") from error
    if values.shape[0] != 1:
        raise InputError(f"the label {path} holds {values.shape[0]} images, expected one")
    found = np.unique(values)
    wrong = found[~np.isin(found, labels)]
    if len(wrong):
        raise InputError(
            f"the label {path} has the value {wrong[0]:g}; dataset.json has the labels {', '.join(map(str, labels))}"
        )
    return values[0].astype(np.uint8 if max(labels) < 256 else np.int32), properties


@functools.lru_cache(maxsize=2)
def _reference(path: Path, reader: type[Any], labels: tuple[int, ...], stamp: str) -> np.ndarray:
    """A label image, cached for the next subsets of the case until the file has another stamp."""
    return read_label(path, reader, labels)[0]


@dataclass(frozen=True)
class SubsetScore:
    """Result of one case with one subset."""

    values: dict[str, dict[str, float]]
    """region -> metric -> value."""
    near: int
    """Voxels whose label another rounding of the logits could change (within :data:`NEAR` of the decision)."""
    voxels: int
    """Voxels of the segmentation, in its original geometry."""
    entropy: float | None = None
    """Mean over the predicted foreground; None where there is none, or in older records."""
    presence: dict[str, tuple[float, bool]] = field(default_factory=dict)
    """region -> probability of presence that the network states, and whether the reference has any voxel of it; empty
    without a presence head."""
    calibration: dict[str, np.ndarray] = field(default_factory=dict, compare=False)
    """region -> counts of logits, see :func:`~nnunetv2_mstkd.metrics.calibration.logit_counts`; empty in older
    records."""
    largest: dict[str, dict[str, float]] = field(default_factory=dict)
    """The Dice in ``values`` if only the largest component of the foreground is kept; empty in older records."""
    lacking: tuple[str, ...] = ()
    """Regions of which the reference has no voxel; empty in older records."""
    slices: tuple[np.ndarray, ...] = field(default=(), compare=False)
    """The segmentation in the slices to show; empty: none was requested, or the score was read from disk."""
    entropies: tuple[np.ndarray, ...] = field(default=(), compare=False)
    """The entropy in these slices, in percent."""


def score_prediction(
    logits: np.ndarray,
    properties: dict,
    label: Path,
    plans: Any,
    configuration: Any,
    dataset_json: dict,
    rules: Rules,
    view: SliceView | None = None,
    presence: np.ndarray | None = None,
) -> SubsetScore:
    """Resample logits with nnU-Net's exporter and measure the segmentation.

    Parameters
    ----------
    logits, properties:
        Shape (K, *spatial), in the geometry of the preprocessed image, and the properties from nnU-Net's preprocessor.
    label:
        File of the reference, which must have the shape of the image.
    plans, configuration, dataset_json, rules:
        The model, as for :func:`~nnunetv2_mstkd.evaluation.cases.prepare`, and what is measured.
    view:
        The slices to keep; None: none.
    presence:
        Probability that there is any voxel of each output channel, shape (K,); None: the network does not say.
    """
    reference = _reference(label, plans.image_reader_writer_class, rules.labels, file_stamp(label))
    within = as_preprocessed(reference, properties, plans)
    views = () if view is None else view.every
    manager = plans.get_label_manager(dataset_json)
    maps: list[np.ndarray] = []

    def look(values: np.ndarray) -> None:
        for each in views:
            maps.append(slice_entropy(values, properties, each, plans.transpose_forward, manager.has_regions))

    counting = _CountingLabels(manager, dataset_json, rules, within, look)
    segmentation = segment(logits, properties, plans, configuration, counting, threads=1)
    if segmentation.shape != reference.shape:
        raise InputError(f"the label {label} has shape {reference.shape}, its image {segmentation.shape}")
    values = rules.score(segmentation, reference, properties["spacing"])
    kept = tuple(each.cut(segmentation).astype(each.reference.dtype) for each in views)
    there = {value for value in rules.labels if (reference == value).any()}
    lacking = tuple(region for region, labels in rules.regions.items() if there.isdisjoint(labels))
    stated = {}
    if presence is not None:
        for region, head in foreground_heads(dataset_json).items():
            stated[region] = float(presence[head]), region not in lacking
    entropy = case_entropy(logits, counting.has_regions)
    component = keep_largest_component(segmentation, manager)
    if component is segmentation and DICE in rules.metrics:
        largest = {region: {DICE: values[region][DICE]} for region in rules.regions}
    else:
        dice_alone = replace(rules, metrics=(DICE,), min_voxels={})
        largest = dice_alone.score(component, reference, properties["spacing"])
    return SubsetScore(
        values, counting.near, segmentation.size, entropy, stated, counting.calibration, largest, lacking, kept,
        tuple(maps),
    )  # fmt: skip


class _CountingLabels:
    """nnU-Net's label manager, which also counts close decisions, and logits by what the reference says.

    ``look`` is called with the logits, shape (K, *spatial), transposed and cropped.
    """

    def __init__(
        self,
        manager: Any,
        dataset_json: Mapping[str, Any],
        rules: Rules,
        reference: np.ndarray,
        look: Callable[[np.ndarray], None],
    ) -> None:
        self._manager, self._heads = manager, foreground_heads(dataset_json)
        self._rules, self._reference, self._look = rules, reference, look
        self.near = 0
        self.calibration: dict[str, np.ndarray] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def convert_logits_to_segmentation(self, logits: Any) -> Any:
        values = torch.as_tensor(logits)
        self.near = int(near_decision(values, self._manager.has_regions).sum())
        if values.shape[1:] == self._reference.shape:  # another shape is refused later
            self._count(values, self._manager.has_regions)
        self._look(values.numpy())
        return self._manager.convert_logits_to_segmentation(logits)

    def _count(self, logits: torch.Tensor, regions: bool) -> None:
        # the log-odds are at most the distance to the largest logit: most voxels need no logsumexp
        least = LOWEST - 1 if regions else logits.amax(0) + (LOWEST - 1)  # 1: for logits of half precision
        ignored = self._rules.ignore_label
        for region, head in self._heads.items():
            counted = logits[head] >= least
            if ignored is not None:
                counted &= torch.from_numpy(self._reference != ignored)
            there = np.isin(self._reference[counted.numpy()], self._rules.regions[region])
            self.calibration[region] = logit_counts(log_odds(logits[:, counted], head, regions), there)


def log_odds(logits: torch.Tensor, head: int, regions: bool) -> np.ndarray:
    """Logarithm of p / (1 - p) for the probability p of an output channel, from logits (K, *spatial): (*spatial)."""
    own = logits[head].float()
    if not regions:
        own = own - torch.cat([logits[:head], logits[head + 1 :]]).float().logsumexp(0)
    return own.numpy()


def near_decision(logits: torch.Tensor, regions: bool) -> torch.Tensor:
    """Where the margin of logits (K, *spatial) to the decision is below :data:`NEAR`; bool, shape (*spatial).

    With regions each channel is decided separately, at zero; otherwise the largest wins, by its margin to the second.
    """
    if regions:
        return (logits.abs() < NEAR).any(0)
    if len(logits) < 2:
        return torch.zeros(logits.shape[1:], dtype=torch.bool)
    # twice as fast as topk
    first, second = torch.maximum(logits[0], logits[1]), torch.minimum(logits[0], logits[1])
    for channel in logits[2:]:
        second = torch.maximum(second, torch.minimum(first, channel))
        first = torch.maximum(first, channel)
    return first - second < NEAR
