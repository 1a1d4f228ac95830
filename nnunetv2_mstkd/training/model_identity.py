"""Weights and settings that belong together: refusing to mix those of two networks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nnunetv2_mstkd.nnunet import per_channel
from nnunetv2_mstkd.nnunet.plans import BLOCK, read_plans
from nnunetv2_mstkd.training.settings import Section, Settings, SettingsError, translate


def given_otherwise(
    given: Mapping[str, Any], sections: Iterable[type[Section]], here: Settings, stored: Settings
) -> Iterator[tuple[type[Section], str, Any, Any]]:
    """Yield section, key and both values of each setting in which two settings differ and that ``given`` names.

    ``given`` is the block of the preprocessed plans before it was completed to ``here``.
    """
    wanted = translate(given)
    for section in sections:
        theirs = stored[section].to_dict()
        for key, mine in here[section].to_dict().items():
            if key in wanted.get(section.NAME, {}) and mine != theirs[key]:
                yield section, key, mine, theirs[key]


def refuse_other_network(
    given: Mapping[str, Any], sections: Iterable[type[Section]], here: Settings, stored: Settings, source: str
) -> None:
    """Refuse a checkpoint whose network differs from the one that the preprocessed plans explicitly ask for.

    ``stored`` are the settings of the checkpoint in ``source``; the network is built from ``sections``. The
    SettingsError names the first key that differs.
    """
    for section, key, mine, theirs in given_otherwise(given, sections, here, stored):
        if key in section.network_keys():
            raise SettingsError(
                f"the plans ask for {section.NAME}.{key} = {mine!r}, {source} was trained with {theirs!r}. Restore the "
                f"old value, or train it as a separate configuration (mstkd configure)"
            )


def refuse_mixed_folds(
    model_folder: Path, configuration: str, fold: int | str, sections: Iterable[type[Section]], settings: Settings
) -> None:
    """Refuse a fold with another network than the other folds of its model folder, which share one plans.json.

    The SettingsError names all keys that differ.
    """
    plans_file = model_folder / "plans.json"
    trained = [path.parent.name for path in sorted(model_folder.glob("fold_*/checkpoint_*.pth"))]
    others = [name for name in trained if name != f"fold_{fold}"]
    if not others or not plans_file.is_file():
        return
    entry = read_plans(plans_file)["configurations"].get(configuration, {})
    there = translate(entry.get(BLOCK))
    there.setdefault(per_channel.SECTION, {per_channel.KEY: per_channel.PLANS})  # a model of an earlier version
    changed = [
        f"{section.NAME}.{key} is {old!r} there and {settings[section].to_dict()[key]!r} here"
        for section in sections
        for key, old in there.get(section.NAME, {}).items()
        if key in section.network_keys() and old != settings[section].to_dict()[key]
    ]
    if changed:
        raise SettingsError(
            f"{others[0]} in {model_folder} was trained with another network: {', '.join(changed)}. Train this fold as "
            f"a separate configuration (mstkd configure)"
        )
