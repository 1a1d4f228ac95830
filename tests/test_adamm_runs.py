"""Whole trainings of AdaMM through nnU-Net's own loop: settings that travel, interruption, validation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGURATION, PHANTOM, Folders, configure, train, train_until_killed
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args
from tiny import same

from nnunetv2_mstkd.methods.adamm.network import AdaptiveUNet
from nnunetv2_mstkd.methods.adamm.settings import TERMS
from nnunetv2_mstkd.nnunet import checkpoints
from nnunetv2_mstkd.nnunet.plans import BLOCK
from nnunetv2_mstkd.training.settings import SettingsError

LOGGED = ["segmentation", *TERMS]
ADVERSARIAL = {"adamm__adversarial": 0.005}


def read(folders: Folders, name: str = "checkpoint_final.pth") -> dict:
    return checkpoints.read(folders.fold("AdaMMTrainer") / name)


@pytest.fixture
def student(phantom: Folders) -> Folders:
    """A teacher of one epoch and a student of three."""
    configure(phantom, **ADVERSARIAL, schedule__epochs=1, adamm__subsets=["T1+FLAIR"])
    train("AdaMMTeacherTrainer")
    configure(phantom, **ADVERSARIAL, schedule__epochs=3, adamm__subsets=["T1+FLAIR"])
    train("AdaMMTrainer")
    return phantom


def test_logs_checkpoints_resuming_and_prediction(student):
    whole = read(student)
    folder = student.fold("AdaMMTrainer")

    # what is logged
    lines = [line for line in log_text(folder).splitlines() if "terms: " in line]
    assert len(lines) == 3
    assert [item.rsplit(" ", 1)[0] for item in lines[0].split("terms: ")[1].strip().split(", ")] == LOGGED
    for name in LOGGED:
        assert np.isfinite(whole["logging"][f"mstkd_{name}"]).all() and len(whole["logging"][f"mstkd_{name}"]) == 3
    assert "started from the teacher: " in log_text(folder)

    # what is stored
    assert set(whole[BLOCK]) == {"split", "teacher", "discriminator", "discriminator_optimizer"}
    assert whole[BLOCK]["teacher"]["trainer"] == "AdaMMTeacherTrainer"
    block = json.loads((folder.parent / "plans.json").read_text())["configurations"][CONFIGURATION][BLOCK]
    assert block["adamm"]["bank"] == "factorised" and block["adamm"]["subsets"] == ["#0+#3"]
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder.parent), use_folds=(0,))
    assert isinstance(predictor.network, AdaptiveUNet)
    assert same(dict(predictor.network.state_dict()), dict(whole["network_weights"]))
    assert predictor.network.encoder_adapters[0].num_rows == 1

    # what is refused
    configure(student, **ADVERSARIAL, schedule__epochs=3, adamm__subsets=["T1+FLAIR"], adamm__nodes=4)
    with pytest.raises(SettingsError, match=r"adamm\.nodes = 4, .* was trained with 8"):
        train("AdaMMTrainer", only_run_validation=True)
    with pytest.raises(SettingsError, match=r"another network: adamm\.nodes is 8 there and 4 here"):
        train("AdaMMTrainer", fold=1)

    # interruption
    configure(student, **ADVERSARIAL, schedule__epochs=3, adamm__subsets=["#3+#0"])
    shutil.rmtree(folder)
    train_until_killed("AdaMMTrainer", 2)
    torch.manual_seed(99)
    np.random.seed(99)
    train("AdaMMTrainer", continue_training=True)
    resumed = read(student)
    for key in ("network_weights", "optimizer_state", BLOCK, "_best_ema", "current_epoch"):
        assert same(whole[key], resumed[key]), key

    # validation, without the teacher
    shutil.rmtree(student.fold("AdaMMTeacherTrainer").parent)
    train("AdaMMTrainer", validate=True, only_run_validation=True)
    assert (folder / "validation" / "summary.json").is_file()


def test_a_teacher_with_a_presence_head(phantom):
    configure(phantom, **ADVERSARIAL, schedule__epochs=2, adamm_teacher__presence=True)
    train("AdaMMTeacherTrainer")
    folder = phantom.fold("AdaMMTeacherTrainer")
    teacher = checkpoints.read(folder / "checkpoint_final.pth")
    for name in ("presence", "reliability"):
        assert np.isfinite(teacher["logging"][f"mstkd_{name}"]).all()
        assert len(teacher["logging"][f"mstkd_{name}"]) == 2
    assert "terms: segmentation " in log_text(folder)
    train("AdaMMTrainer")
    log = log_text(phantom.fold("AdaMMTrainer"))
    assert "started from the teacher: " in log and "presence.logits.weight" not in log
    # another teacher is another network
    configure(phantom, **ADVERSARIAL, schedule__epochs=2, adamm_teacher__presence=False)
    with pytest.raises(SettingsError, match=r"another network: adamm_teacher\.presence is True there and False here"):
        train("AdaMMTeacherTrainer", fold=1)


def test_term_weights_of_the_checkpoint_win(student):
    configure(student, **ADVERSARIAL, schedule__epochs=9, adamm__style=0.7, adamm__subsets=["T1+FLAIR"])
    trainer = get_trainer_from_args(str(PHANTOM), CONFIGURATION, 0, "AdaMMTrainer", device=torch.device("cpu"))
    trainer.load_checkpoint(str(student.fold("AdaMMTrainer") / "checkpoint_final.pth"))
    weights = {term.name: term.weight for term in trainer.terms}
    assert (trainer.num_epochs, weights["style"]) == (3, 0.1)


def log_text(folder: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(folder.glob("training_log_*.txt")))
