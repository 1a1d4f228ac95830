"""Deriving a new configuration with other settings, widths or patch on the same preprocessed data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_mstkd.methods.registry import trainers
from nnunetv2_mstkd.nnunet.plans import BLOCK, derive, inherited
from nnunetv2_mstkd.nnunet.unet import UNetPlan
from nnunetv2_mstkd.training.settings import (
    DistillationSettings,
    SamplerSettings,
    ScheduleSettings,
    Settings,
    TeacherSettings,
    known_sections,
    read_assignment,
    translate,
)

SHARED = (ScheduleSettings, SamplerSettings, TeacherSettings, DistillationSettings)
"""Sections that every derived configuration spells out; a method's own only where something in it was set."""


def read_assignments(texts: Iterable[str]) -> list[tuple[str, str, Any]]:
    """Split texts such as ``schedule.epochs=100``; a setting that no installed trainer has is refused."""
    trainers()
    return [read_assignment(text) for text in texts]


def configure(
    plans: Mapping[str, Any],
    parent: str,
    name: str,
    *,
    assignments: Iterable[tuple[str, str, Any]] = (),
    modalities: Sequence[str] | None = None,
    features: Sequence[int] | None = None,
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Return the entry of a new configuration that inherits from ``parent``, with its ``"mstkd"`` block.

    For ``features``, ``patch_size``, ``batch_size`` and the refusals see :func:`nnunetv2_mstkd.nnunet.plans.derive`.

    Parameters
    ----------
    assignments
        (section, key, value) of settings that differ from the parent's block (or from the defaults).
    modalities
        Names of the data set's modalities, to check settings that name some; None: checked when a training starts.
    """
    every, assignments = trainers(), list(assignments)
    known = known_sections()
    block = translate(inherited(plans, parent, BLOCK))
    for section, key, value in assignments:
        if value != block.get(section, {}).get(key, getattr(known[section](), key, None)):
            known[section].forget(block, key)
    for section, key, value in assignments:
        block.setdefault(section, {})[key] = value
    used = [known[section] for section in block if section in known]
    settings = Settings.read(block, (*SHARED, *used))
    if modalities is not None:
        settings[SamplerSettings].build(modalities)
    entry = derive(
        plans, parent, name, block=settings.to_block(), features=features, patch_size=patch_size, batch_size=batch_size
    )
    changed = {known[section] for section, _, _ in assignments}
    manager = PlansManager({**plans, "configurations": {**plans["configurations"], name: entry}})
    configuration = manager.get_configuration(name)
    plan = UNetPlan.of(configuration)
    for trainer in every.values():
        if trainer.design is not None and changed.intersection(trainer.design.sections):
            own = trainer.read_settings(configuration)
            if modalities is not None:
                trainer.design.check(plan, own, modalities)
            trainer.design.resolve(own, plan, modalities)
    return entry


def complete_block(block: Mapping | None) -> dict[str, Any]:
    """Return a block with every key of every known section, for comparing blocks of two versions."""
    trainers()
    return Settings.read(block, known_sections().values()).to_block()
