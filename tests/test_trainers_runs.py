"""Whole trainings through nnU-Net's own loop: logs, pictures, interruption, validation."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import CONFIGURATION, PHANTOM, configure, train, train_until_killed
from nnunetv2.run.run_training import get_trainer_from_args
from tiny import same, state

from nnunetv2_mstkd.methods.mstkd.settings import TERMS
from nnunetv2_mstkd.nnunet import checkpoints


def build(trainer="MSTKDTrainer", fold=0):
    return get_trainer_from_args(str(PHANTOM), CONFIGURATION, fold, trainer, device=torch.device("cpu"))


def read(folders, name="checkpoint_final.pth", trainer="MSTKDTrainer", fold=0):
    return checkpoints.read(folders.fold(trainer, fold=fold) / name)


def log_text(folder: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(folder.glob("training_log_*.txt")))


# ---- what is logged ------------------------------------------------------------------------------------------------


def test_every_term_is_logged_by_name_in_each_epoch(trained):
    lines = [line for line in log_text(trained.fold("MSTKDTrainer")).splitlines() if "terms: " in line]
    assert len(lines) == 2
    for line in lines:
        values = dict(item.rsplit(" ", 1) for item in line.split("terms: ")[1].strip().split(", "))
        assert list(values) == ["segmentation", *TERMS]
        assert all(np.isfinite(float(value)) for value in values.values())
    logging = read(trained)["logging"]
    for name in ("segmentation", *TERMS):
        assert len(logging[f"mstkd_{name}"]) == 2
        assert float(logging[f"mstkd_{name}"][1]) == pytest.approx(float(values[name]), rel=1e-3, abs=1e-4)
    assert logging["train_losses"] == pytest.approx(logging["mstkd_segmentation"])


def test_a_picture_of_the_terms_is_drawn(models):
    configure(models, schedule__epochs=1, schedule__iterations=1)
    for trainer in ("MSTKDTeacherTrainer", "MSTKDTrainer"):
        train(trainer, plot=True)
    picture = models.fold("MSTKDTrainer") / "progress_terms.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not (models.fold("MSTKDTeacherTrainer") / "progress_terms.png").exists()


def test_log_names_teacher_and_warm_start(trained):
    text = log_text(trained.fold("MSTKDTrainer"))
    identity = read(trained)["mstkd"]["teacher"]
    assert identity["trainer"] == "MSTKDTeacherTrainer"
    assert (trained.results / identity["path"]).is_file()
    assert identity["sha256"] == checkpoints.fingerprint(
        read(trained, trainer="MSTKDTeacherTrainer")["network_weights"]
    )
    assert f"teacher: {identity['path']}, sha256 {identity['sha256'][:12]}" in text
    assert "started from the teacher: " in text and " 0 kept their initial value" in text


def test_older_log_without_a_term_is_padded(models):
    folder = models.fold("MSTKDTrainer")
    content = read(models)
    content["current_epoch"] = 1
    for key in list(content["logging"]):
        content["logging"][key] = content["logging"][key][:1]
    del content["logging"]["mstkd_kl"]
    (folder / "checkpoint_final.pth").unlink()
    checkpoints.write(content, folder / "checkpoint_latest.pth")
    train("MSTKDTrainer", continue_training=True, plot=True)
    logging = read(models)["logging"]
    assert {len(values) for values in logging.values()} == {2}
    assert np.isnan(logging["mstkd_kl"][0]) and np.isfinite(logging["mstkd_kl"][1])
    assert (folder / "progress.png").is_file()


# ---- interruption --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trainer",
    [
        *("MSTKDTrainer", "ModalityDropoutTrainer", "MSTKDTeacherTrainer"),
        *("MedMAPTrainer", "MedMAPMSTKDTrainer", "MedMAPSMMLTrainer", "SMMLTrainer"),
        *("MMFormerTrainer", "MedMAPRFNetTrainer", "SMMLMMFormerTrainer"),
    ],
)
def test_resumed_training_equals_uninterrupted_one(models, trainer):
    configure(models, schedule__epochs=3, smml__prior="self")
    train(trainer)
    whole = read(models, trainer=trainer)
    folder = models.fold(trainer)
    shutil.rmtree(folder)
    train_until_killed(trainer, 2)
    assert not (folder / "checkpoint_final.pth").exists()
    assert read(models, "checkpoint_latest.pth", trainer)["current_epoch"] == 2
    torch.manual_seed(99)
    np.random.seed(99)
    train(trainer, continue_training=True)
    resumed = read(models, trainer=trainer)
    assert same(whole["network_weights"], resumed["network_weights"])
    for key in ("optimizer_state", "mstkd", "_best_ema", "current_epoch"):
        assert same(whole[key], resumed[key]), key
    for key, values in whole["logging"].items():
        assert "timestamps" in key or same(values, resumed["logging"][key]), key


def test_settings_that_a_resumed_training_does_not_use_are_logged(models):
    configure(models, schedule__epochs=2)
    train_until_killed("ModalityDropoutTrainer", 1)
    configure(models, schedule__epochs=3, sampler__kind="by_size")
    train("ModalityDropoutTrainer", continue_training=True)
    text = log_text(models.fold("ModalityDropoutTrainer"))
    assert "schedule.epochs=3 of the plans is not used: this training began with 2" in text
    assert "sampler.kind='by_size' of the plans is not used: this training began with 'uniform'" in text
    assert text.count("is not used") == 2
    assert read(models, trainer="ModalityDropoutTrainer")["current_epoch"] == 2


def test_what_a_recipe_of_another_method_and_the_class_itself_set_is_logged(models):
    configure(models, mstkd__recipe="paper")
    trainer = build("ModalityDropoutTrainer")
    trainer.num_epochs = 3
    trainer.on_train_start()
    text = log_text(models.fold("ModalityDropoutTrainer"))
    assert 'mstkd.recipe=paper of the plans also sets schedule.optimizer="adam", schedule.weight_decay=1e-05' in text
    assert "set by ModalityDropoutTrainer itself, whatever the settings say: num_epochs=3" in text


def test_the_discriminator_and_its_optimiser_go_on(models):
    trainer = build()
    trainer.load_checkpoint(str(models.fold("MSTKDTrainer") / "checkpoint_final.pth"))
    stored = read(models)["mstkd"]
    assert same(stored["discriminator"], trainer.adversary.discriminator.state_dict())
    assert same(stored["discriminator_optimizer"], trainer.adversary.optimizer.state_dict())
    assert len(stored["discriminator_optimizer"]["state"]) == len(stored["discriminator"])
    fresh = build()
    fresh.initialize()
    assert not same(stored["discriminator"], fresh.adversary.discriminator.state_dict())


def test_best_score_comes_from_the_log(models):
    folder = models.fold("MSTKDTrainer")
    content = read(models)
    content["logging"]["ema_fg_dice"] = [0.25, 0.75]
    content["_best_ema"] = 0.25  # nnU-Net saves latest before it notes a new best
    checkpoints.write(content, folder / "checkpoint_latest.pth")
    trainer = build()
    trainer.load_checkpoint(str(folder / "checkpoint_latest.pth"))
    assert trainer._best_ema == 0.75


@pytest.mark.parametrize(
    ("scores", "best", "saved"),
    [
        ([0.25, 0.75], None, True),  # killed between the first latest and best
        ([0.25, 0.75], 1, True),  # best is of the epoch before
        ([0.25, 0.75], 2, False),
        ([0.75, 0.25], 1, False),  # the last epoch was not the best one
    ],
)
def test_missed_best_checkpoint_is_saved_on_resume(models, scores, best, saved):
    folder = models.fold("MSTKDTrainer")
    content = read(models)
    content["logging"]["ema_fg_dice"] = scores
    (folder / "checkpoint_final.pth").unlink()
    (folder / "checkpoint_best.pth").unlink()
    (folder / ".checkpoint_latest.pth.1.part").write_bytes(b"half")
    checkpoints.write(content, folder / "checkpoint_latest.pth")
    if best is not None:
        checkpoints.write({**content, "network_weights": {}, "current_epoch": best}, folder / "checkpoint_best.pth")
    configure(models, schedule__epochs=3)
    trainer = build()
    trainer.load_checkpoint(str(folder / "checkpoint_latest.pth"))
    assert trainer.current_epoch == 2
    trainer.num_epochs = 3  # the checkpoint's own settings say 2
    trainer.on_train_start()
    assert trainer.current_epoch == 2 and not list(folder.glob(".*"))
    if saved:
        found = read(models, "checkpoint_best.pth")
        assert found["current_epoch"] == 2 and same(found["network_weights"], content["network_weights"])
    elif best is not None:
        assert read(models, "checkpoint_best.pth")["network_weights"] == {}


def test_a_finished_student_that_goes_on_needs_no_teacher(models):
    """nnU-Net's users repeat an aborted validation with --c."""
    before = read(models)["network_weights"]
    shutil.rmtree(models.fold("MSTKDTeacherTrainer").parent)
    train("MSTKDTrainer", continue_training=True)
    assert same(before, read(models)["network_weights"])
    assert read(models)["mstkd"]["teacher"]["trainer"] == "MSTKDTeacherTrainer"


# ---- start ---------------------------------------------------------------------------------------------------------


def started(models, **settings):
    configure(models, **settings)
    trainer = build()
    trainer.on_train_start()
    return trainer


def test_a_student_starts_from_its_teachers_weights(models):
    trainer = started(models)
    assert same(trainer.network.state_dict(), read(models, trainer="MSTKDTeacherTrainer")["network_weights"])
    assert trainer.teacher is not None and trainer.teacher is not trainer.network


def test_the_warm_start_can_be_switched_off(models):
    trainer = started(models, teacher__warm_start=False)
    assert not same(trainer.network.state_dict(), read(models, trainer="MSTKDTeacherTrainer")["network_weights"])
    assert trainer.teacher is not None


def test_warm_start_without_terms_drops_the_teacher(models):
    trainer = started(models, **{f"distillation__{term}": 0.0 for term in TERMS})
    assert same(trainer.network.state_dict(), read(models, trainer="MSTKDTeacherTrainer")["network_weights"])
    assert trainer.teacher is None


@pytest.mark.parametrize("source", ["MSTKDTeacherTrainer", "file"])
def test_a_training_can_start_from_another_one(models, source):
    name, by = ("checkpoint_final.pth", source) if source != "file" else ("checkpoint_best.pth", "MSTKDTrainer")
    if source == "file":
        source = str((models.fold("MSTKDTrainer") / "checkpoint_best.pth").relative_to(models.results))
    trainer = started(models, schedule__init_from=source, teacher__warm_start=False)
    assert same(trainer.network.state_dict(), read(models, name, trainer=by)["network_weights"])


def test_the_trainer_that_others_start_from_starts_at_random(models):
    configure(models, schedule__init_from="MSTKDTeacherTrainer")
    finished = read(models, trainer="MSTKDTeacherTrainer")["network_weights"]
    trainer = build("MSTKDTeacherTrainer")
    trainer.on_train_start()
    assert not same(trainer.network.state_dict(), finished)
    shutil.rmtree(models.fold("MSTKDTeacherTrainer"))
    build("MSTKDTeacherTrainer").on_train_start()


def test_weights_given_on_the_command_line_are_kept(models):
    trainer = build()
    trainer.initialize()
    with torch.no_grad():
        next(trainer.network.parameters()).add_(1.0)
    before = state(trainer.network)
    trainer.on_train_start()
    assert same(before, state(trainer.network))
    assert "weights were already loaded (-pretrained_weights)" in log_text(models.fold("MSTKDTrainer"))


def test_summation_order_is_not_taken_for_new_weights(models):
    trainer = build()
    trainer.initialize()
    trainer._initial_sum *= 1 + 1e-14
    trainer.on_train_start()
    assert same(trainer.network.state_dict(), read(models, trainer="MSTKDTeacherTrainer")["network_weights"])


def test_modality_dropout_may_start_from_a_teacher(models):
    configure(models, schedule__init_from="MSTKDTeacherTrainer")
    trainer = build("ModalityDropoutTrainer")
    trainer.on_train_start()
    teacher = read(models, trainer="MSTKDTeacherTrainer")["network_weights"]
    assert all(torch.equal(value, teacher[name]) for name, value in trainer.network.state_dict().items())


# ---- folds and validation ------------------------------------------------------------------------------------------


def test_fold_all_uses_a_teacher_of_fold_all(models):
    configure(models, schedule__epochs=1, schedule__iterations=1)
    train("MSTKDTeacherTrainer", fold="all")
    train("MSTKDTrainer", fold="all")
    content = read(models, fold="all")
    assert content["mstkd"]["split"]["train"] == content["mstkd"]["split"]["val"]
    assert len(content["mstkd"]["split"]["train"]) == 6
    assert "fold_all" in content["mstkd"]["teacher"]["path"]


def test_validation_needs_no_teacher(models):
    shutil.rmtree(models.fold("MSTKDTeacherTrainer").parent)
    train(
        "MSTKDTrainer",
        validate=True,
        only_run_validation=True,
        val_with_best=True,
        export_validation_probabilities=True,
    )
    cases = read(models)["mstkd"]["split"]["val"]
    folder = models.fold("MSTKDTrainer") / "validation"
    assert cases and (folder / "summary.json").is_file()
    for case in cases:
        assert (folder / f"{case}.nii.gz").is_file()
        segmentation = sitk.GetArrayFromImage(sitk.ReadImage(folder / f"{case}.nii.gz"))
        probabilities = np.load(folder / f"{case}.npz")["probabilities"]
        assert probabilities.shape == (3, *segmentation.shape)  # three regions
        assert probabilities.min() >= 0 and 0 < probabilities.max() <= 1


def test_switched_off_checkpoints_leave_none(models):
    shutil.rmtree(models.fold("MSTKDTrainer").parent)
    configure(models, schedule__epochs=1, schedule__iterations=1)
    train("MSTKDTrainer", disable_checkpointing=True)
    assert list(models.fold("MSTKDTrainer").glob("*.pth")) == []
    assert (models.fold("MSTKDTrainer").parent / "plans.json").is_file()
