"""Nothing of a missing modality may reach the student: not through the network, the loss or the gradients."""

from __future__ import annotations

import pytest
from tiny import LABELS, NO_TERMS, REGIONS, batch, give_teacher, wake

from nnunetv2_mstkd import methods, modalities
from nnunetv2_mstkd.methods import AdaMMTrainer, ModalityDropoutTrainer, MSTKDTrainer
from nnunetv2_mstkd.testing import assert_no_leak

CHANNELS = 4
STUDENTS = [
    trainer
    for trainer in (getattr(methods, name) for name in methods.__all__)
    if issubclass(trainer, ModalityDropoutTrainer)
]


def make_student(make_trainer, cls, *, channels: int = CHANNELS, adamm: dict | None = None, **options):
    block = {**NO_TERMS, "adamm": {**NO_TERMS["adamm"], **(adamm or {})}}
    trainer = make_trainer(cls, batch_size=2**channels - 1, channels=channels, block=block, **options)
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
