"""Deriving a new configuration in a plans file: other settings, widths or patch, the same preprocessed data."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from nnunetv2_mstkd.errors import ExistingFileError, InputError, MissingFileError
from nnunetv2_mstkd.images.atomic import scratch_file
from nnunetv2_mstkd.training.settings import BLOCK, SECTIONS, Settings, SettingsError

STANDARD_CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
"""nnU-Net's own; a re-plan overwrites them, so settings never go there."""

MIN_BOTTLENECK_EDGE = 4
"""nnU-Net's planners stop pooling an axis before its deepest grid falls below this."""


def derive(
    plans: Mapping[str, Any],
    parent: str,
    name: str,
    *,
    assignments: Iterable[tuple[str, str, Any]] = (),
    features: Sequence[int] | None = None,
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """The entry of a new configuration that inherits from ``parent``, with a complete ``"mstkd"`` block.

    Parameters
    ----------
    plans:
        content of a plans file.
    parent, name:
        configuration to start from, and the new one's name.
    assignments:
        (section, key, value) of settings that differ from the parent's block (or from the defaults).
    features:
        channels per stage, finest first; fewer or more stages than planned are allowed where the patch permits it.
    patch_size:
        in voxels; the number of stages and their strides follow nnU-Net's own rule for this patch, and edges are
        raised to multiples of the strides. A stage more than planned repeats the width of the deepest one.
    batch_size:
        samples per step.

    Raises
    ------
    ValueError
        for an unknown parent, a name that nnU-Net could not use, and impossible values.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunetv2_mstkd.methods.mstkd.network import resolve

    known = list(plans["configurations"])
    if parent not in known:
        raise InputError(f"the plans have no configuration {parent!r}; there are {', '.join(known)}")
    if name in STANDARD_CONFIGURATIONS:
        raise InputError(f"{name} is nnU-Net's own configuration, a re-plan would lose the settings; choose a new name")
    # nnU-Net joins trainer, plans and configuration with "__" and splits folder names there
    if not re.fullmatch(r"[A-Za-z0-9]+([_-][A-Za-z0-9]+)*", name):
        raise InputError(
            f"configuration name {name!r} does not work as a part of a folder name; expected letters and digits, "
            f"joined by single '-' or '_', for example {parent}_short"
        )
    resolved = deepcopy(PlansManager(deepcopy(dict(plans))).get_configuration(parent).configuration)
    ancestor: str | None = parent
    while ancestor is not None:
        if ancestor == name:
            raise InputError(
                f"{name} cannot inherit from {parent}: that is itself or inherits from it; choose a new name"
            )
        ancestor = plans["configurations"][ancestor].get("inherits_from")
    if resolved.get("previous_stage") is not None:
        raise InputError(
            f"{parent} is the second stage of a cascade, which the trainers of this package do not support; start from "
            f"2d, 3d_fullres or 3d_lowres"
        )
    block = Settings.from_block(resolved.get(BLOCK)).to_block()
    assignments = list(assignments)
    if any(item[:2] == ("distillation", "recipe") for item in assignments):
        # a recipe replaces what the parent says about the distillation and the optimiser; what stands beside it wins
        block["distillation"] = {}
        del block["schedule"]["optimizer"]
    for section, key, value in assignments:
        block[section][key] = value
    entry: dict[str, Any] = {"inherits_from": parent, BLOCK: Settings.from_block(block).to_block()}
    if batch_size is not None:
        if batch_size < 1:
            raise InputError(f"batch size is {batch_size}, expected at least 1")
        entry["batch_size"] = batch_size
    if features is not None or patch_size is not None:
        entry["patch_size"], entry["architecture"] = _architecture(resolved, features, patch_size)
    if any(section == "network" for section, _, _ in assignments):
        final = {**resolved, **entry}
        resolve(entry[BLOCK]["network"], final["architecture"]["arch_kwargs"], final["patch_size"])
    return entry


def _architecture(
    configuration: Mapping[str, Any], features: Sequence[int] | None, patch_size: Sequence[int] | None
) -> tuple[list[int], dict[str, Any]]:
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    architecture = deepcopy(configuration["architecture"])
    kwargs = architecture["arch_kwargs"]
    dimensions = len(configuration["patch_size"])
    patch = [int(edge) for edge in (configuration["patch_size"] if patch_size is None else patch_size)]
    if len(patch) != dimensions:
        raise InputError(f"patch {patch} has {len(patch)} edges, expected {dimensions}")
    if min(patch) < 1:
        raise InputError(f"patch {patch} has an edge below 1 voxel")
    wanted = len(features) if features is not None else None
    if features is not None and (len(features) < 2 or min(features) < 4):
        raise InputError(f"features {list(features)}: expected at least 2 stages of at least 4 channels")
    strides, kernels = kwargs["strides"], kwargs["kernel_sizes"]
    if patch_size is not None or wanted not in (None, kwargs["n_stages"]):
        spacing = list(configuration["spacing"])[-dimensions:]
        _, strides, kernels, _, _ = get_pool_and_conv_props(spacing, patch, MIN_BOTTLENECK_EDGE, 999999)
        if len(strides) < max(2, wanted or 0):
            raise InputError(
                f"{wanted or 2} stages do not fit a patch of {patch}: nnU-Net's rule allows {len(strides)} (no axis "
                f"below {MIN_BOTTLENECK_EDGE} voxels). Give fewer widths or a larger patch"
            )
        stages = wanted or len(strides)
        strides = [list(map(int, stride)) for stride in strides[:stages]]
        kernels = [*(list(map(int, kernel)) for kernel in kernels[: stages - 1]), [3] * dimensions]
        multiples = [math.prod(steps) for steps in zip(*strides, strict=True)]
        patch = [math.ceil(edge / multiple) * multiple for edge, multiple in zip(patch, multiples, strict=True)]
    stages = len(strides)
    widths = list(features) if features is not None else _extend(kwargs["features_per_stage"], stages)
    kwargs.update(n_stages=stages, strides=strides, kernel_sizes=kernels, features_per_stage=widths)
    per_stage = {"n_conv_per_stage": stages, "n_blocks_per_stage": stages, "n_conv_per_stage_decoder": stages - 1}
    kwargs.update({key: _extend(kwargs[key], length) for key, length in per_stage.items() if key in kwargs})
    return patch, architecture


def _extend(values: Any, length: int) -> list[int]:
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    return [*values[:length], *[values[-1]] * (length - len(values))]


def write_configuration(plans_file: Path, name: str, entry: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Add a configuration to a plans file; an existing one of other content is kept unless ``overwrite``.

    Raises
    ------
    FileExistsError
        if the name is taken by a configuration with other content.
    """
    plans = read_plans(plans_file)
    there = plans["configurations"].get(name)
    entry = json.loads(json.dumps(entry))
    if there == entry:
        return
    if there is not None and not overwrite:
        raise ExistingFileError(
            f"configuration {name} exists in {plans_file} with other content; choose another name or pass --overwrite"
        )
    plans["configurations"][name] = entry
    with scratch_file(plans_file) as scratch:
        scratch.write_text(json.dumps(plans, indent=4), encoding="utf-8")


def read_plans(plans_file: Path) -> dict[str, Any]:
    """The content of a plans file.

    Raises
    ------
    FileNotFoundError, ValueError
        if there is none or it is not one.
    """
    if not plans_file.is_file():
        raise MissingFileError(f"{plans_file} does not exist; run nnUNetv2_plan_and_preprocess for this data set first")
    try:
        plans = json.loads(plans_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{plans_file} is not valid JSON ({error})") from error
    if not isinstance(plans, dict) or "configurations" not in plans:
        raise InputError(f"{plans_file} is no nnU-Net plans file: it has no configurations")
    return plans


def describe(entry: Mapping[str, Any]) -> list[str]:
    """The settings of a configuration that differ from the defaults, one line each."""
    defaults = Settings().to_block()
    lines = [
        f"{section}.{key} = {json.dumps(value)}"
        for section in SECTIONS
        for key, value in entry[BLOCK][section].items()
        if value != defaults[section][key]
    ]
    for key in ("patch_size", "batch_size"):
        if key in entry:
            lines.append(f"{key} = {entry[key]}")
    if "architecture" in entry:
        kwargs = entry["architecture"]["arch_kwargs"]
        lines.append(f"features_per_stage = {kwargs['features_per_stage']}, strides = {kwargs['strides']}")
    return lines


__all__ = ["SettingsError", "derive", "describe", "read_plans", "write_configuration"]
