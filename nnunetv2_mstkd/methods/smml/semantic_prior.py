"""What a single modality says about every class: the priors that guide SMML's refinement networks in training.

SMML takes class maps from a frozen SAM encoder and decoder, whose prompts and weights are not released. Here the prior
is the student's own, label or probability maps on disk, or a network in a local file.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import InputError, MissingFileError
from nnunetv2_mstkd.images.atomic import atomic_write
from nnunetv2_mstkd.losses.logits import probabilities
from nnunetv2_mstkd.networks.decoding import finest, logits_of

# ---- the student's own ---------------------------------------------------------------------------------------------


class MovingAverage(torch.nn.Module):
    """A copy of a network whose weights follow it slowly.

    ``decay`` is how much of the average stays in each step; less in the first steps, (1 + t) / (10 + t).
    """

    steps: torch.Tensor

    def __init__(self, network: torch.nn.Module, decay: float) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self._taken = 0

    @torch.no_grad()
    def update(self, network: torch.nn.Module) -> None:
        """Take one step towards ``network``."""
        decay = min(self.decay, (1 + self._taken) / (10 + self._taken))
        # not the state dict: nnU-Net's decoder lists the encoder's tensors once more
        for own, other in zip(self.network.parameters(), network.parameters(), strict=True):
            own.lerp_(other, 1 - decay)
        for kept, new in zip(self.network.buffers(), network.buffers(), strict=True):
            kept.copy_(new)
        self._taken += 1
        self.steps.fill_(self._taken)

    def restart(self, network: torch.nn.Module) -> None:
        """Begin with the weights of ``network``."""
        self.network.load_state_dict(network.state_dict())
        self._taken = 0

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(state_dict, *args, **kwargs)
        self._taken = int(self.steps)
        return result

    @torch.no_grad()
    def maps(self, data: torch.Tensor, needed: torch.Tensor, regions: bool) -> torch.Tensor:
        """What the network says of a complete batch (B, C, *spatial) when it is given one modality alone.

        ``needed``, bool (C,) on the CPU, are modalities that any sample has. Returned are probabilities (B, C, K,
        *spatial), zero for the others.
        """
        found: dict[int, torch.Tensor] = {}
        for channel in needed.nonzero().flatten().tolist():
            alone = torch.zeros(data.shape[:2], dtype=torch.bool)
            alone[:, channel] = True
            logits = finest(logits_of(self.network(modalities.mask_modalities(data, alone))))
            found[channel] = probabilities(logits, regions)
        absent = torch.zeros_like(next(iter(found.values())))
        return torch.stack([found.get(channel, absent) for channel in range(data.shape[1])], 1)


# ---- a network in a file -------------------------------------------------------------------------------------------


class FileNetwork:
    """A frozen TorchScript network from one modality (B, 1, *spatial) to logits (B, K, *spatial).

    InputError or MissingFileError if there is no such file, it is no TorchScript, or its output has another shape.
    """

    def __init__(self, file: Path, heads: int, patch_size: Sequence[int], device: torch.device) -> None:
        if not file.is_file():
            raise MissingFileError(
                f"setting smml.prior_path: {file} does not exist; expected a TorchScript file (torch.jit.save)"
            )
        try:
            self.network = torch.jit.load(str(file), map_location=device).eval()
        except RuntimeError as error:
            raise InputError(f"{file} is not a TorchScript file ({str(error).strip().splitlines()[0]})") from error
        expected = (1, heads, *patch_size)
        try:
            with torch.no_grad():
                found = self.network(torch.zeros(1, 1, *patch_size, device=device))
        except RuntimeError as error:
            raise InputError(
                f"the network in {file} does not take a batch of shape {(1, 1, *patch_size)}: "
                f"{str(error).strip().splitlines()[-1]}"
            ) from error
        if not isinstance(found, torch.Tensor) or tuple(found.shape) != expected:
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise InputError(f"the network in {file} gives {shape}, expected logits of shape {expected}")

    @torch.no_grad()
    def maps(self, data: torch.Tensor, regions: bool) -> torch.Tensor:
        """Probabilities, (B, C, K, *spatial), of a complete batch (B, C, *spatial)."""
        return torch.stack([probabilities(self.network(channel), regions) for channel in data.split(1, 1)], 1)


# ---- maps on disk --------------------------------------------------------------------------------------------------


def one_hot_maps(labels: torch.Tensor, label_manager: LabelManager) -> torch.Tensor:
    """Label maps (B, C, *spatial) as class or region maps (B, C, K, *spatial) of 0 and 1."""
    if label_manager.has_regions:
        members = [np.atleast_1d(region).tolist() for region in label_manager.foreground_regions]
    else:
        members = [[head] for head in range(label_manager.num_segmentation_heads)]
    return torch.stack([torch.isin(labels, labels.new_tensor(values)) for values in members], 2).float()


PROBABILITIES = "probabilities"
"""Name in an .npz file, nnU-Net's own."""

FULL = 255
"""Stored value of probability 1."""

TARGET_TRANSFORMS = ("ConvertSegmentationToRegionsTransform", "DownsampleSegForDSTransform")
"""Transforms of nnU-Net that make the target of the segmentation; the label maps must have left it before."""


class MovePriorToImage(BasicTransform):
    """Hand the label maps that travelled with the segmentation over to the image, after all spatial transforms."""

    def apply(self, data_dict: dict, **params: Any) -> dict:
        segmentation = data_dict["segmentation"]
        data_dict["image"] = torch.cat([data_dict["image"], segmentation[1:].to(data_dict["image"].dtype)])
        data_dict["segmentation"] = segmentation[:1]
        return data_dict


class TakePriorFromImage(BasicTransform):
    """Make the probability maps that were loaded behind the C channels of the image a regression target, before all
    other transforms: those of space move it as the image, those of intensities leave it alone."""

    def __init__(self, num_modalities: int) -> None:
        super().__init__()
        self.num_modalities = num_modalities

    def apply(self, data_dict: dict, **params: Any) -> dict:
        image = data_dict["image"]
        data_dict["image"] = image[: self.num_modalities]
        data_dict["regression_target"] = image[self.num_modalities :]
        return data_dict


class ReturnPriorToImage(BasicTransform):
    """The end of :class:`TakePriorFromImage`."""

    def apply(self, data_dict: dict, **params: Any) -> dict:
        data_dict["image"] = torch.cat([data_dict["image"], data_dict.pop("regression_target")])
        return data_dict


class _Behind:
    """An image (C, *spatial) with maps behind it, of which a patch is read, not the whole of both."""

    def __init__(self, image: Any, maps: np.ndarray) -> None:
        self.image, self.maps = image, maps
        self.shape = (image.shape[0] + len(maps), *image.shape[1:])
        self.dtype = np.dtype(np.float32)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        if index[0] != slice(None):
            raise IndexError(f"all channels are read at once, not {index[0]}")
        maps = self.maps[index].astype(np.float32) / FULL
        return np.concatenate([np.asarray(self.image[index], np.float32), maps])


class PriorDataset:
    """nnU-Net's data set, each case with the maps of :func:`prepare_maps`: label maps behind its segmentation,
    probabilities (``soft``) behind its image."""

    def __init__(self, cases: Any, folder: Path, *, soft: bool = False) -> None:
        self._cases, self._folder, self._soft = cases, folder, soft
        self.identifiers = cases.identifiers

    def load_case(self, identifier: str) -> tuple[Any, Any, Any, dict]:
        """nnU-Net's tuple of image, segmentation, previous segmentation and properties."""
        data, segmentation, previous, properties = self._cases.load_case(identifier)
        maps = np.load(self._folder / f"{identifier}.npy", mmap_mode="r", allow_pickle=False)
        if self._soft:
            return _Behind(data, maps), segmentation, previous, properties
        return data, np.concatenate([np.asarray(segmentation[:]), maps]), previous, properties


def is_soft(source: Path) -> bool:
    """Whether a folder holds probabilities (``.npz``) and no label maps."""
    return any(source.glob("*_0000.npz"))


def prepare_maps(
    source: Path,
    target: Path,
    cases: Any,
    *,
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: dict,
) -> None:
    """Bring a user's label or probability maps onto the grid of the preprocessed images, as nnU-Net does.

    Parameters
    ----------
    source
        Folder with what modality k says: CASE_000k and the data set's file ending, with the labels of the data set; or
        CASE_000k.npz with ``probabilities`` (K, *grid of the image), one per output channel, as nnU-Net saves them.
    target
        Folder for CASE.npy, created if necessary: labels, int8 (C, *shape), or probabilities in steps of 1/255, uint8
        (C * K, *shape). What is there and fits source and images stays.
    cases
        nnU-Net's data set object of the training cases.
    plans, configuration, dataset_json
        Those of the training.

    Raises
    ------
    MissingFileError, InputError
        Naming the first file that is absent, on another grid, or has another label or number of channels.
    """
    names, soft = modalities.modality_names(dataset_json), is_soft(source)
    ending = ".npz" if soft else dataset_json["file_ending"]
    files = {
        case: [source / f"{case}_{channel:04d}{ending}" for channel in range(len(names))] for case in cases.identifiers
    }
    absent = [file for paths in files.values() for file in paths if not file.is_file()]
    if absent:
        raise MissingFileError(
            f"setting smml.prior_path: {absent[0]} does not exist ({len(absent)} of {len(files) * len(names)} "
            f"maps are absent); expected one for each modality of each training case, all label maps or all .npz"
        )
    target.mkdir(parents=True, exist_ok=True)
    for case, paths in files.items():
        properties_file = Path(cases.source_folder, f"{case}.pkl")  # new whenever the images are preprocessed again
        sources = [(str(file), file.stat()) for file in (*paths, properties_file)]
        stamp = json.dumps([[name, status.st_size, status.st_mtime_ns] for name, status in sources])
        stamp_file, maps_file = target / f"{case}.json", target / f"{case}.npy"
        if maps_file.is_file() and stamp_file.is_file() and stamp_file.read_text(encoding="utf-8") == stamp:
            continue
        properties = load_pickle(str(properties_file))
        shape = tuple(cases.load_case(case)[0].shape[1:])
        read = _read_probabilities if soft else _read_labels
        place = _Place(properties, shape, plans, configuration)
        maps = np.concatenate([read(path, place, plans.get_label_manager(dataset_json)) for path in paths])
        with atomic_write(maps_file) as scratch, scratch.open("wb") as stream:
            np.save(stream, maps)
        stamp_file.write_text(stamp, encoding="utf-8")


class _Place(NamedTuple):
    """Where the preprocessed image of a case lies."""

    properties: dict
    shape: tuple[int, ...]
    plans: PlansManager
    configuration: ConfigurationManager

    def bring(self, maps: np.ndarray, path: Path, resample: Callable[..., Any], spacing: Sequence[float]) -> np.ndarray:
        """Bring maps (N, *grid of the image) to the grid of the preprocessed image; InputError for another grid."""
        properties, forward = self.properties, self.plans.transpose_forward
        maps = maps.transpose([0, *[axis + 1 for axis in forward]])
        if maps.shape[1:] != tuple(properties["shape_before_cropping"]) or not np.allclose(
            spacing, properties["spacing"], rtol=1e-3
        ):
            raise InputError(
                f"{path} has {maps.shape[1:]} voxels of {list(spacing)} mm, the images of its case have "
                f"{tuple(properties['shape_before_cropping'])} of {list(properties['spacing'])} mm"
            )
        box = (slice(None), *(slice(low, high) for low, high in properties["bbox_used_for_cropping"]))
        old_spacing = [properties["spacing"][axis] for axis in forward]
        new_spacing = list(self.configuration.spacing)
        if len(new_spacing) < len(old_spacing):  # 2d: nnU-Net does not change the distance of slices
            new_spacing = [old_spacing[0], *new_spacing]
        return np.asarray(resample(maps[box], self.shape, old_spacing, new_spacing))


def _read_labels(path: Path, place: _Place, label_manager: LabelManager) -> np.ndarray:
    """A label map, (1, *shape), int8 or int16."""
    allowed = [int(label) for label in label_manager.all_labels]
    labels, own = place.plans.image_reader_writer_class().read_seg(str(path))
    found = sorted(set(np.unique(labels).astype(int).tolist()) - set(allowed))
    if found or not np.array_equal(labels, np.round(labels)):
        raise InputError(f"{path} has values such as {found[:1] or 'fractions'}, expected the labels {list(allowed)}")
    moved = place.bring(labels, path, place.configuration.resampling_fn_seg, own["spacing"])
    return moved.astype(np.int8 if max(allowed) < 128 else np.int16)


def _read_probabilities(path: Path, place: _Place, label_manager: LabelManager) -> np.ndarray:
    """Probabilities, uint8 (K, *shape)."""
    heads = label_manager.num_segmentation_heads
    try:
        with np.load(path, allow_pickle=False) as content:
            maps = np.asarray(content[PROBABILITIES], np.float32)
    except (OSError, KeyError, ValueError, BadZipFile) as error:
        raise InputError(f"{path} cannot be read ({error}); expected an .npz file with {PROBABILITIES!r}") from error
    if maps.ndim != len(place.properties["shape_before_cropping"]) + 1 or len(maps) != heads:
        raise InputError(f"{path} has shape {maps.shape}, expected {heads} channels, one per label or region, in front")
    if not (maps.min() >= 0 and maps.max() <= 1):  # NaN too
        raise InputError(f"{path} has values from {maps.min():g} to {maps.max():g}, expected probabilities")
    resample = place.configuration.resampling_fn_probabilities
    moved = place.bring(maps, path, resample, place.properties["spacing"])
    return np.rint(moved.clip(0, 1) * FULL).astype(np.uint8)
