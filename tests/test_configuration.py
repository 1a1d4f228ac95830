from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import hand_plans
import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_mstkd import cli
from nnunetv2_mstkd.commands.configure import affected, describe
from nnunetv2_mstkd.methods.configuration import complete_block, configure
from nnunetv2_mstkd.nnunet.plans import read_plans, write_configuration

NAME = "3d_fullres_short"


def resolved(plans: dict, name: str, entry: dict) -> dict:
    """The configuration as nnU-Net reads it once the entry is in the plans."""
    plans = {**plans, "configurations": {**plans["configurations"], name: entry}}
    return PlansManager(copy.deepcopy(plans)).get_configuration(name).configuration


def block(*assignments: tuple[str, str, object], plans: dict | None = None, parent: str = "3d_fullres") -> dict:
    return configure(plans or hand_plans.plans(), parent, "other", assignments=assignments)["mstkd"]


def output_shape(configuration: dict) -> list[int]:
    """Shape of the plans' network's output on its own patch; on the meta device, which computes nothing."""
    network = configuration["architecture"]
    with torch.device("meta"):
        module = get_network_from_plans(
            network["network_class_name"],
            network["arch_kwargs"],
            network["_kw_requires_import"],
            3,
            4,
            allow_init=False,
            deep_supervision=False,
        )
        return list(module(torch.empty(1, 3, *configuration["patch_size"])).shape)


# ---- the block -----------------------------------------------------------------------------------------------------


def test_new_configuration_inherits_and_adds_block():
    plans = hand_plans.plans()
    entry = configure(plans, "3d_fullres", NAME, assignments=[("schedule", "epochs", 5)])
    assert set(entry) == {"inherits_from", "mstkd"}
    assert entry["inherits_from"] == "3d_fullres"
    assert complete_block(entry["mstkd"]) == complete_block({"schedule": {"epochs": 5}})
    found = resolved(plans, NAME, entry)
    assert found.pop("mstkd") == entry["mstkd"]
    assert found.pop("inherits_from") == "3d_fullres"
    assert found == plans["configurations"]["3d_fullres"]


def test_the_given_plans_are_left_alone():
    plans = hand_plans.plans()
    before = copy.deepcopy(plans)
    epochs = [("schedule", "epochs", 5)]
    configure(plans, "3d_fullres", NAME, assignments=epochs, features=[8, 16, 24], patch_size=[32] * 3)
    assert plans == before


def test_block_is_inherited_over_generations():
    plans = hand_plans.plans()
    plans["configurations"]["a"] = configure(plans, "3d_fullres", "a", assignments=[("schedule", "epochs", 5)])
    plans["configurations"]["b"] = configure(plans, "a", "b", assignments=[("mstkd", "kl", 3)])
    entry = configure(plans, "b", "c", assignments=[("schedule", "seed", 1)], batch_size=7)
    assert entry["mstkd"]["schedule"]["epochs"] == 5
    assert entry["mstkd"]["mstkd"]["kl"] == 3
    assert entry["mstkd"]["schedule"]["seed"] == 1
    assert resolved(plans, "c", entry)["batch_size"] == 7


def test_partial_block_is_completed():
    plans = hand_plans.plans()
    plans["configurations"]["3d_fullres"]["mstkd"] = {"schedule": {"epochs": 5}}
    found = block(plans=plans)
    assert (found["schedule"]["epochs"], found["schedule"]["iterations"]) == (5, 250)


ASSIGNMENTS = [("mstkd", "recipe", "paper"), ("mstkd", "kl", 3), ("schedule", "epochs", 4)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_assignments_override_recipe_in_any_order(order):
    found = block(*(ASSIGNMENTS[index] for index in order))
    assert found["mstkd"] == {**complete_block({"mstkd": {"recipe": "paper"}})["mstkd"], "kl": 3}
    assert (found["schedule"]["optimizer"], found["schedule"]["epochs"]) == ("adam", 4)


@pytest.mark.parametrize("reverse", [False, True])
def test_optimiser_overrides_recipe(reverse):
    assignments = [("mstkd", "recipe", "paper"), ("schedule", "optimizer", "adamw")]
    assert block(*(assignments[::-1] if reverse else assignments))["schedule"]["optimizer"] == "adamw"


def test_recipe_replaces_distillation_and_optimiser():
    plans = hand_plans.plans()
    plans["configurations"]["3d_fullres"]["mstkd"] = {
        "distillation": {"kl": 3, "tau": 5},
        "schedule": {"optimizer": "adamw", "epochs": 4},
        "teacher": {"epochs": 9},
    }
    found = block(("mstkd", "recipe", "paper"), plans=plans)
    assert (found["mstkd"]["kl"], found["mstkd"]["tau"]) == (1, 7)
    assert (found["schedule"]["optimizer"], found["schedule"]["epochs"]) == ("adam", 4)
    assert found["teacher"]["epochs"] == 9


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_a_recipe_that_the_parent_has_already_changes_nothing(recipe):
    plans = hand_plans.plans()
    own = [("mstkd", "recipe", recipe), ("schedule", "optimizer", "adamw"), ("mstkd", "evd", 0.5)]
    plans["configurations"]["parent"] = configure(plans, "3d_fullres", "parent", assignments=own)
    before = block(plans=plans, parent="parent")
    assert block(("mstkd", "recipe", recipe), plans=plans, parent="parent") == before
    assert (before["schedule"]["optimizer"], before["mstkd"]["evd"]) == ("adamw", 0.5)


def test_default_recipe_undoes_paper_recipe():
    plans = hand_plans.plans()
    plans["configurations"]["paper"] = configure(
        plans, "3d_fullres", "paper", assignments=[("mstkd", "recipe", "paper")]
    )
    assert block(plans=plans, parent="paper")["schedule"]["optimizer"] == "adam"
    assert block(("mstkd", "recipe", "default"), plans=plans, parent="paper")["schedule"]["optimizer"] == "sgd"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (("schedule", "epochs", 0), r"schedule.epochs is 0"),
        (("mstkd", "recipe", "nature"), "one of default, paper"),
        (("sampler", "kind", "fixed"), "sampler.subsets"),
        (("network", "heads", 7), "network.heads is 7, expected a divisor of the bottleneck width 320"),
        (("network", "taps", 6), "network.taps is 6, expected at most the 5 stages"),
        (("network", "patch", [2, 2]), r"network.patch is \[2, 2\], expected 3 edges"),
        (("network", "patch", [5, 1, 1]), r"at most those of the bottleneck grid, \[4, 4, 4\]"),
        (("network", "depth", 5), r"expected a multiple of taps \(4\)"),
    ],
)
def test_impossible_settings_are_refused(assignment, message):
    with pytest.raises(ValueError, match=message):
        block(assignment)


def test_network_settings_are_checked_against_the_new_widths():
    plans = hand_plans.plans()
    settings = [("network", "heads", 5)]
    assert configure(plans, "3d_fullres", NAME, assignments=settings)["mstkd"]["network"]["heads"] == 5
    with pytest.raises(ValueError, match="expected a divisor of the bottleneck width 64"):
        configure(plans, "3d_fullres", NAME, assignments=settings, features=[8, 16, 32, 64, 64])


# ---- names and parents ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"])
def test_a_standard_configuration_is_never_written(name):
    with pytest.raises(ValueError, match="nnU-Net's own configuration"):
        configure(hand_plans.plans(), "3d_fullres", name)


@pytest.mark.parametrize("name", ["", "a__b", "a b", "a/b", "..", "_a", "a_", "-a", "a.b", "ä", "a\n"])
def test_a_name_that_would_break_folder_names_is_refused(name):
    with pytest.raises(ValueError, match="part of a folder name"):
        configure(hand_plans.plans(), "3d_fullres", name)


def test_an_unknown_parent_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no configuration '3d'; there are 2d, 3d_lowres, 3d_fullres"):
        configure(hand_plans.plans(), "3d", NAME)


def test_the_second_stage_of_a_cascade_is_refused():
    with pytest.raises(ValueError, match="second stage of a cascade"):
        configure(hand_plans.plans(), "3d_cascade_fullres", NAME)


def test_no_circular_inheritance():
    plans = hand_plans.plans()
    plans["configurations"]["a"] = configure(plans, "3d_fullres", "a")
    plans["configurations"]["b"] = configure(plans, "a", "b")
    for parent in ("a", "b"):
        with pytest.raises(ValueError, match=f"a cannot inherit from {parent}"):
            configure(plans, parent, "a")


# ---- widths and patch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "resenc"])
def test_other_widths_keep_the_geometry(residual):
    plans = hand_plans.plans(residual=residual)
    entry = configure(plans, "3d_fullres", NAME, features=[8, 16, 32, 64, 80])
    kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert entry["architecture"]["arch_kwargs"] == {**kwargs, "features_per_stage": [8, 16, 32, 64, 80]}
    assert entry["patch_size"] == [64, 64, 64]
    assert output_shape(resolved(plans, NAME, entry)) == [1, 4, 64, 64, 64]


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "resenc"])
@pytest.mark.parametrize(
    ("parent", "patch", "expected_patch", "stages", "deepest"),
    [
        ("3d_fullres", [32, 32, 32], [32, 32, 32], 4, [4, 4, 4]),
        ("3d_fullres", [40, 48, 40], [40, 48, 40], 4, [5, 6, 5]),
        ("3d_fullres", [50, 50, 50], [56, 56, 56], 4, [7, 7, 7]),
        ("3d_fullres", [128, 128, 128], [128, 128, 128], 6, [4, 4, 4]),
        ("2d", [64, 48], [64, 48], 4, [8, 6]),
    ],
)
def test_patch_changes_topology_by_nnunet_rule(residual, parent, patch, expected_patch, stages, deepest):
    plans = hand_plans.plans(residual=residual)
    entry = configure(plans, parent, "other", patch_size=patch)
    kwargs = entry["architecture"]["arch_kwargs"]
    widths = plans["configurations"][parent]["architecture"]["arch_kwargs"]["features_per_stage"]
    dimensions = len(patch)
    assert entry["patch_size"] == expected_patch
    assert kwargs["n_stages"] == stages
    assert kwargs["strides"] == [[1] * dimensions] + [[2] * dimensions] * (stages - 1)
    assert [edge // 2 ** (stages - 1) for edge in expected_patch] == deepest
    assert kwargs["kernel_sizes"] == [[3] * dimensions] * stages
    assert kwargs["features_per_stage"] == (widths + [widths[-1]] * stages)[:stages]
    assert len(kwargs["n_blocks_per_stage" if residual else "n_conv_per_stage"]) == stages
    assert len(kwargs["n_conv_per_stage_decoder"]) == stages - 1
    assert output_shape(resolved(plans, "other", entry)) == [1, 4, *expected_patch]


def test_thick_slices_are_pooled_late_as_nnunet_does():
    plans = hand_plans.plans()
    entry = configure(plans, "3d_thin", "other", patch_size=[16, 64, 64])
    kwargs = entry["architecture"]["arch_kwargs"]
    assert kwargs["strides"] == [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]]
    assert kwargs["kernel_sizes"] == [[1, 3, 3], *[[3, 3, 3]] * 4]
    assert output_shape(resolved(plans, "other", entry)) == [1, 4, 16, 64, 64]


@pytest.mark.parametrize("widths", [[8, 16, 32], [8, 16, 32, 64]])
def test_fewer_widths_give_fewer_stages(widths):
    plans = hand_plans.plans()
    entry = configure(plans, "3d_thin", "other", features=widths, patch_size=[16, 64, 64])
    kwargs = entry["architecture"]["arch_kwargs"]
    assert kwargs["features_per_stage"] == widths
    assert kwargs["strides"] == [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]][: len(widths)]
    assert kwargs["kernel_sizes"] == [[1, 3, 3], *[[3, 3, 3]] * (len(widths) - 1)]
    assert output_shape(resolved(plans, "other", entry)) == [1, 4, 16, 64, 64]


def test_deepest_stage_has_full_kernels():
    plans = hand_plans.plans()
    plans["configurations"]["3d_thin"]["spacing"] = [10.0, 1.0, 1.0]
    entry = configure(plans, "3d_thin", "other", features=[8, 16, 32], patch_size=[16, 64, 64])
    assert entry["architecture"]["arch_kwargs"]["kernel_sizes"] == [[1, 3, 3], [1, 3, 3], [3, 3, 3]]
    entry = configure(plans, "3d_thin", "other", features=[8, 16, 32, 48], patch_size=[16, 64, 64])
    assert entry["architecture"]["arch_kwargs"]["kernel_sizes"] == [[1, 3, 3], [1, 3, 3], [1, 3, 3], [3, 3, 3]]


def test_a_planned_patch_that_is_thin_may_get_other_widths():
    plans = hand_plans.plans()
    entry = configure(plans, "3d_thin", "other", features=[8, 16, 32, 48])
    assert entry["patch_size"] == [6, 64, 64]
    assert output_shape(resolved(plans, "other", entry)) == [1, 4, 6, 64, 64]


def test_one_width_more_needs_a_patch_that_permits_it():
    plans = hand_plans.plans()
    with pytest.raises(ValueError, match=r"6 stages do not fit a patch of \[64, 64, 64\]: nnU-Net's rule allows 5"):
        configure(plans, "3d_fullres", NAME, features=[8] * 6)
    entry = configure(plans, "3d_fullres", NAME, features=[8] * 6, patch_size=[128] * 3)
    assert entry["architecture"]["arch_kwargs"]["n_stages"] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": [64, 64]}, "has 2 edges, expected 3"),
        ({"patch_size": [4, 4, 4]}, "3 stages do not fit"),
        ({"patch_size": [0, 64, 64]}, "edge below 1"),
        ({"features": [8, 16]}, "at least 3 stages of at least 4 channels"),
        ({"features": [8, 16, 32, 64, 3]}, "at least 3 stages of at least 4 channels"),
        ({"batch_size": 0}, "batch size is 0"),
    ],
)
def test_an_impossible_geometry_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        configure(hand_plans.plans(), "3d_fullres", NAME, **options)


def test_describe_lists_differences():
    entry = configure(
        hand_plans.plans(), "3d_fullres", NAME, assignments=[("schedule", "epochs", 5)], features=[8] * 5, batch_size=3
    )
    lines = describe(entry)
    assert lines[0] == "schedule.epochs = 5"
    assert "batch_size = 3" in lines
    assert any(line.startswith("features_per_stage = [8, 8, 8, 8, 8]") for line in lines)
    assert not any("distillation" in line for line in lines)


# ---- the file ------------------------------------------------------------------------------------------------------


@pytest.fixture
def plans_file(tmp_path, monkeypatch):
    folder = tmp_path / "Dataset912_Hand"
    folder.mkdir()
    (folder / "nnUNetPlans.json").write_text(json.dumps(hand_plans.plans()))
    description = {
        "channel_names": {"0": "T1", "1": "T1ce", "2": "FLAIR"},
        "labels": {"background": 0, "tumor": 1},
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    return folder / "nnUNetPlans.json"


def test_a_configuration_is_added_and_the_others_stay(plans_file):
    entry = configure(read_plans(plans_file), "3d_fullres", NAME)
    write_configuration(plans_file, NAME, entry)
    found = read_plans(plans_file)
    assert found["configurations"].pop(NAME) == entry
    assert found == hand_plans.plans()
    assert sorted(os.listdir(plans_file.parent)) == ["dataset.json", "nnUNetPlans.json"]


def test_overwrite_is_needed_for_other_content(plans_file):
    first = configure(read_plans(plans_file), "3d_fullres", NAME)
    second = configure(read_plans(plans_file), "3d_fullres", NAME, batch_size=5)
    write_configuration(plans_file, NAME, first)
    before = plans_file.read_bytes()
    write_configuration(plans_file, NAME, first)
    with pytest.raises(FileExistsError, match=r"exists in .* with other content"):
        write_configuration(plans_file, NAME, second)
    assert plans_file.read_bytes() == before
    write_configuration(plans_file, NAME, second, overwrite=True)
    assert read_plans(plans_file)["configurations"][NAME] == second


def test_what_an_overwritten_configuration_concerns_is_named(plans_file, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    plans = read_plans(plans_file)
    for name, parent in (("child", "3d_fullres"), ("grandchild", "child")):
        plans["configurations"][name] = configure(plans, parent, name)
    (tmp_path / "Dataset912_Hand" / f"KDTrainer__{plans['plans_name']}__child").mkdir(parents=True)
    heirs, models = affected(plans, "child", "Dataset912_Hand")
    assert heirs.endswith("set themselves: grandchild") and models.endswith("KDTrainer__nnUNetPlans__child")
    assert not list(affected(plans, "grandchild", "Dataset912_Hand"))


def test_simultaneous_writers_lose_nothing(plans_file):
    entry = configure(read_plans(plans_file), "3d_fullres", NAME)
    names = [f"seed{number}" for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: write_configuration(plans_file, name, entry), names))
    assert set(names) <= set(read_plans(plans_file)["configurations"])


def test_a_writer_that_dies_leaves_the_old_plans(plans_file, monkeypatch):
    before = plans_file.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        write_configuration(plans_file, NAME, configure(read_plans(plans_file), "3d_fullres", NAME))
    assert plans_file.read_bytes() == before
    assert sorted(os.listdir(plans_file.parent)) == ["dataset.json", "nnUNetPlans.json"]


def test_a_file_that_is_no_plans_file_is_refused(tmp_path):
    file = tmp_path / "nnUNetPlans.json"
    with pytest.raises(FileNotFoundError, match="run nnUNetv2_plan_and_preprocess"):
        read_plans(file)
    for content, message in (("{", "not valid JSON"), ("[]", "holds no table"), ("{}", "no configurations")):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_plans(file)


# ---- mstkd configure -----------------------------------------------------------------------------------------------


def run_configure(*arguments: str) -> int:
    return cli.main(["configure", "-d", "912", "--name", NAME, *arguments])


def test_command_writes_and_prints(plans_file, capsys):
    assert run_configure("--epochs", "5", "--seed", "0", "--set", "distillation.kl=0", "--batch-size", "3") == 0
    entry = read_plans(plans_file)["configurations"][NAME]
    assert entry["inherits_from"] == "3d_fullres"
    assert entry["batch_size"] == 3
    assert (entry["mstkd"]["schedule"]["epochs"], entry["mstkd"]["schedule"]["seed"]) == (5, 0)
    assert entry["mstkd"]["mstkd"]["kl"] == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:5] == ["schedule.epochs = 5", "schedule.seed = 0", "mstkd.kl = 0.0", "batch_size = 3"]


@pytest.mark.parametrize(
    ("changes", "trainers"),
    [
        (("schedule.seed=1",), "-tr ModalityDropoutTrainer"),
        (("sampler.kind=by_size", "unlabelled.share=1"), "-tr ModalityDropoutTrainer"),
        (("distillation.every=4",), "-tr SelfDistillationTrainer"),
        (("self_distillation.decay=0.9",), "-tr SelfDistillationTrainer"),
        (("distillation.every=4", "teacher.warm_start=false"), "-tr KDTeacherTrainer, then -tr KDTrainer"),
        (("mstkd.kl=2",), "-tr MSTKDTeacherTrainer, then -tr MSTKDTrainer"),
        (("mstkd.recipe=paper",), "-tr MSTKDTrainer"),
        (("network.placement=main",), "-tr MSTKDTeacherTrainer, then -tr MSTKDTrainer"),
        (("adamm.presence=false",), "-tr AdaMMTeacherTrainer, then -tr AdaMMTrainer"),
        (("smml.light=true",), "-tr SMMLTrainer"),
    ],
)
def test_command_names_a_trainer_that_reads_the_settings(plans_file, capsys, changes, trainers):
    words = [word for change in changes for word in ("--set", change)]
    assert run_configure(*words) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"912 {NAME} 0 {trainers}")


def test_command_takes_parent_widths_and_patch(plans_file):
    arguments = ["-c", "2d", "--features", "8", "16", "32", "--patch", "64", "64"]
    assert cli.main(["configure", "-d", "Dataset912_Hand", "--name", "2d_small", *arguments]) == 0
    entry = read_plans(plans_file)["configurations"]["2d_small"]
    assert (entry["inherits_from"], entry["patch_size"]) == ("2d", [64, 64])
    assert entry["architecture"]["arch_kwargs"]["features_per_stage"] == [8, 16, 32]


@pytest.mark.parametrize("reverse", [False, True])
def test_command_applies_recipe_in_any_order(plans_file, reverse):
    options = ["distillation.recipe=paper", "distillation.kl=3"]
    arguments = [part for option in (options[::-1] if reverse else options) for part in ("--set", option)]
    assert run_configure(*arguments) == 0
    found = read_plans(plans_file)["configurations"][NAME]["mstkd"]
    assert (found["mstkd"]["kl"], found["mstkd"]["discrepancy"]) == (3, 10)
    assert found["schedule"]["optimizer"] == "adam"


def test_command_says_which_settings_of_the_parent_a_recipe_replaces(plans_file, capsys):
    assert run_configure("--set", "schedule.optimizer=adamw", "--set", "sampler.kind=by_size") == 0
    capsys.readouterr()
    words = ["configure", "-d", "912", "-c", NAME, "--name", "paper", "--set"]
    assert cli.main([*words, "mstkd.recipe=paper"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "note: " in line]
    told = f'schedule.optimizer is no longer "adamw", as in {NAME}: a recipe sets it unless it is given, too'
    assert notes == [f"  note: {told}"]
    assert cli.main([*words, "mstkd.recipe=paper", "--set", "schedule.optimizer=sgd", "--overwrite"]) == 0
    assert "note: " not in capsys.readouterr().out


def test_command_says_that_a_trainer_does_not_start_from_itself(plans_file, capsys):
    assert run_configure("--set", "schedule.init_from=ModalityDropoutTrainer") == 0
    printed = capsys.readouterr().out
    assert "note: ModalityDropoutTrainer itself starts from random weights" in printed and "train it" not in printed


def test_command_notes_a_checkpoint_that_is_not_there_yet(plans_file, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    note = "note: schedule.init_from: "
    assert run_configure("--set", "schedule.init_from=A/fold_0/checkpoint_final.pth") == 0
    assert f"{note}{tmp_path}/A/fold_0/checkpoint_final.pth does not exist yet" in capsys.readouterr().out
    (tmp_path / "a.pth").touch()
    for number, there in enumerate(("a.pth", "nnUNetTrainer")):
        assert run_configure("--overwrite", "--set", f"schedule.init_from={there}", "--epochs", str(number + 1)) == 0
    assert note not in capsys.readouterr().out


def test_command_names_other_plans_and_an_ambiguous_data_set_in_full(plans_file, capsys, tmp_path, monkeypatch):
    shutil.copyfile(plans_file, plans_file.with_name("OtherPlans.json"))
    assert run_configure("-p", "OtherPlans") == 0
    assert f"nnUNetv2_train 912 {NAME} 0 -p OtherPlans -tr" in capsys.readouterr().out
    (tmp_path / "results" / "Dataset912_Old").mkdir(parents=True)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    assert run_configure() == 2
    assert "ambiguous" in capsys.readouterr().err
    assert run_configure("-d", plans_file.parent.name) == 0
    assert f"nnUNetv2_train {plans_file.parent.name} {NAME} 0 -tr" in capsys.readouterr().out


def test_command_is_idempotent(plans_file, capsys):
    assert run_configure("--epochs", "5") == 0
    assert run_configure("--epochs", "5") == 0
    assert run_configure("--epochs", "6") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert read_plans(plans_file)["configurations"][NAME]["mstkd"]["schedule"]["epochs"] == 5
    assert run_configure("--epochs", "6", "--overwrite") == 0
    assert read_plans(plans_file)["configurations"][NAME]["mstkd"]["schedule"]["epochs"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "3d_fullres"], "nnU-Net's own configuration"),
        (["--name", "a__b"], "part of a folder name"),
        (["-c", "3d"], "no configuration '3d'"),
        (["-c", "3d_cascade_fullres"], "second stage of a cascade"),
        (["-p", "OtherPlans"], "OtherPlans.json does not exist"),
        (["-d", "913"], "no folder Dataset913_*"),
        (["-d", "Dataset913_None"], "no folder Dataset913_None"),
        (["--epochs", "0"], "schedule.epochs is 0"),
        (["--set", "schedule.epoch=3"], "did you mean 'epochs'"),
        (["--set", "epochs=3"], "not of the form section.key=value"),
        (["--set", "schedule.epochs=many"], "schedule.epochs is 'many', expected"),
        (["--set", "sampler.kind=fixed", "--set", 'sampler.subsets=["T2"]'], "known are T1, T1ce, FLAIR"),
        (["--features", "8", "16"], "at least 3 stages"),
        (["--patch", "64", "64"], "expected 3"),
        (["--batch-size", "0"], "batch size is 0"),
        (["--set", "schedule.init_from=FullModalityTraine"], "not found (did you mean 'FullModalityTrainer'?)"),
    ],
)
def test_command_refuses_mistakes_in_one_line(plans_file, capsys, arguments, message):
    before = plans_file.read_bytes()
    assert run_configure(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("mstkd configure: ")
    assert message in line
    assert plans_file.read_bytes() == before


def test_the_command_needs_the_folder_of_nnunet(plans_file, capsys, monkeypatch):
    monkeypatch.delenv("nnUNet_preprocessed")
    assert run_configure() == 2
    assert "export nnUNet_preprocessed=FOLDER" in capsys.readouterr().err
