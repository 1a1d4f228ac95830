"""Nothing of a missing modality may reach the student: not through the network, the loss or the gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar
from unittest import SkipTest

import pytest
import torch
from tiny import LABELS, NO_TERMS, REGIONS, batch, give_teacher, wake

from nnunetv2_mstkd import methods, modalities
from nnunetv2_mstkd.methods import AdaMMTrainer, ModalityDropoutTrainer, MSTKDTrainer
from nnunetv2_mstkd.testing import assert_no_leak, check_no_leak
from nnunetv2_mstkd.training.modality_dropout import Segmentation
from nnunetv2_mstkd.training.settings import Section, Weight
from nnunetv2_mstkd.training.step import Term

CHANNELS = 4
STUDENTS = [
    trainer
    for trainer in (getattr(methods, name) for name in methods.__all__)
    if issubclass(trainer, ModalityDropoutTrainer)
]


def make_student(make_trainer, cls, *, channels: int = CHANNELS, adamm: dict | None = None, **options):
    block = {**NO_TERMS, "adamm": {**NO_TERMS["adamm"], **(adamm or {})}}
    trainer = make_trainer(cls, batch_size=2**channels - 1, channels=channels, block=block, edge=8, **options)
    wake(trainer.network)
    return trainer


@pytest.mark.parametrize("labels", [LABELS, REGIONS], ids=["labels", "regions"])
@pytest.mark.parametrize("student", STUDENTS, ids=lambda cls: cls.__name__)
def test_absent_channels_change_nothing(make_trainer, student, labels):
    assert_no_leak(make_student(make_trainer, student, labels=labels))


@pytest.mark.parametrize("student", STUDENTS, ids=lambda cls: cls.__name__)
def test_two_dimensional_trainers_do_not_leak(make_trainer, student):
    assert_no_leak(make_student(make_trainer, student, dimensions=2))


@pytest.mark.parametrize(
    "options",
    [
        {"channels": 2},
        {"channels": 3, "residual": True},
        {"channels": 6, "dimensions": 2},
        {"channels": 6},
        {"dimensions": 2, "residual": True, "labels": REGIONS},
        {"adamm": {"bank": "factorised"}},
        {"adamm": {"subsets": ["T0", "T1+T3"], "refinement": "dense"}},
        {"adamm": {"adapters": False, "presence": False}},
    ],
    ids=str,
)
def test_subset_aware_networks_do_not_leak(make_trainer, options):
    assert_no_leak(make_student(make_trainer, AdaMMTrainer, **options))


@pytest.mark.parametrize("channel", range(CHANNELS))
@pytest.mark.parametrize("student", STUDENTS, ids=lambda cls: cls.__name__)
def test_mask_that_forgets_a_channel_is_caught(make_trainer, monkeypatch, student, channel):
    real = modalities.mask_modalities

    def forgetful(data, availability):
        availability = availability.clone()
        availability[:, channel] = True
        return real(data, availability)

    trainer = make_student(make_trainer, student)
    monkeypatch.setattr(modalities, "mask_modalities", forgetful)
    with pytest.raises((AssertionError, FloatingPointError)):
        assert_no_leak(trainer)


@pytest.mark.parametrize("student", [MSTKDTrainer, AdaMMTrainer], ids=lambda cls: cls.__name__)
def test_distillation_leaks_only_through_the_teacher(make_trainer, monkeypatch, student):
    """With what the teacher says held fixed, absent channels change nothing, whatever terms are active."""
    trainer = give_teacher(make_trainer(student, batch_size=2**CHANNELS - 1, block={"adamm": {"adversarial": 0.01}}))
    wake(trainer.network)
    assert len(trainer.terms) == 6
    fixed = trainer.forward_teacher(batch(trainer)["data"])
    monkeypatch.setattr(trainer, "forward_teacher", lambda complete: fixed)
    assert_no_leak(trainer)


def test_every_masking_trainer_is_tested():
    assert {cls.__name__ for cls in STUDENTS} == set(methods.__all__) - {
        "FullModalityTrainer", "MSTKDTeacherTrainer", "AdaMMTeacherTrainer", "MedMAPTeacherTrainer", "KDTeacherTrainer",
    }  # fmt: skip


# ---- the check itself ------------------------------------------------------------------------------------------------


class PenaltyTrainer(ModalityDropoutTrainer):
    """With a term, so that steps go through forward_student."""

    def make_terms(self):
        return (Term("size", 0.01, lambda student, _, target: student.logits.square().mean(), needs_teacher=False),)


class ShapeLeak(PenaltyTrainer):
    """Present channels are moved where any channel, absent ones included, has signal."""

    def forward_student(self, inputs, complete):
        there = inputs.flatten(2).any(2).reshape(*inputs.shape[:2], *[1] * (inputs.ndim - 2))
        brain = (complete != 0).any(1, keepdim=True)
        return Segmentation(self.network(torch.where(brain & there, inputs + 1, inputs)))


class LateLeak(PenaltyTrainer):
    """Segments the complete batch after a tenth of the training."""

    def forward_student(self, inputs, complete):
        late = self.iteration >= 0.1 * self.total_iterations
        return Segmentation(self.network(complete if late else inputs))


@dataclass(frozen=True, kw_only=True)
class PenaltySettings(Section):
    """How strongly."""

    NAME: ClassVar[str] = "penalty"

    weight: Weight = 0.01
    """Of the term."""


class DeclaredLeak(ModalityDropoutTrainer):
    """Segments the complete batch as long as a term is active that may read it."""

    sections = (*ModalityDropoutTrainer.sections, PenaltySettings)
    reads_complete = ("penalty.weight",)

    def make_terms(self):
        size = Term("size", self.settings[PenaltySettings].weight, PenaltyTrainer.make_terms(self)[0].function, False)
        return (size,)

    def forward_student(self, inputs, complete):
        return Segmentation(self.network(complete))


@pytest.mark.parametrize("leaky", [ShapeLeak, LateLeak, DeclaredLeak], ids=lambda cls: cls.__name__)
def test_a_leak_in_part_of_a_training_is_caught(leaky, tmp_path):
    check_no_leak(PenaltyTrainer, tmp_path / "clean", dimensions=2)
    with pytest.raises(AssertionError, match=r"logits of a sample|a loss is not finite"):
        check_no_leak(leaky, tmp_path / "leaky", dimensions=2)


def test_dropout_is_no_leak(make_trainer):
    trainer = make_trainer(ModalityDropoutTrainer, batch_size=2**CHANNELS - 1, dimensions=2)
    trainer.network.encoder.register_forward_pre_hook(
        lambda module, given: torch.nn.functional.dropout(given[0], 0.1, training=module.training)
    )
    assert_no_leak(trainer)


def test_a_check_that_does_not_apply_is_skipped(tmp_path):
    with pytest.raises(SkipTest, match="FullModalityTrainer is no ModalityDropoutTrainer"):
        check_no_leak(methods.FullModalityTrainer, tmp_path)
