"""SMML's semantic prior from SAM: what a promptable segmenter of natural images sees in each modality.

SMML's authors used a SAM whose weights, prompts and script are not released; its maps have one class per label. SAM
knows no classes, so here the labels of the training cases prompt it: a box around each piece of each label or region in
each slice, and SAM decides, from one modality alone, what in the box is the thing. The prior serves training only, so
labels may prompt it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy import ndimage

from nnunetv2_mstkd.errors import DependencyError, InputError, MissingFileError
from nnunetv2_mstkd.images.atomic import atomic_write
from nnunetv2_mstkd.methods.smml.semantic_prior import PROBABILITIES
from nnunetv2_mstkd.nnunet.input_folder import training_cases, training_files
from nnunetv2_mstkd.nnunet.reading import Reader, read_checked

BOXES_AT_ONCE = 32
PERCENTILES = 0.5, 99.5
"""Of the voxels that are not zero: black and white of the image that SAM sees, as MedSAM does."""


class Sam:
    """A SAM of the package transformers: SAM itself, MedSAM, or any other with the same layout.

    Parameters
    ----------
    model
        Folder with model and processor as ``save_pretrained`` writes them, or a name that transformers resolves.
    device
        Where it runs.

    Raises
    ------
    DependencyError
        If transformers is not installed.
    MissingFileError, InputError
        If there is no such folder, or no SAM in it.
    """

    def __init__(self, model: str, device: torch.device) -> None:
        try:
            from transformers import SamModel, SamProcessor
            from transformers.utils.logging import disable_progress_bar
        except ImportError as error:
            raise DependencyError(
                "the prior from SAM needs transformers, which is not installed: pip install nnunetv2_mstkd[sam]"
            ) from error
        disable_progress_bar()
        folder = Path(model).expanduser()
        if not folder.is_dir() and (folder.is_absolute() or model.startswith((".", "~"))):
            raise MissingFileError(
                f"--sam: no folder {model}; expected a SAM as transformers' save_pretrained writes it"
            )
        source = str(folder) if folder.is_dir() else model
        try:
            self._processor = SamProcessor.from_pretrained(source)
            loaded: Any = SamModel.from_pretrained(source, output_loading_info=True)
        except MemoryError:
            raise
        except Exception as error:  # transformers, tokenizers and safetensors each have their own
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(f"--sam: transformers finds no SAM in {model} ({line})") from error
        network, loading = loaded
        if loading["missing_keys"]:  # transformers would leave them at random
            raise InputError(
                f"--sam: {model} is not a complete SAM: it lacks {len(loading['missing_keys'])} tensors such as "
                f"{sorted(loading['missing_keys'])[0]}"
            )
        self._network, self.device = network.to(device).eval(), device

    @torch.no_grad()
    def segment(self, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """Probabilities of what is in each box: (N, rows, columns), from an image (rows, columns) of uint8.

        Boxes, (N, 4), are x, y of two corners in pixels.
        """
        rgb = np.repeat(image[..., None], 3, -1)
        corners = [boxes.astype(float).tolist()]
        given = self._processor(rgb, input_boxes=corners, return_tensors="pt")
        pixels, prompts = (given[key].to(self.device, torch.float32) for key in ("pixel_values", "input_boxes"))
        embeddings = self._network.get_image_embeddings(pixels)
        masks = []
        for chunk in prompts.split(BOXES_AT_ONCE, 1):
            found = self._network(image_embeddings=embeddings, input_boxes=chunk, multimask_output=False)
            masks.append(found.pred_masks)
        sizes = given["original_sizes"], given["reshaped_input_sizes"]
        (logits,) = self._processor.post_process_masks(torch.cat(masks, 1).cpu(), *sizes, binarize=False)
        return logits[:, 0].sigmoid().numpy()


def slice_axis(spacing: Sequence[float]) -> int:
    """The axis along which slices are cut: that of the largest spacing, the first of equal ones."""
    return int(np.argmax(np.round(spacing, 3)))


def boxes_of(mask: np.ndarray, margin: int) -> np.ndarray:
    """Boxes (N, 4), x and y of two corners, around the connected pieces of a mask (rows, columns), with a margin."""
    pieces = ndimage.find_objects(ndimage.label(mask)[0])
    last = np.array(mask.shape)[::-1] - 1
    boxes = np.array([(x.start, y.start, x.stop - 1, y.stop - 1) for y, x in pieces], int).reshape(-1, 2, 2)
    return np.stack([(boxes[:, 0] - margin).clip(0), np.minimum(boxes[:, 1] + margin, last)], 1).reshape(-1, 4)


def grey(image: np.ndarray) -> np.ndarray:
    """Grey values of uint8 for an image; black where it is constant."""
    inside = image[image != 0]
    low, high = np.percentile(inside, PERCENTILES) if inside.size else (0.0, 0.0)
    if high <= low:
        return np.zeros(image.shape, np.uint8)
    return np.rint((image.clip(low, high) - low) / (high - low) * 255).astype(np.uint8) * (image != 0)


def modality_prior(sam: Any, image: np.ndarray, members: np.ndarray, axis: int, *, margin: int) -> np.ndarray:
    """What SAM says in one modality about each label or region.

    Parameters
    ----------
    sam
        Has the method :meth:`Sam.segment`.
    image
        The modality, (z, y, x).
    members
        Bool, (heads, z, y, x): the voxels of each label or region.
    axis
        Across the slices.
    margin
        Pixels between a piece and its box.

    Returns
    -------
    Probabilities, float16 (heads, z, y, x): in each slice the largest of the head's boxes, 0 outside of all of them.
    """
    shown, found = np.moveaxis(grey(image), axis, 0), np.zeros(members.shape, np.float16)
    planes = np.moveaxis(members, axis + 1, 0)
    for number in np.flatnonzero(planes.any((1, 2, 3))):
        boxes = [boxes_of(mask, margin) for mask in planes[number]]
        if not shown[number].any():
            continue
        masks = sam.segment(shown[number], np.concatenate(boxes))
        owners = np.repeat(np.arange(len(boxes)), [len(each) for each in boxes])
        target = np.moveaxis(found, axis + 1, 0)[number]
        for owner, mask, (left, top, right, bottom) in zip(owners, masks, np.concatenate(boxes), strict=True):
            part = np.s_[owner, top : bottom + 1, left : right + 1]
            target[part] = np.maximum(target[part], mask[top : bottom + 1, left : right + 1])
    return found


def with_background(found: np.ndarray) -> np.ndarray:
    """Probabilities of the labels (K - 1, ...) with the background's in front, (K, ...), whose sum is 1."""
    rest = 1 - found.max(0, keepdims=True).astype(np.float32)
    everything = np.concatenate([rest, found])
    return (everything / everything.sum(0, keepdims=True)).astype(np.float16)


def write_prior(
    raw: Path,
    output: Path,
    sam: Any,
    *,
    dataset_json: dict,
    reader: Reader,
    margin: int = 3,
    on_case: Callable[[str], None] = lambda case: None,
) -> int:
    """Write the prior of all training cases, ``CASE_000k.npz``, and return how many files are new; others are kept.

    Parameters
    ----------
    raw
        Folder of the data set below nnUNet_raw.
    output
        Folder for the prior, created if necessary.
    sam
        :class:`Sam`.
    dataset_json, reader
        Of the data set.
    margin
        See :func:`modality_prior`.
    on_case
        Called with the name of each case before it is segmented.

    Raises
    ------
    MissingFileError, InputError
        Naming the first image or label that does not exist, cannot be read or does not fit.
    """
    labels = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
    heads = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    channels = len(dataset_json.get("channel_names") or dataset_json["modality"])
    cases, written = training_cases(raw, channels), 0
    output.mkdir(parents=True, exist_ok=True)
    for case in cases:
        targets = [output / f"{case}_{channel:04d}.npz" for channel in range(channels)]
        if all(target.is_file() for target in targets):
            continue
        on_case(case)
        files = training_files(raw, case, dataset_json, channels)
        label = reader().read_seg(str(files.label))[0][0]
        members = np.stack([np.isin(label, np.atleast_1d(head)) for head in heads])
        for path, target in zip(files.images, targets, strict=True):
            if target.is_file():
                continue
            try:
                channel = read_checked(path, reader)
            except InputError as error:
                raise InputError(f"{path} {error}") from error
            if channel.image.shape != label.shape:
                raise InputError(f"{path} has {channel.image.shape} voxels, the label of its case {label.shape}")
            axis = slice_axis(channel.properties["spacing"])
            found = modality_prior(sam, channel.image, members, axis, margin=margin)
            content: dict[str, Any] = {PROBABILITIES: found if labels.has_regions else with_background(found)}
            with atomic_write(target) as scratch, scratch.open("wb") as stream:
                np.savez_compressed(stream, **content)
            written += 1
    return written
