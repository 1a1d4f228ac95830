"""Plain distillation, and the defaults that each distilling method has for itself."""

from __future__ import annotations

import pytest
import torch
from conftest import train
from test_trainers_runs import configure, log_text, read
from tiny import batch, give_teacher, state

from nnunetv2_mstkd.methods import AdaMMTrainer, KDTeacherTrainer, KDTrainer, MedMAPKDTrainer, MSTKDTrainer
from nnunetv2_mstkd.nnunet.plans import BLOCK
from nnunetv2_mstkd.training.settings import DistillationSettings

OWN = {KDTrainer: (1.0, "everywhere", 0.0, 2), MedMAPKDTrainer: (1.0, "everywhere", 0.0, 2)}
OTHERS = (0.0, "teacher_better", 0.5, 1)


@pytest.mark.parametrize("cls", [KDTrainer, MedMAPKDTrainer, MSTKDTrainer, AdaMMTrainer], ids=lambda cls: cls.__name__)
def test_nulls_are_the_methods_own(make_trainer, cls):
    trainer = make_trainer(cls)
    section = trainer.settings[DistillationSettings]
    assert (section.soft_labels, section.where, section.fade, section.every) == OWN.get(cls, OTHERS)
    written = trainer.configuration_manager.configuration[BLOCK]["distillation"]
    assert (written["soft_labels"], written["where"], written["fade"], written["every"]) == OWN.get(cls, OTHERS)
    given = {"distillation": {"soft_labels": 0.25, "where": "teacher_better", "fade": 0.125, "every": 3}}
    section = make_trainer(cls, block=given).settings[DistillationSettings]
    assert (section.soft_labels, section.where, section.fade, section.every) == (0.25, "teacher_better", 0.125, 3)


def divergence(theirs: torch.Tensor, ours: torch.Tensor, *, regions: bool) -> torch.Tensor:
    """The Kullback-Leibler divergence by its definition, from logits."""
    if regions:
        p, q = theirs.sigmoid(), ours.sigmoid()
        return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    p, q = theirs.softmax(1), ours.softmax(1)
    return (p * (p / q).log()).sum(1).mean()


@pytest.mark.parametrize("regions", [False, True])
def test_the_loss_is_the_label_and_the_teachers_probabilities(make_trainer, regions):
    from tiny import LABELS, REGIONS

    labels = REGIONS if regions else LABELS
    trainer = give_teacher(make_trainer(KDTrainer, labels=labels, block={"distillation": {"ramp": 0}}))
    content, seen = batch(trainer), []
    trainer.network.register_forward_hook(lambda module, given, output: seen.append(output[0]))
    step = trainer.compute_losses(content["data"], content["target"])
    theirs, ours = trainer.teacher(content["data"]), seen[0]
    expected = divergence(theirs, ours, regions=regions)
    assert list(step.terms) == ["segmentation", "soft_labels"]
    torch.testing.assert_close(step.terms["soft_labels"], expected)
    # in every second step, with twice the weight
    torch.testing.assert_close(step.total, step.terms["segmentation"] + 2 * expected)
    trainer._step_in_epoch = 1
    step = trainer.compute_losses(content["data"], content["target"])
    assert list(step.terms) == ["segmentation"]
    assert step.total == step.terms["segmentation"]


def test_teacher_and_student_have_the_plans_network(make_trainer):
    names = {cls: list(state(make_trainer(cls).network)) for cls in (KDTeacherTrainer, KDTrainer)}
    assert names[KDTeacherTrainer] == names[KDTrainer]
    assert not any("transformer" in name or "adapter" in name for name in names[KDTrainer])


def test_a_whole_training(models):
    configure(models)
    train("KDTeacherTrainer")
    train("KDTrainer")
    text = log_text(models.fold("KDTrainer"))
    assert "started from the teacher" in text and "soft_labels" in text
    assert read(models, trainer="KDTrainer")["mstkd"]["teacher"]["trainer"] == "KDTeacherTrainer"
