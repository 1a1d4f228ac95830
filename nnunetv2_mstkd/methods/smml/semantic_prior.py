"""What a single modality says about every class: the priors that guide SMML's refinement networks in training.

SMML takes class maps from a frozen SAM encoder and decoder, whose prompts and weights are not released. Nothing is
downloaded here: the prior is the student's own, label maps on disk, or a network in a local file.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from nnunetv2_mstkd.networks.decoding import finest

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
            logits = finest(self.network(modalities.mask_modalities(data, alone)).logits)
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
            raise InputError(f"{file} is no TorchScript file ({str(error).strip().splitlines()[0]})") from error
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


# ---- label maps on disk --------------------------------------------------------------------------------------------


def one_hot_maps(labels: torch.Tensor, label_manager: LabelManager) -> torch.Tensor:
    """Label maps (B, C, *spatial) as class or region maps (B, C, K, *spatial) of 0 and 1."""
    if label_manager.has_regions:
        members = [np.atleast_1d(region).tolist() for region in label_manager.foreground_regions]
    else:
        members = [[head] for head in range(label_manager.num_segmentation_heads)]
    return torch.stack([torch.isin(labels, labels.new_tensor(values)) for values in members], 2).float()


TARGET_TRANSFORMS = ("ConvertSegmentationToRegionsTransform", "DownsampleSegForDSTransform")
"""Transforms of nnU-Net that make the target of the segmentation; the label maps must have left it before."""


class MovePriorToImage(BasicTransform):
    """Hand the label maps that travelled with the segmentation over to the image, after all spatial transforms."""

    def apply(self, data_dict: dict, **params: Any) -> dict:
        segmentation = data_dict["segmentation"]
        data_dict["image"] = torch.cat([data_dict["image"], segmentation[1:].to(data_dict["image"].dtype)])
        data_dict["segmentation"] = segmentation[:1]
        return data_dict


class PriorDataset:
    """nnU-Net's data set, each case with C label maps, from :func:`prepare_label_maps`, behind its segmentation."""

    def __init__(self, cases: Any, folder: Path) -> None:
        self._cases, self._folder = cases, folder
        self.identifiers = cases.identifiers

    def load_case(self, identifier: str) -> tuple[Any, np.ndarray, Any, dict]:
        """nnU-Net's tuple of image, segmentation, previous segmentation and properties."""
        data, segmentation, previous, properties = self._cases.load_case(identifier)
        maps = np.load(self._folder / f"{identifier}.npy", mmap_mode="r", allow_pickle=False)
        return data, np.concatenate([np.asarray(segmentation[:]), maps]), previous, properties


def prepare_label_maps(
    source: Path,
    target: Path,
    cases: Any,
    *,
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: dict,
) -> None:
    """Bring a user's label maps onto the grid of the preprocessed images, as nnU-Net's preprocessing does.

    Parameters
    ----------
    source
        Folder with CASE_000k and the data set's file ending: what modality k says, with the labels of the data set.
    target
        Folder for CASE.npy, int8 (C, *shape), made if absent. What is there and fits source and images stays.
    cases
        nnU-Net's data set object of the training cases.
    plans, configuration, dataset_json
        Those of the training.

    Raises
    ------
    MissingFileError, InputError
        Naming the first file that is absent, on another grid, or has another label.
    """
    reader = plans.image_reader_writer_class()
    allowed = [int(label) for label in plans.get_label_manager(dataset_json).all_labels]
    names = modalities.modality_names(dataset_json)
    files = {
        case: [source / f"{case}_{channel:04d}{dataset_json['file_ending']}" for channel in range(len(names))]
        for case in cases.identifiers
    }
    absent = [file for paths in files.values() for file in paths if not file.is_file()]
    if absent:
        raise MissingFileError(
            f"setting smml.prior_path: {absent[0]} does not exist ({len(absent)} of {len(files) * len(names)} label "
            f"maps are absent); expected one for each modality of each training case"
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
        maps = [_preprocess(path, reader, properties, shape, allowed, plans, configuration) for path in paths]
        with atomic_write(maps_file) as scratch, scratch.open("wb") as stream:
            np.save(stream, np.concatenate(maps).astype(np.int8 if max(allowed) < 128 else np.int16))
        stamp_file.write_text(stamp, encoding="utf-8")


def _preprocess(
    path: Path,
    reader: Any,
    properties: dict,
    shape: tuple[int, ...],
    allowed: Sequence[int],
    plans: PlansManager,
    configuration: ConfigurationManager,
) -> np.ndarray:
    labels, own = reader.read_seg(str(path))
    found = sorted(set(np.unique(labels).astype(int).tolist()) - set(allowed))
    if found or not np.array_equal(labels, np.round(labels)):
        raise InputError(f"{path} has values such as {found[:1] or 'fractions'}, expected the labels {list(allowed)}")
    spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
    labels = labels.transpose([0, *[axis + 1 for axis in plans.transpose_forward]])
    if labels.shape[1:] != tuple(properties["shape_before_cropping"]) or not np.allclose(
        own["spacing"], properties["spacing"], rtol=1e-3
    ):
        raise InputError(
            f"{path} has {labels.shape[1:]} voxels of {list(own['spacing'])} mm, the images of its case have "
            f"{tuple(properties['shape_before_cropping'])} of {list(properties['spacing'])} mm"
        )
    box = (slice(None), *(slice(low, high) for low, high in properties["bbox_used_for_cropping"]))
    labels = labels[box]
    new_spacing = list(configuration.spacing)
    if len(new_spacing) < len(spacing):  # 2d: nnU-Net does not change the distance of slices
        new_spacing = [spacing[0], *new_spacing]
    return np.asarray(configuration.resampling_fn_seg(labels, shape, spacing, new_spacing))
