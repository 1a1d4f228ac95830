"""Nothing of a missing modality may reach the student: not through the network, the loss or the gradients."""

from __future__ import annotations

from copy import deepcopy
from typing import NamedTuple

import pytest
import torch
from tiny import LABELS, NO_TERMS, REGIONS, batch, give_teacher, state, wake

from nnunetv2_mstkd import methods as trainers
from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.methods import AdaMMTrainer, ModalityDropoutTrainer, MSTKDTrainer

CHANNELS = 4
STUDENTS = [
    trainer
    for trainer in (getattr(trainers, name) for name in trainers.__all__)
    if issubclass(trainer, ModalityDropoutTrainer)
]


class Observed(NamedTuple):
    """What a training step, or a validation step, lets out."""

    logits: torch.Tensor
    loss: float
    gradients: dict[str, torch.Tensor]
    counts: torch.Tensor


def subsets_of(trainer) -> torch.Tensor:
    return modalities.all_subsets(trainer.num_input_channels)


def finest(output) -> torch.Tensor:
    """The full-resolution logits in what a network returns in training; of two students side by side, (B, 2K, ...)."""
    if hasattr(output, "logits"):
        return finest(output.logits)
    if isinstance(output, torch.Tensor):
        return output.detach()
    return finest(output[0]) if isinstance(output[0], torch.Tensor) else torch.cat([finest(one) for one in output], 1)


def observe(trainer, content: dict, monkeypatch) -> Observed:
    """Take a training step and a validation step of the trainer's own, from the same state each time."""
    before, optimizer, extra = state(trainer.network), trainer.optimizer.state_dict(), deepcopy(trainer.extra_state())
    logits = []
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "draw_availability", lambda size: subsets_of(trainer))
        if hasattr(trainer, "draw_partner"):  # the second student has the same subsets here: fewer would hide a leak
            patch.setattr(trainer, "draw_partner", lambda availability: availability)
        hook = trainer.network.register_forward_hook(lambda network, given, output: logits.append(finest(output)))
        training = trainer.train_step(content)
        hook.remove()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in trainer.network.named_parameters()
        if parameter.grad is not None  # nnU-Net gives the coarsest output the weight 0
    }
    trainer.network.load_state_dict(before)
    trainer.optimizer.load_state_dict(optimizer)
    trainer.load_extra_state(extra)
    trainer._step_in_epoch = 0
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        validation = trainer.validation_step(content)
    trainer.network.train()
    counts = torch.cat([torch.as_tensor(validation["counts"]).flatten(), torch.as_tensor(validation["loss"])[None]])
    return Observed(torch.cat(logits, 1), float(training["loss"]), gradients, counts)


def filled(content: dict, subsets: torch.Tensor, value: float) -> dict:
    """The batch with ``value`` in every channel that its sample does not have."""
    keep = subsets.reshape(*subsets.shape, *[1] * (content["data"].ndim - 2))
    return {**content, "data": torch.where(keep, content["data"], value)}


def assert_no_leak(trainer, monkeypatch) -> None:
    subsets = subsets_of(trainer)
    monkeypatch.setattr(trainer, "validation_subsets", subsets)
    names = [modalities.subset_name(subset, "abcdef"[: subsets.shape[1]]) for subset in subsets]
    content = batch(trainer, batch_size=len(subsets))
    wanted = observe(trainer, content, monkeypatch)
    assert torch.isfinite(wanted.logits).all()
    for value in (float("nan"), 1e30):
        found = observe(trainer, filled(content, subsets, value), monkeypatch)
        for name, one, other in zip(names, wanted.logits, found.logits, strict=True):
            assert torch.equal(one, other), f"logits of a sample that has {name} only"
        assert wanted.loss == found.loss
        assert torch.equal(wanted.counts, found.counts)
        for name, gradient in wanted.gradients.items():
            assert torch.equal(gradient, found.gradients[name]), f"gradient of {name}"


def make_student(make_trainer, cls, *, channels: int = CHANNELS, adamm: dict | None = None, **options):
    block = {**NO_TERMS, "adamm": {**NO_TERMS["adamm"], **(adamm or {})}}
    trainer = make_trainer(cls, batch_size=2**channels - 1, channels=channels, block=block, **options)
    wake(trainer.network)
    return trainer


@pytest.mark.parametrize("labels", [LABELS, REGIONS], ids=["labels", "regions"])
@pytest.mark.parametrize("student", STUDENTS, ids=lambda cls: cls.__name__)
def test_absent_channels_change_no_bit_of_logits_loss_and_gradients(make_trainer, monkeypatch, student, labels):
    assert_no_leak(make_student(make_trainer, student, labels=labels), monkeypatch)


@pytest.mark.parametrize("student", STUDENTS, ids=lambda cls: cls.__name__)
def test_two_dimensional_trainers_do_not_leak(make_trainer, monkeypatch, student):
    assert_no_leak(make_student(make_trainer, student, dimensions=2), monkeypatch)


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
def test_networks_that_know_the_subset_do_not_leak_either(make_trainer, monkeypatch, options):
    assert_no_leak(make_student(make_trainer, AdaMMTrainer, **options), monkeypatch)


@pytest.mark.parametrize("channel", range(CHANNELS))
@pytest.mark.parametrize("student", STUDENTS, ids=lambda cls: cls.__name__)
def test_a_mask_that_forgets_one_channel_is_caught(make_trainer, monkeypatch, student, channel):
    real = modalities.mask_modalities

    def forgetful(data, availability):
        availability = availability.clone()
        availability[:, channel] = True
        return real(data, availability)

    trainer = make_student(make_trainer, student)
    monkeypatch.setattr(modalities, "mask_modalities", forgetful)
    with pytest.raises((AssertionError, FloatingPointError)):
        assert_no_leak(trainer, monkeypatch)


@pytest.mark.parametrize("student", [MSTKDTrainer, AdaMMTrainer], ids=lambda cls: cls.__name__)
def test_with_distillation_what_the_student_gets_of_an_absent_channel_comes_from_the_teacher_alone(
    make_trainer, monkeypatch, student
):
    """With what the teacher says held fixed, absent channels change nothing, whatever terms are active."""
    block = {"adamm": {"adversarial": 0.01}}
    trainer = give_teacher(make_trainer(student, batch_size=2**CHANNELS - 1, block=block))
    wake(trainer.network)
    assert len(trainer.terms) == 6
    fixed = trainer.forward_teacher(batch(trainer)["data"])
    monkeypatch.setattr(trainer, "forward_teacher", lambda data: fixed)
    assert_no_leak(trainer, monkeypatch)
