from __future__ import annotations

import dataclasses
import json
import math

import pytest

from nnunetv2_mstkd.modalities import SubsetSampler
from nnunetv2_mstkd.training.settings import (
    RECIPES,
    SECTIONS,
    DistillationSettings,
    SamplerSettings,
    ScheduleSettings,
    Settings,
    SettingsError,
    read_assignment,
)

NAMES = ("T1", "T1ce", "FLAIR")


def test_no_block_and_an_empty_block_are_the_defaults():
    assert Settings.from_block(None) == Settings.from_block({}) == Settings()


def test_the_default_schedule_is_that_of_nnunet():
    schedule = Settings().schedule
    assert (schedule.epochs, schedule.iterations, schedule.validation_iterations) == (1000, 250, 50)
    assert (schedule.optimizer, schedule.learning_rate) == ("sgd", 1e-2)
    assert schedule.checkpoint_interval(schedule.epochs) == 50


def test_a_block_is_complete_and_survives_json():
    block = {
        "sampler": {"kind": "weighted", "weights": {"T1": 1, "T1+FLAIR": 2.5}},
        "schedule": {"epochs": 7, "seed": 3, "optimizer": "adamw", "init_from": "FullModalityTrainer"},
        "network": {"depth": 6, "taps": 3, "patch": [2, 2, 1]},
        "distillation": {"kl": 3, "where": "everywhere"},
        "teacher": {"warm_start": False, "epochs": 9},
    }
    settings = Settings.from_block(block)
    written = settings.to_block()
    assert list(written) == list(SECTIONS)
    for name, section in SECTIONS.items():
        assert list(written[name]) == [field.name for field in dataclasses.fields(section)]
    assert json.loads(json.dumps(written)) == written
    assert Settings.from_block(json.loads(json.dumps(written))) == settings
    assert settings.network.patch == (2, 2, 1)
    assert settings.schedule.epochs == 7


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"shedule": {}}, r"unknown setting 'shedule' in 'mstkd' \(did you mean 'schedule'\?\)"),
        ({"augmentation": {}}, "allowed are sampler, schedule, network, distillation, teacher"),
        ({"schedule": {"epoch": 3}}, r"unknown setting 'epoch' in 'schedule' \(did you mean 'epochs'\?\)"),
        ({"distillation": {"zzz": 3}}, "allowed are recipe, evd, maps, discrepancy, kl, style, adversarial"),
    ],
)
def test_an_unknown_section_or_key_is_named_with_the_allowed_ones(block, message):
    with pytest.raises(SettingsError, match=message):
        Settings.from_block(block)


def test_a_hint_is_only_given_where_something_is_close():
    with pytest.raises(SettingsError) as error:
        Settings.from_block({"schedule": {"qqq": 3}})
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
        ("network", "depth", 0),
        ("network", "heads", 0),
        ("network", "taps", 1),
        ("network", "patch", [2, 0, 2]),
        ("network", "max_tokens", 7),
        ("network", "mlp_ratio", 0),
        ("network", "mlp_ratio", 17),
        ("distillation", "recipe", "nature"),
        ("distillation", "kl", -0.1),
        ("distillation", "tau", 0),
        ("distillation", "ramp", 1.1),
        ("distillation", "fade", -0.1),
        ("distillation", "where", "somewhere"),
        ("distillation", "style_encoder", "none"),
        ("teacher", "epochs", 0),
    ],
)
def test_an_impossible_value_is_refused_by_name(section, key, value):
    with pytest.raises(SettingsError) as error:
        Settings.from_block({section: {key: value}})
    message = str(error.value)
    assert message.startswith(f"setting {section}.")
    assert "expected" in message
    assert "\n" not in message


def test_the_message_of_an_impossible_value_says_what_was_found_and_expected():
    with pytest.raises(SettingsError) as error:
        Settings.from_block({"schedule": {"optimizer": "lion"}})
    assert str(error.value) == "setting schedule.optimizer is 'lion', expected one of sgd, adamw, adam"


def test_depth_and_taps_have_to_agree():
    with pytest.raises(SettingsError, match=r"network.depth is 6, expected a multiple of taps \(4\)"):
        Settings.from_block({"network": {"depth": 6, "taps": 4}})
    assert Settings.from_block({"network": {"depth": 8, "taps": 4}}).network.depth == 8


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("schedule", "epochs", 5.0, "a whole number"),
        ("schedule", "epochs", True, "a whole number"),
        ("schedule", "epochs", "5", "a whole number"),
        ("schedule", "epochs", None, "a whole number"),
        ("schedule", "optimizer", 3, "a text"),
        ("schedule", "initial_lr", "fast", "a finite number"),
        ("distillation", "kl", math.nan, "a finite number"),
        ("distillation", "kl", math.inf, "a finite number"),
        ("distillation", "kl", True, "a finite number"),
        ("teacher", "warm_start", 1, "true or false"),
        ("network", "patch", 2, "a list"),
        ("network", "patch", [2.5, 2, 2], "a whole number"),
        ("sampler", "subsets", "T1", "a list"),
        ("sampler", "weights", ["T1"], "a table"),
        ("sampler", "weights", {"T1": "much"}, "a finite number"),
    ],
)
def test_a_value_of_another_type_is_refused(section, key, value, expected):
    with pytest.raises(SettingsError, match=rf"{section}\.{key}.*expected {expected}"):
        Settings.from_block({section: {key: value}})


@pytest.mark.parametrize("block", [[], "fast", 3])
def test_a_block_that_is_no_table_is_refused(block):
    with pytest.raises(SettingsError, match="a table of sections"):
        Settings.from_block(block)


@pytest.mark.parametrize("section", [None, [], "short"])
def test_a_section_that_is_no_table_is_refused(section):
    with pytest.raises(SettingsError, match="a table of settings"):
        Settings.from_block({"schedule": section})


def test_whole_numbers_serve_as_fractions_and_null_as_derived():
    settings = Settings.from_block({"distillation": {"kl": 1}, "schedule": {"initial_lr": None, "seed": None}})
    assert settings.distillation.kl == 1.0
    assert isinstance(settings.distillation.kl, float)
    assert settings.schedule.learning_rate == 1e-2


# ---- recipes -------------------------------------------------------------------------------------------------------


def test_the_recipe_of_the_paper_sets_its_weights_and_adam_for_everything():
    settings = Settings.from_block({"distillation": {"recipe": "paper"}})
    for key, value in RECIPES["paper"].items():
        assert getattr(settings.distillation, key) == value
    assert settings.distillation.tau == DistillationSettings().tau
    assert (settings.schedule.optimizer, settings.schedule.learning_rate) == ("adam", 1e-4)


def test_keys_given_beside_a_recipe_win():
    settings = Settings.from_block(
        {"distillation": {"recipe": "paper", "kl": 3, "fade": 0.25}, "schedule": {"optimizer": "sgd"}}
    )
    assert (settings.distillation.kl, settings.distillation.fade, settings.distillation.discrepancy) == (3, 0.25, 10)
    assert settings.schedule.optimizer == "sgd"


def test_a_written_recipe_reads_back_unchanged_even_where_a_key_has_the_default_again():
    settings = Settings.from_block({"distillation": {"recipe": "paper", "evd": 0.1}, "schedule": {"optimizer": "sgd"}})
    again = Settings.from_block(settings.to_block())
    assert again == settings
    assert again.distillation.evd == DistillationSettings().evd == 0.1


def test_every_recipe_names_only_settings_that_exist():
    for name in RECIPES:
        assert Settings.from_block({"distillation": {"recipe": name}}).distillation.recipe == name


def test_weights_lists_the_terms_above_zero_only():
    settings = DistillationSettings(evd=0, maps=0, discrepancy=0, kl=2, style=0, adversarial=0.5)
    assert settings.weights == {"kl": 2.0, "adversarial": 0.5}


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


def test_the_sampler_section_builds_the_sampler_of_these_modalities():
    assert SamplerSettings().build(NAMES) == SubsetSampler(3)
    assert SamplerSettings(kind="by_size").build(NAMES) == SubsetSampler(3, "by_size")
    fixed = SamplerSettings(kind="fixed", subsets=("T1", "FLAIR+T1ce")).build(NAMES)
    assert fixed == SubsetSampler(3, "fixed", ((True, False, False), (False, True, True)))
    weighted = SamplerSettings(kind="weighted", weights={"FLAIR": 2, "all": 1}).build(NAMES)
    assert weighted == SubsetSampler(3, "weighted", ((False, False, True), (True, True, True)), (2.0, 1.0))


def test_the_sampler_section_refuses_unknown_modalities_and_weights_that_are_not_positive():
    with pytest.raises(ValueError, match=r"unknown modality 'T2'.*known are T1, T1ce, FLAIR"):
        SamplerSettings(kind="fixed", subsets=("T2",)).build(NAMES)
    with pytest.raises(ValueError, match="positive and finite"):
        SamplerSettings(kind="weighted", weights={"T1": -1}).build(NAMES)


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 1e-2), ("adamw", 1e-3), ("adam", 1e-4)])
def test_each_optimiser_has_its_own_rate_and_a_given_one_wins(optimizer, rate):
    assert ScheduleSettings(optimizer=optimizer).learning_rate == rate
    assert ScheduleSettings(optimizer=optimizer, initial_lr=0.5).learning_rate == 0.5


@pytest.mark.parametrize(("epochs", "interval"), [(1000, 50), (2000, 50), (200, 10), (20, 1), (5, 1), (39, 1), (40, 2)])
def test_checkpoints_come_every_twentieth_of_a_training_and_at_least_every_fiftieth_epoch(epochs, interval):
    assert ScheduleSettings().checkpoint_interval(epochs) == interval
    assert ScheduleSettings(save_every=7).checkpoint_interval(epochs) == 7


def test_replace_changes_one_section_and_checks_it():
    settings = Settings().replace("schedule", epochs=3)
    assert settings.schedule.epochs == 3
    assert Settings().schedule.epochs == 1000
    with pytest.raises(SettingsError):
        settings.replace("schedule", epochs=0)


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().schedule.epochs = 3
