from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional

import pytest

from nnunetv2_mstkd.methods.adamm.settings import AdaMMSettings
from nnunetv2_mstkd.methods.mstkd.settings import MSTKDSettings, NetworkSettings
from nnunetv2_mstkd.modalities import SubsetSampler
from nnunetv2_mstkd.training.settings import (
    RENAMED,
    DistillationSettings,
    SamplerSettings,
    ScheduleSettings,
    Section,
    Settings,
    SettingsError,
    TeacherSettings,
    _typed,
    known_sections,
    read_assignment,
)

SECTIONS = (
    SamplerSettings, ScheduleSettings, NetworkSettings, DistillationSettings, TeacherSettings, MSTKDSettings,
)  # fmt: skip


def read(block) -> Settings:
    return Settings.read(block, SECTIONS)


NAMES = ("T1", "T1ce", "FLAIR")


def test_no_block_is_the_defaults():
    for block in (None, {}):
        assert read(block).to_block() == {section.NAME: section().to_dict() for section in SECTIONS}


def test_default_schedule_is_nnunets():
    schedule = ScheduleSettings()
    assert (schedule.epochs, schedule.iterations, schedule.validation_iterations) == (1000, 250, 50)
    assert (schedule.optimizer, schedule.learning_rate) == ("sgd", 1e-2)
    assert schedule.checkpoint_interval(schedule.epochs) == 50


def test_block_is_complete_and_survives_json():
    block = {
        "sampler": {"kind": "weighted", "weights": {"T1": 1, "T1+FLAIR": 2.5}},
        "schedule": {"epochs": 7, "seed": 3, "optimizer": "adamw", "init_from": "FullModalityTrainer"},
        "network": {"depth": 6, "taps": 3, "patch": [2, 2, 1]},
        "mstkd": {"kl": 3},
        "distillation": {"where": "everywhere"},
        "teacher": {"warm_start": False, "epochs": 9},
    }
    settings = read(block)
    written = settings.to_block()
    for section in SECTIONS:
        assert list(written[section.NAME]) == [field.name for field in dataclasses.fields(section)]
    assert json.loads(json.dumps(written)) == written
    assert read(json.loads(json.dumps(written))).to_block() == written
    assert settings[NetworkSettings].patch == (2, 2, 1)
    assert settings[ScheduleSettings].epochs == 7


def test_sections_of_other_trainers_stay():
    other = {"adamm": {"gate": 0.2}}
    settings = Settings.read(other, (ScheduleSettings,))
    assert settings.to_block()["adamm"] == {"gate": 0.2}
    assert AdaMMSettings not in settings and ScheduleSettings in settings


def test_unknown_section_is_ignored_for_prediction():
    settings = Settings.read({"elsewhere": {"a": 1}}, (ScheduleSettings,), strict=False)
    assert settings.to_block()["elsewhere"] == {"a": 1}
    with pytest.raises(SettingsError, match="unknown setting 'elsewhere'"):
        Settings.read({"elsewhere": {"a": 1}}, (ScheduleSettings,))


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_renamed_keys_are_translated(old, new):
    (section, key), (new_section, new_key) = old.split("."), new.split(".")
    value = known_sections()[new_section]().to_dict()[new_key]
    value = value if isinstance(value, str) else 0.25
    written = read({section: {key: value}}).to_block()
    assert written[new_section][new_key] == value and key not in written[section]
    assert read_assignment(f"{old}={value}") == (new_section, new_key, value)


def test_new_name_wins_over_the_old_one():
    settings = read({"distillation": {"kl": 1.0}, "mstkd": {"kl": 2.0}})
    assert settings[MSTKDSettings].kl == 2.0


def test_values_given_in_python_are_checked_too():
    with pytest.raises(SettingsError, match=r"setting mstkd\.kl is -1, expected a number at least 0"):
        MSTKDSettings(kl=-1)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"shedule": {}}, r"unknown setting 'shedule' in 'mstkd' \(did you mean 'schedule'\?\)"),
        ({"augmentation": {}}, "allowed are sampler, schedule, distillation, teacher"),
        ({"schedule": {"epoch": 3}}, r"unknown setting 'epoch' in 'schedule' \(did you mean 'epochs'\?\)"),
        ({"mstkd": {"zzz": 3}}, "allowed are recipe, evd, maps, discrepancy, kl, style, adversarial"),
    ],
)
def test_unknown_key_lists_the_allowed_ones(block, message):
    with pytest.raises(SettingsError, match=message):
        read(block)


def test_a_hint_is_only_given_where_something_is_close():
    with pytest.raises(SettingsError) as error:
        read({"schedule": {"qqq": 3}})
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("schedule", "epochs", 0),
        ("schedule", "iterations", -1),
        ("schedule", "validation_iterations", 0),
        ("schedule", "save_every", 0),
        ("schedule", "seed", -1),
        ("schedule", "seed", 2**31),
        ("schedule", "optimizer", "lion"),
        ("schedule", "initial_lr", 0),
        ("schedule", "initial_lr", 1.5),
        ("schedule", "added_lr", -1e-4),
        ("sampler", "kind", "random"),
        ("sampler", "kind", "fixed"),
        ("sampler", "kind", "weighted"),
        ("sampler", "subsets", ["T1"]),
        ("sampler", "weights", {"T1": 1}),
        ("sampler", "drop", {"T1": 0.5}),
        ("sampler", "drop", {"T1": 1.5}),
        ("sampler", "keep", ["T1"]),
        ("network", "depth", 0),
        ("network", "heads", 0),
        ("network", "taps", 1),
        ("network", "patch", [2, 0, 2]),
        ("network", "max_tokens", 7),
        ("network", "mlp_ratio", 0),
        ("network", "mlp_ratio", 17),
        ("mstkd", "recipe", "nature"),
        ("mstkd", "kl", -0.1),
        ("mstkd", "tau", 0),
        ("distillation", "ramp", 1.1),
        ("distillation", "fade", -0.1),
        ("distillation", "where", "somewhere"),
        ("mstkd", "style_encoder", "none"),
        ("teacher", "epochs", 0),
    ],
)
def test_an_impossible_value_is_refused_by_name(section, key, value):
    with pytest.raises(SettingsError) as error:
        read({section: {key: value}})
    message = str(error.value)
    assert message.startswith(f"setting {section}.")
    assert "expected" in message
    assert "\n" not in message


def test_message_says_found_and_expected():
    with pytest.raises(SettingsError) as error:
        read({"schedule": {"optimizer": "lion"}})
    assert str(error.value) == "setting schedule.optimizer is 'lion', expected one of sgd, adamw, adam"


def test_depth_and_taps_have_to_agree():
    with pytest.raises(SettingsError, match=r"network.depth is 6, expected a multiple of taps \(4\)"):
        read({"network": {"depth": 6, "taps": 4}})
    assert read({"network": {"depth": 8, "taps": 4}})[NetworkSettings].depth == 8


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("schedule", "epochs", 5.0, "an integer"),
        ("schedule", "epochs", True, "an integer"),
        ("schedule", "epochs", "5", "an integer"),
        ("schedule", "epochs", None, "an integer"),
        ("schedule", "optimizer", 3, "one of sgd"),
        ("teacher", "configuration", 3, "a string"),
        ("schedule", "initial_lr", "fast", "a finite number"),
        ("mstkd", "kl", math.nan, "a finite number"),
        ("mstkd", "kl", math.inf, "a finite number"),
        ("mstkd", "kl", True, "a finite number"),
        ("teacher", "warm_start", 1, "true or false"),
        ("network", "patch", 2, "a list"),
        ("network", "patch", [2.5, 2, 2], "an integer"),
        ("sampler", "subsets", "T1", "a list"),
        ("sampler", "weights", ["T1"], "a mapping"),
        ("sampler", "weights", {"T1": "much"}, "a finite number"),
    ],
)
def test_a_value_of_another_type_is_refused(section, key, value, expected):
    with pytest.raises(SettingsError, match=rf"{section}\.{key}.*expected {expected}"):
        read({section: {key: value}})


@pytest.mark.parametrize("block", [[], "fast", 3])
def test_a_block_that_is_no_table_is_refused(block):
    with pytest.raises(SettingsError, match="a mapping of sections"):
        read(block)


@pytest.mark.parametrize("section", [None, [], "short"])
def test_a_section_that_is_no_table_is_refused(section):
    with pytest.raises(SettingsError, match="a mapping of settings"):
        read({"schedule": section})


def test_whole_numbers_serve_as_fractions_and_null_as_derived():
    settings = read({"mstkd": {"kl": 1}, "schedule": {"initial_lr": None, "seed": None}})
    assert settings[MSTKDSettings].kl == 1.0
    assert isinstance(settings[MSTKDSettings].kl, float)
    assert settings[ScheduleSettings].learning_rate == 1e-2


# ---- recipes -------------------------------------------------------------------------------------------------------


def test_paper_recipe_sets_weights_and_adam():
    settings = read({"mstkd": {"recipe": "paper"}})
    for name, values in MSTKDSettings.PRESETS["paper"].items():
        for key, value in values.items():
            assert settings.to_block()[name][key] == value
    assert settings[MSTKDSettings].form == "published"
    schedule = settings[ScheduleSettings]
    assert (schedule.optimizer, schedule.learning_rate, schedule.weight_decay) == ("adam", 1e-4, 1e-5)


def test_keys_beside_a_recipe_win():
    block = {"mstkd": {"recipe": "paper", "kl": 3}, "distillation": {"fade": 0.25}, "schedule": {"optimizer": "sgd"}}
    settings = read(block)
    assert (settings[MSTKDSettings].kl, settings[MSTKDSettings].discrepancy) == (3, 10)
    assert settings[DistillationSettings].fade == 0.25
    assert settings[ScheduleSettings].optimizer == "sgd"


def test_old_block_with_a_recipe_reads_the_same():
    settings = read({"distillation": {"recipe": "paper", "kl": 3, "fade": 0.25}})
    assert (settings[MSTKDSettings].kl, settings[MSTKDSettings].discrepancy) == (3, 10)
    assert (settings[DistillationSettings].fade, settings[DistillationSettings].where) == (0.25, "everywhere")


def test_written_recipe_reads_back_unchanged():
    settings = read({"mstkd": {"recipe": "paper", "evd": 0.1}, "schedule": {"optimizer": "sgd"}})
    again = read(settings.to_block())
    assert again.to_block() == settings.to_block()
    assert again[MSTKDSettings].evd == MSTKDSettings().evd == 0.1


def test_what_a_recipe_does_not_set_or_sets_for_others_is_said():
    assert read({"mstkd": {"recipe": "paper"}}).remarks() == read({"mstkd": {"kl": 2}}).remarks() == []
    by_hand = read({**read({}).to_block(), "mstkd": {**MSTKDSettings().to_dict(), "recipe": "paper"}})
    (line,) = by_hand.remarks()
    assert line.startswith('mstkd.recipe=paper, but the plans say mstkd.form="relative", mstkd.evd=0.1, ')
    assert 'schedule.optimizer="sgd"' in line and "teacher.joint=false" in line
    block = {"mstkd": {"recipe": "paper"}, "sampler": {"per_batch": False}}
    other = Settings.read(block, (ScheduleSettings, SamplerSettings))
    assert other.remarks() == [
        'mstkd.recipe=paper of the plans also sets schedule.optimizer="adam", schedule.weight_decay=1e-05'
    ]
    assert "(mstkd.recipe=paper sets it; " in other.set_by("schedule", "optimizer")
    assert other.set_by("sampler", "per_batch") == other.set_by("schedule", "seed") == ""


def test_numbers_to_choose_from_are_named():
    assert _typed("own.k", 4, Literal[2, 4]) == 4
    with pytest.raises(SettingsError, match=r"own\.k is 3, expected one of 2, 4"):
        _typed("own.k", 3, Literal[2, 4])


# ---- classes of sections -------------------------------------------------------------------------------------------

decorated = dataclass(frozen=True, kw_only=True)


class Undecorated(Section):
    NAME: ClassVar[str] = "undecorated"

    weight: float = 1.0


@decorated
class Unannotated(Section):
    NAME: ClassVar[str] = "unannotated"

    weight = 1.0


@decorated
class Nameless(Section):
    weight: float = 1.0


@decorated
class NameAsKey(Section):
    NAME: str = "name_as_key"

    weight: float = 1.0


@decorated
class NoDefault(Section):
    NAME: ClassVar[str] = "no_default"

    weight: float


@decorated
class Unreadable(Section):
    NAME: ClassVar[str] = "unreadable"

    weight: Wieght = 1.0  # noqa: F821


@dataclass(frozen=True, kw_only=True)
class Forgotten(DistillationSettings):
    NAME: ClassVar[str] = "forgotten"

    ramp = 0.5  # the instance would have the 0.1 of the base


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        (Undecorated, "Undecorated needs @dataclass"),
        (Unannotated, "Unannotated needs .* annotated keys"),
        (Nameless, "Nameless needs a name"),
        (NameAsKey, "NameAsKey needs a name"),
        (Forgotten, "Forgotten has the key ramp without an annotation"),
        (NoDefault, "NoDefault gives weight no default"),
        (Unreadable, "Unreadable has an annotation that cannot be read: .*Wieght"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_badly_written_section_is_refused_by_name(section, problem):
    with pytest.raises(TypeError, match=problem):
        Settings.read(None, (section,))
    assert section not in known_sections().values()


@pytest.mark.parametrize(
    "hint", [list[float], Path, dict, Any, float | str, tuple[int, int], Mapping[int, float]], ids=str
)
def test_other_annotations_are_refused_by_name(hint):
    content = {"NAME": "own", "__annotations__": {"k": hint}, "k": None}
    with pytest.raises(TypeError, match=r"Own annotates k with .*, expected one of bool, int"):
        Settings.read(None, (decorated(type("Own", (Section,), content)),))


@pytest.mark.parametrize("hint", [float | None, None | float, Optional[float]], ids=str)  # noqa: UP045
def test_null_may_be_named_first(hint):
    assert (_typed("own.k", None, hint), _typed("own.k", 1, hint)) == (None, 1.0)


def test_a_section_that_the_trainer_does_not_list_is_named():
    with pytest.raises(LookupError, match="MSTKDSettings is not read here"):
        Settings.read(None, (ScheduleSettings,))[MSTKDSettings]


# ---- assignments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("schedule.epochs=100", ("schedule", "epochs", 100)),
        ("schedule.initial_lr = 1e-3", ("schedule", "initial_lr", 1e-3)),
        ("schedule.seed=null", ("schedule", "seed", None)),
        ("teacher.warm_start=false", ("teacher", "warm_start", False)),
        ("teacher.configuration=3d_fullres", ("teacher", "configuration", "3d_fullres")),
        ("sampler.kind=by_size", ("sampler", "kind", "by_size")),
        ('sampler.subsets=["T1", "T1+FLAIR"]', ("sampler", "subsets", ["T1", "T1+FLAIR"])),
        ('sampler.weights={"T1": 2}', ("sampler", "weights", {"T1": 2})),
        ("schedule.init_from=a=b.pth", ("schedule", "init_from", "a=b.pth")),
    ],
)
def test_an_assignment_is_read_as_json_or_else_as_text(text, expected):
    assert read_assignment(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schedule.epochs", "not of the form section.key=value"),
        ("epochs=3", "not of the form section.key=value"),
        ("schedul.epochs=3", "did you mean 'schedule'"),
        ("schedule.epoch=3", "did you mean 'epochs'"),
        ("schedule.=3", "unknown setting ''"),
    ],
)
def test_an_assignment_to_nothing_known_is_refused(text, message):
    with pytest.raises(SettingsError, match=message):
        read_assignment(text)


# ---- sections ------------------------------------------------------------------------------------------------------


def test_sampler_section_builds_the_sampler():
    assert SamplerSettings().build(NAMES) == SubsetSampler(3)
    assert SamplerSettings(kind="by_size").build(NAMES) == SubsetSampler(3, "by_size")
    fixed = SamplerSettings(kind="fixed", subsets=("T1", "FLAIR+T1ce")).build(NAMES)
    assert fixed == SubsetSampler(3, "fixed", ((True, False, False), (False, True, True)))
    weighted = SamplerSettings(kind="weighted", weights={"FLAIR": 2, "all": 1}).build(NAMES)
    assert weighted == SubsetSampler(3, "weighted", ((False, False, True), (True, True, True)), (2.0, 1.0))
    independent = SamplerSettings(kind="independent", drop={"flair": 0.25}, keep=["T1"]).build(NAMES)
    assert independent == SubsetSampler(3, "independent", drop=(0.0, 0.5, 0.25))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drop": {"T2": 0.5}}, "unknown modality 'T2' in sampler.drop or keep; known are T1, T1ce, FLAIR"),
        ({"keep": ["T1+FLAIR"]}, r"unknown modality 'T1\+FLAIR'"),
        ({"drop": {"T1": 0.5, "t1": 0.4}}, "appears twice"),
        ({"drop": {"T1": 0.5}, "keep": ["T1"]}, "appears twice"),
        ({"drop": {"T1": 1, "T1ce": 1, "FLAIR": 1}}, "at least one must be available"),
    ],
)
def test_independent_sampler_refuses_what_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplerSettings(kind="independent", **settings).build(NAMES)


def test_sampler_section_refuses_bad_subsets():
    with pytest.raises(ValueError, match=r"unknown modality 'T2'.*known are T1, T1ce, FLAIR"):
        SamplerSettings(kind="fixed", subsets=("T2",)).build(NAMES)
    with pytest.raises(ValueError, match="positive and finite"):
        SamplerSettings(kind="weighted", weights={"T1": -1}).build(NAMES)


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 1e-2), ("adamw", 1e-3), ("adam", 1e-4)])
def test_each_optimiser_has_its_own_rate_and_a_given_one_wins(optimizer, rate):
    assert ScheduleSettings(optimizer=optimizer).learning_rate == rate
    assert ScheduleSettings(optimizer=optimizer, initial_lr=0.5).learning_rate == 0.5


@pytest.mark.parametrize(("epochs", "interval"), [(1000, 50), (2000, 50), (200, 10), (20, 1), (5, 1), (39, 1), (40, 2)])
def test_checkpoint_interval(epochs, interval):
    assert ScheduleSettings().checkpoint_interval(epochs) == interval
    assert ScheduleSettings(save_every=7).checkpoint_interval(epochs) == 7


def test_replace_changes_one_section_and_checks_it():
    settings = read(None).replace(ScheduleSettings, epochs=3)
    assert settings[ScheduleSettings].epochs == 3
    assert settings[TeacherSettings] == TeacherSettings()
    with pytest.raises(SettingsError):
        settings.replace(ScheduleSettings, epochs=0)


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ScheduleSettings().epochs = 3
