"""User errors in training: refused in one line before anything is written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from conftest import CONFIGURATION, PHANTOM, add_configuration, configure, snapshot, train
from nnunetv2.run.run_training import get_trainer_from_args
from tiny import NO_TERMS, plans, same

from nnunetv2_mstkd.methods import FullModalityTrainer, ModalityDropoutTrainer, MSTKDTeacherTrainer, MSTKDTrainer
from nnunetv2_mstkd.methods.mstkd.settings import TERMS
from nnunetv2_mstkd.nnunet import checkpoints
from nnunetv2_mstkd.training.settings import SettingsError

EVERY = [FullModalityTrainer, ModalityDropoutTrainer, MSTKDTeacherTrainer, MSTKDTrainer]
WITH_SUBSETS = [ModalityDropoutTrainer, MSTKDTeacherTrainer, MSTKDTrainer]
WITH_TRANSFORMER = [MSTKDTeacherTrainer, MSTKDTrainer]


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


# ---- when a trainer is created -------------------------------------------------------------------------------------


def refuse(make_trainer, cls, kind=ValueError, **options) -> str:
    """Return the error message; not even nnU-Net's output folder may exist afterwards."""
    with pytest.raises(kind) as error:
        make_trainer(cls, **options)
    assert not os.path.exists(os.environ["nnUNet_results"])
    return one_line(error)


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"distilation": {}}, ("'distilation'", "did you mean 'distillation'", "schedule")),
        ({"schedule": {"epoch": 3}}, ("'epoch'", "did you mean 'epochs'", "initial_lr")),
        ({"schedule": {"epochs": 0}}, ("schedule.epochs is 0", "at least 1")),
        ({"schedule": {"epochs": "3"}}, ("schedule.epochs is '3'",)),
        ({"mstkd": {"kl": -1}}, ("mstkd.kl is -1", "at least 0")),
        ({"distillation": []}, ("distillation is []",)),
        (["schedule"], ("['schedule']",)),
    ],
    ids=str,
)
def test_bad_setting_is_named(make_trainer, cls, block, words):
    message = refuse(make_trainer, cls, SettingsError, block=block)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("cls", WITH_SUBSETS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    ("subsets", "words"),
    [
        (["T0", "T1+T9"], ("'T9'", "'T1+T9'", "T0, T1, T2, T3")),
        (["T0++T1"], ("'T0++T1'", "empty part")),
        ([""], ("''", "empty part")),
        (["T0+T0"], ("'T0'", "twice")),
        (["T0+T1", "T1+T0"], ("T0+T1", "twice")),
        ([], ("sampler.subsets is []",)),
    ],
    ids=str,
)
def test_bad_subsets_are_named(make_trainer, cls, subsets, words):
    message = refuse(make_trainer, cls, block={"sampler": {"kind": "fixed", "subsets": subsets}})
    assert all(word in message for word in words), message


@pytest.mark.parametrize("cls", WITH_SUBSETS, ids=lambda cls: cls.__name__)
def test_one_channel_is_refused(make_trainer, cls):
    message = refuse(make_trainer, cls, channels=1)
    assert "1 input channel" in message and "nnUNetTrainer" in message


@pytest.mark.parametrize("cls", WITH_SUBSETS, ids=lambda cls: cls.__name__)
def test_normalisation_must_keep_zero(make_trainer, cls):
    content = plans()
    content["configurations"]["tiny"]["normalization_schemes"][2] = "CTNormalization"
    message = refuse(make_trainer, cls, given_plans=content)
    assert "channel 2" in message and "CTNormalization" in message


def test_full_modality_takes_any_normalisation(make_trainer):
    content = plans()
    content["configurations"]["tiny"]["normalization_schemes"] = ["CTNormalization"] * 4
    assert make_trainer(FullModalityTrainer, content).network is not None
    assert make_trainer(FullModalityTrainer, channels=1).network is not None


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
def test_cascade_is_refused(make_trainer, cls):
    content = plans()
    content["configurations"]["low"] = deepcopy(content["configurations"]["tiny"])
    content["configurations"]["tiny"]["previous_stage"] = "low"
    message = refuse(make_trainer, cls, NotImplementedError, given_plans=content)
    assert cls.__name__ in message and "low" in message and "3d_fullres" in message


@pytest.mark.parametrize("cls", WITH_TRANSFORMER, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    ("network", "words"),
    [
        ({"heads": 5}, ("network.heads is 5", "divisor of the bottleneck width 24")),
        ({"taps": 4}, ("network.taps is 4", "at most the 3 stages")),
        ({"depth": 4, "taps": 3}, ("network.depth is 4", "multiple of taps (3)")),
        ({"patch": [1, 1]}, ("network.patch is [1, 1]", "3 edges")),
    ],
    ids=str,
)
def test_transformer_must_fit_the_plans(make_trainer, cls, network, words):
    message = refuse(make_trainer, cls, block={"network": network})
    assert all(word in message for word in words), message


@pytest.mark.parametrize("cls", WITH_TRANSFORMER, ids=lambda cls: cls.__name__)
def test_only_unets_are_accepted(make_trainer, cls):
    content = plans()
    content["configurations"]["tiny"]["architecture"] = {
        "network_class_name": "dynamic_network_architectures.architectures.primus.Primus",
        "arch_kwargs": {"embed_dim": 8},
        "_kw_requires_import": [],
    }
    message = refuse(make_trainer, cls, given_plans=content)
    assert "Primus" in message and "PlainConvUNet or ResidualEncoderUNet" in message


# ---- when a training starts ----------------------------------------------------------------------------------------


def build(trainer="MSTKDTrainer", configuration=CONFIGURATION):
    return get_trainer_from_args(str(PHANTOM), configuration, 0, trainer, device=torch.device("cpu"))


def refuse_start(folders, kind=ValueError, configuration=CONFIGURATION, **options) -> str:
    """Return the error message of a training; no result may have changed."""
    before = snapshot(folders)
    with pytest.raises(kind) as error:
        train("MSTKDTrainer", configuration=configuration, **options)
    assert snapshot(folders) == before
    return one_line(error)


def change_teacher(folders, change) -> None:
    """Rewrite the teacher's checkpoint after ``change(content)``."""
    path = folders.fold("MSTKDTeacherTrainer") / "checkpoint_final.pth"
    content = checkpoints.read(path)
    change(content)
    checkpoints.write(content, path)


def test_missing_teacher_names_its_training_command(phantom):
    message = refuse_start(phantom, FileNotFoundError)
    assert str(phantom.fold("MSTKDTeacherTrainer") / "checkpoint_final.pth") in message
    assert message.endswith(f"Train it first: nnUNetv2_train {PHANTOM} {CONFIGURATION} 0 -tr MSTKDTeacherTrainer")


def test_ablation_asks_for_the_parents_teacher(phantom):
    add_configuration(phantom.plans_file, "ablation", CONFIGURATION, settings={"distillation.kl": 0.0})
    message = refuse_start(phantom, FileNotFoundError, "ablation")
    assert message.endswith(f"nnUNetv2_train {PHANTOM} {CONFIGURATION} 0 -tr MSTKDTeacherTrainer")
    add_configuration(phantom.plans_file, "ablation", CONFIGURATION, settings={"teacher.configuration": "3d_fullres"})
    message = refuse_start(phantom, FileNotFoundError, "ablation")
    assert message.endswith(f"nnUNetv2_train {PHANTOM} 3d_fullres 0 -tr MSTKDTeacherTrainer")


def test_ablation_finds_the_parents_teacher(models):
    add_configuration(models.plans_file, "ablation", CONFIGURATION, settings={"distillation.kl": 0.0})
    trainer = build(configuration="ablation")
    trainer.on_train_start()
    assert trainer._teacher_identity["path"].split("/")[1] == f"MSTKDTeacherTrainer__nnUNetPlans__{CONFIGURATION}"


def test_unfinished_teacher_names_how_to_continue(models):
    folder = models.fold("MSTKDTeacherTrainer")
    (folder / "checkpoint_final.pth").rename(folder / "checkpoint_latest.pth")
    message = refuse_start(models, FileNotFoundError)
    assert str(folder) in message
    assert message.endswith(f"nnUNetv2_train {PHANTOM} {CONFIGURATION} 0 -tr MSTKDTeacherTrainer --c")


def spacing(content):
    content["init_args"]["plans"]["configurations"]["3d_fullres"]["spacing"] = [3.0, 3.0, 3.0]


def patch_size(content):
    content["init_args"]["plans"]["configurations"][CONFIGURATION]["patch_size"] = [16, 16, 16]


def normalisation(content):
    schemes = content["init_args"]["plans"]["configurations"]["3d_fullres"]["normalization_schemes"]
    schemes[0] = "NoNormalization"


def channels(content):
    content["init_args"]["dataset_json"]["channel_names"]["1"] = "PD"


def labels(content):
    content["init_args"]["dataset_json"]["labels"]["other"] = 4


def no_labels(content):
    del content["init_args"]["dataset_json"]["labels"]


def cases(content):
    content["mstkd"]["split"]["train"][0] = "another_case"


def trainer_name(content):
    content["trainer_name"] = "nnUNetTrainer"


def heads(content):
    content["init_args"]["plans"]["configurations"][CONFIGURATION]["mstkd"]["network"]["heads"] = 2


def weights(content):
    content["network_weights"].popitem()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (spacing, ("spacing is [3.0, 3.0, 3.0] for the teacher", "[8.0, 8.0, 8.0] for the student")),
        (patch_size, ("patch size is [16, 16, 16] for the teacher", "[20, 24, 16] for the student")),
        (normalisation, ("normalisation is ['NoNormalization'", "['ZScoreNormalization'")),
        (channels, ("channels is ", "'PD'")),
        (labels, ("labels is ", "'other': 4")),
        (no_labels, ("has no labels",)),
        (cases, ("training cases of the fold is ", "'another_case'")),
        (trainer_name, ("nnUNetTrainer, expected MSTKDTeacherTrainer",)),
        (heads, ("network.heads = 2, the student 1", "evd")),
        (weights, ("do not fit the network of its own plans", "train the teacher again")),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_unfitting_teacher_is_refused_with_both_values(models, change, words):
    change_teacher(models, change)
    message = refuse_start(models)
    assert "MSTKDTeacherTrainer__nnUNetPlans__tiny/fold_0/checkpoint_final.pth" in message
    assert all(word in message for word in words), message


def test_long_lists_show_their_difference():
    from nnunetv2_mstkd.training.teacher import _short

    many = [f"case_{number:04d}" for number in range(200)]
    assert _short([*many, "a"], [*many, "b"]) == "a list of 201 that alone has ['a']"
    assert _short(many[:2], many[:1]) == "['case_0000', 'case_0001']"
    assert len(_short(many, [])) == 160


def test_teacher_of_other_width_serves_logit_terms(models):
    configure(models, "wide", features=(8, 16, 32))
    wide = build("MSTKDTeacherTrainer", "wide")
    wide.on_train_start()
    wide.save_checkpoint(os.path.join(wide.output_folder, "checkpoint_final.pth"))
    configure(models, teacher__configuration="wide")
    message = refuse_start(models)
    assert "channels per stage = [8, 16, 32], the student [8, 16, 24]" in message
    assert all(term in message for term in ("evd", "maps", "style", "adversarial")) and "kl" not in message
    features = {f"distillation__{term}": 0.0 for term in TERMS if term not in ("kl", "discrepancy")}
    configure(models, teacher__configuration="wide", **features)
    trainer = build()
    trainer.on_train_start()
    assert trainer.teacher is not None


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_truncated_teacher_is_named(models, size):
    file = models.fold("MSTKDTeacherTrainer") / "checkpoint_final.pth"
    file.write_bytes(file.read_bytes()[:size])
    assert str(file) in refuse_start(models)


@pytest.mark.parametrize("option", ["continue_training", "only_run_validation"])
def test_truncated_checkpoint_is_named(models, option):
    file = models.fold("MSTKDTrainer") / "checkpoint_final.pth"
    file.write_bytes(file.read_bytes()[:-1000])
    message = refuse_start(models, **{option: True})
    assert str(file) in message and "truncated" in message


def test_checkpoint_with_code_is_refused(models):
    file = models.fold("MSTKDTeacherTrainer") / "checkpoint_final.pth"
    content = checkpoints.read(file)
    content["mstkd"]["split"] = re.compile("code")
    torch.save(content, file)
    message = refuse_start(models)
    assert str(file) in message and "re._compile" in message


def test_replaced_teacher_is_refused_on_continuing(models):
    folder = models.fold("MSTKDTrainer")
    content = checkpoints.read(folder / "checkpoint_final.pth")
    content["current_epoch"] = 1
    (folder / "checkpoint_final.pth").unlink()
    checkpoints.write(content, folder / "checkpoint_latest.pth")

    def retrain(teacher):
        teacher["network_weights"]["decoder.seg_layers.0.bias"] += 1

    change_teacher(models, retrain)
    message = refuse_start(models, continue_training=True)
    assert "replaced" in message and content["mstkd"]["teacher"]["sha256"][:12] in message
    # the same weights in a new file are the same teacher
    change_teacher(models, lambda teacher: teacher["network_weights"]["decoder.seg_layers.0.bias"].sub_(1))
    train("MSTKDTrainer", continue_training=True)


def test_initial_weights_must_exist_and_fit(models):
    configure(models, schedule__init_from="nowhere/checkpoint_final.pth")
    message = refuse_start(models, FileNotFoundError)
    assert str(models.results / "nowhere/checkpoint_final.pth") in message
    other = models.results / "other.pth"
    checkpoints.write({"network_weights": {"conv.weight": torch.zeros(3)}}, other)
    configure(models, schedule__init_from=str(other))
    assert "no tensor of the checkpoint" in refuse_start(models)


def test_refusal_leaves_the_checkpoint_usable(models):
    """After a refusal the user corrects the settings and continues."""
    before = checkpoints.read(models.fold("MSTKDTrainer") / "checkpoint_final.pth")["network_weights"]
    configure(models, network__depth=9)
    refuse_start(models, continue_training=True)
    configure(models)
    train("MSTKDTrainer", continue_training=True)
    assert same(before, checkpoints.read(models.fold("MSTKDTrainer") / "checkpoint_final.pth")["network_weights"])


def test_no_teacher_without_terms_and_warm_start(phantom):
    flat = {f"{section}__{key}": value for section, keys in NO_TERMS.items() for key, value in keys.items()}
    configure(phantom, **flat)
    trainer = build()
    trainer.on_train_start()
    assert trainer.teacher is None


# ---- through nnU-Net's command -------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from nnunetv2.run.run_training import run_training_entry; run_training_entry()"
    return subprocess.run(
        [sys.executable, "-c", code, str(PHANTOM), CONFIGURATION, "0", "-device", "cpu", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "MSTKD_DEBUG": "0"},
    )


@pytest.mark.parametrize("mistake", ["no teacher", "unknown setting", "truncated checkpoint"])
def test_train_command_exits_with_one_line_and_code_2(models, mistake):
    arguments = ["-tr", "MSTKDTrainer"]
    if mistake == "no teacher":
        (models.fold("MSTKDTeacherTrainer") / "checkpoint_final.pth").unlink()
        (models.fold("MSTKDTeacherTrainer") / "checkpoint_best.pth").unlink()
        expected = (
            f"no teacher for fold 0: {models.fold('MSTKDTeacherTrainer') / 'checkpoint_final.pth'} does not exist"
        )
    elif mistake == "unknown setting":
        models.plans_file.write_text(models.plans_file.read_text().replace('"schedule": {', '"shedule": {'))
        expected = "unknown setting 'shedule' in 'mstkd' (did you mean 'schedule'?)"
    else:
        file = models.fold("MSTKDTrainer") / "checkpoint_final.pth"
        file.write_bytes(file.read_bytes()[:-1000])
        arguments.append("--c")
        expected = f"checkpoint {file} is damaged, truncated"
    before = snapshot(models)
    done = command(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"nnunetv2_mstkd: {expected}")
    assert done.stderr.count("nnunetv2_mstkd: ") == 1
    assert snapshot(models) == before
