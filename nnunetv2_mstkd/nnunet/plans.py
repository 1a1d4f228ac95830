"""Plans files: reading them, following what configurations inherit, and deriving a new configuration.

These functions trust the file; plans of others are opened with :mod:`nnunetv2_mstkd.nnunet.safe_plans`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from nnunetv2_mstkd.errors import ExistingFileError, InputError
from nnunetv2_mstkd.images.atomic import locked, read_json, write_json

BLOCK = "mstkd"
"""Key of this package's settings in a configuration of the plans, and of its content in a checkpoint."""

CONVERSION = "mstkd_conversion"
"""Key of what ``mstkd convert`` says about a data set, in its ``dataset.json``, which nnU-Net copies into models."""

STANDARD_CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
"""nnU-Net's own; planning again overwrites them, so settings never go there."""

MIN_BOTTLENECK_EDGE = 4
"""nnU-Net's planners stop pooling an axis before its deepest grid falls below this."""

MIN_STAGES = 3
"""With two, deep supervision has one output, whose weight nnU-Net sets to 0 and divides by."""


# ---- the file ------------------------------------------------------------------------------------------------------


def read_plans(file: Path) -> dict[str, Any]:
    """Read a plans file."""
    plans = read_json(file, "; run nnUNetv2_plan_and_preprocess for this data set first")
    if not isinstance(plans.get("configurations"), dict):
        raise InputError(f"{file} is not an nnU-Net plans file: it has no configurations")
    return plans


def write_configuration(file: Path, name: str, entry: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Add a configuration to a plans file; only ``overwrite`` replaces one of other content (ExistingFileError)."""
    entry = json.loads(json.dumps(entry))
    if read_plans(file)["configurations"].get(name) == entry:
        return
    with locked(file):  # the jobs of an array may all add one at the same moment
        plans = read_plans(file)
        if plans["configurations"].get(name) not in (None, entry) and not overwrite:
            raise ExistingFileError(
                f"configuration {name} exists in {file} with other content; choose another name or pass --overwrite"
            )
        plans["configurations"][name] = entry
        write_json(file, plans, indent=4)


# ---- inheritance ---------------------------------------------------------------------------------------------------


def lineage(plans: Mapping[str, Any], name: str) -> Iterator[str]:
    """Yield a configuration's name, then those of the configurations that it inherits from, nearest first."""
    configurations, seen = plans["configurations"], set()
    current: str | None = name
    while current is not None:
        if current not in configurations:
            raise InputError(f"the plans have no configuration {current!r}; there are {', '.join(configurations)}")
        if current in seen:
            raise InputError(f"configuration {current} of the plans inherits from itself")
        seen.add(current)
        yield current
        current = configurations[current].get("inherits_from")


def heirs(plans: Mapping[str, Any], name: str) -> list[str]:
    """Return the configurations that inherit from one, directly or not."""
    return [other for other in plans["configurations"] if other != name and name in lineage(plans, other)]


def inherited(plans: Mapping[str, Any], name: str, key: str) -> Any:
    """Return a value of a configuration, or of the nearest one that it inherits from; None if none has it."""
    entries = (plans["configurations"][ancestor] for ancestor in lineage(plans, name))
    return next((entry[key] for entry in entries if key in entry), None)


def resolved(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a configuration together with everything that it inherits, as nnU-Net reads it."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    list(lineage(plans, name))  # nnU-Net would follow a circle until Python gives up
    return PlansManager(deepcopy(dict(plans))).get_configuration(name).configuration


# ---- a new configuration -------------------------------------------------------------------------------------------


def derive(
    plans: Mapping[str, Any],
    parent: str,
    name: str,
    *,
    block: Mapping[str, Any],
    features: Sequence[int] | None = None,
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Make the entry of a new configuration that inherits from ``parent``.

    Parameters
    ----------
    block
        Validated settings of this package, complete.
    features
        Channels per stage, finest first. There may be fewer or more stages than planned where the patch permits it.
    patch_size
        Edges in voxels. The number of stages and their strides follow nnU-Net's own rule for this patch, and edges are
        raised to multiples of the strides. Additional stages repeat the width of the deepest one.
    """
    _check_name(name, parent)
    if name in lineage(plans, parent):
        raise InputError(f"{name} cannot inherit from {parent}: that is itself or inherits from it; choose a new name")
    base = resolved(plans, parent)
    if base.get("previous_stage") is not None:
        raise InputError(
            f"{parent} is the second stage of a cascade, which the trainers of this package do not support; start from "
            f"2d, 3d_fullres or 3d_lowres"
        )
    entry: dict[str, Any] = {"inherits_from": parent, BLOCK: deepcopy(dict(block))}
    if batch_size is not None:
        if batch_size < 1:
            raise InputError(f"batch size is {batch_size}, expected at least 1")
        entry["batch_size"] = batch_size
    if features is not None or patch_size is not None:
        entry["patch_size"], entry["architecture"] = _architecture(base, features, patch_size)
    return entry


def _check_name(name: str, parent: str) -> None:
    if name in STANDARD_CONFIGURATIONS:
        raise InputError(f"{name} is nnU-Net's own configuration, a re-plan would lose the settings; choose a new name")
    # nnU-Net joins trainer, plans and configuration with "__" and splits folder names there
    if not re.fullmatch(r"[A-Za-z0-9]+([_-][A-Za-z0-9]+)*", name):
        raise InputError(
            f"configuration name {name!r} does not work as a part of a folder name; expected letters and digits, "
            f"joined by single '-' or '_', for example {parent}_short"
        )


def _architecture(
    base: Mapping[str, Any], features: Sequence[int] | None, patch_size: Sequence[int] | None
) -> tuple[list[int], dict[str, Any]]:
    """The patch size and architecture of a configuration with other widths or another patch."""
    architecture = deepcopy(base["architecture"])
    kwargs = architecture["arch_kwargs"]
    patch = [int(edge) for edge in (base["patch_size"] if patch_size is None else patch_size)]
    dimensions = len(base["patch_size"])
    if len(patch) != dimensions:
        raise InputError(f"patch {patch} has {len(patch)} edges, expected {dimensions}")
    if min(patch) < 1:
        raise InputError(f"patch {patch} has an edge below 1 voxel")
    if features is not None and (len(features) < MIN_STAGES or min(features) < 4):
        raise InputError(f"features {list(features)}: expected at least {MIN_STAGES} stages of at least 4 channels")
    strides, kernels = kwargs["strides"], kwargs["kernel_sizes"]
    if patch_size is not None or (features is not None and len(features) != kwargs["n_stages"]):
        strides, kernels = _topology(base["spacing"], patch, None if features is None else len(features))
        multiples = [math.prod(steps) for steps in zip(*strides, strict=True)]
        patch = [math.ceil(edge / multiple) * multiple for edge, multiple in zip(patch, multiples, strict=True)]
    stages = len(strides)
    widths = list(features) if features is not None else _extend(kwargs["features_per_stage"], stages)
    kwargs.update(n_stages=stages, strides=strides, kernel_sizes=kernels, features_per_stage=widths)
    per_stage = {"n_conv_per_stage": stages, "n_blocks_per_stage": stages, "n_conv_per_stage_decoder": stages - 1}
    kwargs.update({key: _extend(kwargs[key], length) for key, length in per_stage.items() if key in kwargs})
    return patch, architecture


def _topology(
    spacing: Sequence[float], patch: Sequence[int], stages: int | None
) -> tuple[list[list[int]], list[list[int]]]:
    """Strides and kernel sizes that nnU-Net's planner gives a patch; ``stages``: only the first ones."""
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    dimensions = len(patch)
    _, strides, kernels, _, _ = get_pool_and_conv_props(
        list(spacing)[-dimensions:], list(patch), MIN_BOTTLENECK_EDGE, 999999
    )
    if len(strides) < max(MIN_STAGES, stages or 0):
        raise InputError(
            f"{stages or MIN_STAGES} stages do not fit a patch of {list(patch)}: nnU-Net's rule allows {len(strides)} "
            f"(no axis below {MIN_BOTTLENECK_EDGE} voxels). Give fewer widths or a larger patch"
        )
    stages = stages or len(strides)
    strides, kernels = ([list(map(int, entry)) for entry in entries[:stages]] for entries in (strides, kernels))
    return strides, [*kernels[: stages - 1], [3] * dimensions]


def _extend(values: Any, length: int) -> list[int]:
    """``values`` cut or extended to a length by repeating the last one."""
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    return [*values[:length], *[values[-1]] * (length - len(values))]
