"""A new configuration of the plans with other settings of this package: validating them and showing them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nnunetv2_mstkd.nnunet import plans as nnunet_plans
from nnunetv2_mstkd.nnunet.plans import BLOCK
from nnunetv2_mstkd.training.settings import SECTIONS, Settings


def configure(
    plans: Mapping[str, Any],
    parent: str,
    name: str,
    *,
    assignments: Iterable[tuple[str, str, Any]] = (),
    features: Sequence[int] | None = None,
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Make the entry of a new configuration, whose settings differ from those of ``parent``.

    Parameters
    ----------
    plans
        Content of a plans file.
    parent, name
        Configuration to start from, and the name of the new one.
    assignments
        (section, key, value) of the settings that differ from the parent's, or from the defaults.
    features, patch_size, batch_size
        See :func:`nnunetv2_mstkd.nnunet.plans.derive`.

    Raises
    ------
    SettingsError, InputError
        For unknown and impossible settings, and as :func:`~nnunetv2_mstkd.nnunet.plans.derive`.
    """
    from nnunetv2_mstkd.methods.mstkd.network import resolve

    assignments = list(assignments)
    block = _changed(nnunet_plans.inherited(plans, parent, BLOCK), assignments)
    entry = nnunet_plans.derive(
        plans, parent, name, block=block, features=features, patch_size=patch_size, batch_size=batch_size
    )
    if any(section == "network" for section, _, _ in assignments):
        final = {**nnunet_plans.resolved(plans, parent), **entry}
        resolve(block["network"], final["architecture"]["arch_kwargs"], final["patch_size"])
    return entry


def _changed(block: Mapping | None, assignments: Sequence[tuple[str, str, Any]]) -> dict[str, dict[str, Any]]:
    """A complete block of validated settings."""
    content = Settings.from_block(block).to_block()
    if any(item[:2] == ("distillation", "recipe") for item in assignments):
        # a recipe replaces what the parent says about distillation and optimiser; other assignments override it
        content["distillation"] = {}
        del content["schedule"]["optimizer"]
    for section, key, value in assignments:
        content[section][key] = value
    return Settings.from_block(content).to_block()


def describe(entry: Mapping[str, Any]) -> list[str]:
    """List the settings of a configuration that differ from the defaults, one line each."""
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
