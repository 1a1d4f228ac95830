"""The divergence from the teacher's probabilities, and the term that every distilling trainer can have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import NO_TERMS, batch, give_teacher, wake

from nnunetv2_mstkd import methods
from nnunetv2_mstkd.losses.soft_labels import soft_label_divergence

KINDS = pytest.mark.parametrize("regions", [True, False], ids=["regions", "classes"])


def test_value_by_hand():
    teacher, student = torch.logit(torch.tensor([[[0.9, 0.5]]])), torch.logit(torch.tensor([[[0.6, 0.5]]]))
    divergence = 0.9 * np.log(0.9 / 0.6) + 0.1 * np.log(0.1 / 0.4)
    assert float(soft_label_divergence(student, teacher, regions=True)) == pytest.approx(divergence / 2, abs=1e-6)
    teacher, student = torch.tensor([[[0.7], [0.3]]]).log(), torch.tensor([[[0.2], [0.8]]]).log()
    divergence = 0.7 * np.log(0.7 / 0.2) + 0.3 * np.log(0.3 / 0.8)
    assert float(soft_label_divergence(student, teacher, regions=False)) == pytest.approx(divergence, abs=1e-6)


@KINDS
def test_equal_logits_cost_nothing_and_others_do(regions):
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float16)
    assert float(soft_label_divergence(logits, logits, regions=regions)) == pytest.approx(0, abs=1e-6)
    assert soft_label_divergence(logits, logits.flip(0), regions=regions) > 0.01


@KINDS
def test_gradient_reaches_the_student_only(regions):
    student, teacher = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    soft_label_divergence(student, teacher, regions=regions).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@KINDS
def test_invalid_voxels_do_not_count(regions):
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    valid = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    valid[:, :, :2] = True
    expected = soft_label_divergence(student[:, :, :2], teacher[:, :, :2], regions=regions)
    student[:, :, 2:], teacher[:, :, 2:] = float("nan"), float("inf")
    assert torch.allclose(soft_label_divergence(student, teacher, regions=regions, valid=valid), expected)
    assert soft_label_divergence(student, teacher, regions=regions, valid=valid & False) == 0


@KINDS
def test_weights_of_voxels_scale_the_loss(regions):
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    whole = soft_label_divergence(student, teacher, regions=regions)
    half = soft_label_divergence(student, teacher, regions=regions, voxel_weight=torch.full((2, 1, 4, 4), 0.5))
    assert torch.allclose(half, whole / 2)


@pytest.mark.parametrize("name", ["MSTKDTrainer", "AdaMMTrainer", "MedMAPMSTKDTrainer"])
def test_every_distilling_trainer_can_have_the_term(make_trainer, name):
    block = {**NO_TERMS, "distillation": {"soft_labels": 1.0, "where": "everywhere", "ramp": 0, "fade": 0}}
    trainer = give_teacher(make_trainer(getattr(methods, name), block=block))
    wake(trainer.network)
    assert trainer.needs_teacher
    trainer.on_train_epoch_start()
    content = batch(trainer)
    terms = trainer.compute_losses(content["data"], content["target"]).terms
    assert terms["soft_labels"] > 0


def test_where_holds_for_soft_labels(make_trainer):
    block = {**NO_TERMS, "distillation": {"soft_labels": 1.0, "where": "teacher_better", "ramp": 0, "fade": 0}}
    trainer = give_teacher(make_trainer(methods.MSTKDTrainer, block=block))
    trainer.on_train_epoch_start()
    weights = []
    real = trainer.voxel_weight
    trainer.voxel_weight = lambda *arguments: weights.append(real(*arguments)) or weights[-1]
    content = batch(trainer)
    trainer.compute_losses(content["data"], content["target"])
    assert set(weights[0].unique().tolist()) == {0.0, 1.0}
