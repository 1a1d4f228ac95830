"""A student beside its teacher: what is computed, what moves and what is written."""

from __future__ import annotations

import dataclasses
import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from tiny import (
    LABELS_WITH_IGNORE,
    NO_TERMS,
    REGIONS,
    REGIONS_WITH_IGNORE,
    batch,
    give_teacher,
    memory,
    same,
    state,
    wake,
)

from nnunetv2_mstkd.methods import AdaMMTrainer, ModalityDropoutTrainer, MSTKDTrainer
from nnunetv2_mstkd.methods.mstkd.settings import TERMS
from nnunetv2_mstkd.networks.discriminator import PatchDiscriminator
from nnunetv2_mstkd.nnunet import checkpoints
from nnunetv2_mstkd.training.step import MAX_SKIPPED_STEPS


def only(**weights):
    """Settings with these terms and no others."""
    return {"mstkd": {**dict.fromkeys(TERMS, 0), **weights}}


METHODS = [MSTKDTrainer, AdaMMTrainer]
ADVERSARY = {"adamm": {"adversarial": 0.01}}


@pytest.fixture(params=METHODS, ids=lambda cls: cls.__name__)
def student(request, make_trainer):
    """With every term of its method."""
    return give_teacher(make_trainer(request.param, block=ADVERSARY))


# ---- teacher -------------------------------------------------------------------------------------------------------


def test_the_teacher_does_not_move_and_the_student_does(student):
    teacher, before = state(student.teacher), state(student.network)
    for seed in range(3):
        student.train_step(batch(student, seed=seed))
    assert same(teacher, state(student.teacher))
    assert not same(before, state(student.network))
    assert not student.teacher.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in student.teacher.parameters())


def test_teacher_sees_all_and_student_its_subset(student, monkeypatch):
    subsets = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 1]]).bool()
    monkeypatch.setattr(student, "draw_availability", lambda size, present=None: subsets)
    seen = {}
    for name in ("network", "teacher"):
        getattr(student, name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.__setitem__(name, (inputs[0] != 0).flatten(2).any(2))
        )
    student.train_step(batch(student))
    assert torch.equal(seen["network"], subsets)
    assert seen["teacher"].all()


def test_checkpoint_holds_student_and_teacher_identity(student, tmp_path):
    student._teacher_identity = {"trainer": "MSTKDTeacherTrainer", "path": "a/b", "sha256": "0" * 64}
    student.train_step(batch(student))
    file = tmp_path / "checkpoint_latest.pth"
    student.save_checkpoint(str(file))
    content = checkpoints.read(file)
    assert content["network_weights"].keys() == student.network.state_dict().keys()
    assert set(content["mstkd"]) == {"split", "teacher", "discriminator", "discriminator_optimizer"}
    assert content["mstkd"]["teacher"] == student._teacher_identity

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            for entry in value.values() if isinstance(value, dict) else value:
                yield from tensors(entry)

    # random weights: no other tensor has the same content by chance
    of_teacher = [value for value in student.teacher.state_dict().values() if value.unique().numel() > 2]
    assert len(of_teacher) > 10
    written = list(tensors(content))
    assert not any(torch.equal(one, other) for one in of_teacher for other in written if one.shape == other.shape)


# ---- terms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", [*TERMS, "content"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_each_term_works_alone_and_reaches_the_student(make_trainer, monkeypatch, term, dimensions):
    trainer = give_teacher(make_trainer(MSTKDTrainer, block=only(**{term: 1.0}), dimensions=dimensions))
    wake(trainer.network)
    monkeypatch.setattr(trainer, "loss", lambda output, target: output[0].sum() * 0)
    result = trainer.train_step(batch(trainer))
    assert list(result["terms"]) == ["segmentation", term]
    assert result["terms"]["segmentation"] == 0 and result["terms"][term] > 0
    gradients = [parameter.grad for parameter in trainer.network.parameters() if parameter.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize(
    "block",
    [
        {"mstkd": {"form": "published"}},
        {"mstkd": {"regions": "separate"}},
        {"network": {"placement": "main"}},
        {"mstkd": {"style_encoder": "paper"}},
        {"distillation": {"where": "everywhere"}},
        {"mstkd": {"tau": 7}, "distillation": {"fade": 0, "ramp": 0}},
    ],
    ids=str,
)
@pytest.mark.parametrize("labels", [REGIONS_WITH_IGNORE, LABELS_WITH_IGNORE], ids=["regions", "labels"])
def test_other_forms_of_the_terms_train(make_trainer, block, labels):
    trainer = give_teacher(make_trainer(MSTKDTrainer, block=block, labels=labels))
    result = [trainer.train_step(batch(trainer, seed=seed)) for seed in range(2)][-1]
    assert list(result["terms"]) == ["segmentation", *TERMS]
    assert np.isfinite(list(result["terms"].values())).all()


def test_equal_networks_pay_for_the_adversary_alone(make_trainer, monkeypatch):
    trainer = give_teacher(make_trainer(MSTKDTrainer, block={"distillation": {"where": "everywhere"}}))
    trainer.network.load_state_dict(trainer.teacher.state_dict())
    content = batch(trainer)
    monkeypatch.setattr(trainer, "draw_availability", lambda size, present=None: torch.ones(size, 4, dtype=torch.bool))
    step = trainer.compute_losses(content["data"], content["target"])
    values = {name: value.item() for name, value in step.terms.items()}
    assert all(values[name] == pytest.approx(0, abs=1e-6) for name in TERMS if name != "adversarial")
    assert values["adversarial"] > 0.1


def test_the_total_is_the_weighted_sum_of_the_logged_terms(make_trainer):
    block = {"mstkd": {"evd": 0.5, "maps": 2.0, "kl": 0.25}, "distillation": {"ramp": 0.0, "fade": 0.5}}
    trainer = give_teacher(make_trainer(MSTKDTrainer, block={**block, "schedule": {"epochs": 4, "iterations": 2}}))
    content = batch(trainer)
    trainer.current_epoch, trainer._step_in_epoch = 3, 0  # 6 of 8 iterations: a quarter is left, the factor one half
    step = trainer.compute_losses(content["data"], content["target"])
    assert trainer.teacher_factor() == pytest.approx(0.5)
    assert [term.name for term in trainer.terms] == list(TERMS)
    expected = step.terms["segmentation"] + 0.5 * sum(term.weight * step.terms[term.name] for term in trainer.terms)
    assert step.total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_weights_rise_over_the_ramp_and_fall_over_the_fade(make_trainer):
    block = {"schedule": {"epochs": 10, "iterations": 10}, "distillation": {"ramp": 0.2, "fade": 0.4}}
    trainer = make_trainer(MSTKDTrainer, block=block)
    factors = {}
    for iteration in (0, 10, 20, 60, 80, 99):
        trainer.current_epoch, trainer._step_in_epoch = divmod(iteration, 10)
        factors[iteration] = trainer.teacher_factor()
    assert factors == pytest.approx({0: math.exp(-5), 10: math.exp(-1.25), 20: 1, 60: 1, 80: 0.5, 99: 0.025})


def test_terms_of_weight_zero_cost_nothing(make_trainer):
    trainer = give_teacher(make_trainer(MSTKDTrainer, block=only(maps=0.1)))
    assert trainer.adversary is None
    seen = []
    forward = trainer.forward_student
    trainer.forward_student = lambda *inputs: seen.append(forward(*inputs)) or seen[-1]
    result = trainer.train_step(batch(trainer))
    assert list(result["terms"]) == ["segmentation", "maps"]
    assert seen[0].attention == ()
    assert set(trainer.extra_state()) == {"split", "teacher"}


def test_step_without_terms_is_modality_dropout(make_trainer, monkeypatch):
    trainer = make_trainer(MSTKDTrainer, block=NO_TERMS)
    trainer.teacher = lambda *arguments, **options: pytest.fail("the teacher is not asked")
    monkeypatch.setattr(trainer, "forward_student", lambda *inputs: pytest.fail("no features are computed"))
    assert list(trainer.train_step(batch(trainer))["terms"]) == ["segmentation"]


@pytest.mark.parametrize(
    ("block", "computed"),
    [
        ({}, True),
        ({"distillation": {"where": "everywhere"}}, False),
        ({"mstkd": {"kl": 0, "discrepancy": 0}}, False),
        ({"mstkd": {"kl": 0}}, True),
    ],
    ids=str,
)
def test_voxels_are_compared_only_where_a_term_reads_it(make_trainer, monkeypatch, block, computed):
    from nnunetv2_mstkd.training import soft_labels as module

    calls = []
    real = module.teacher_advantage
    monkeypatch.setattr(module, "teacher_advantage", lambda *a, **o: calls.append(1) or real(*a, **o))
    trainer = give_teacher(make_trainer(MSTKDTrainer, block=block))
    trainer.train_step(batch(trainer))
    assert bool(calls) == computed


def test_target_has_label_foreground_and_valid(make_trainer):
    trainer = make_trainer(MSTKDTrainer, labels=LABELS_WITH_IGNORE, dimensions=2, block=NO_TERMS)
    read = trainer.read_target(torch.tensor([0, 1, 2, 3]).short().reshape(1, 1, 2, 2))
    assert read.label.flatten().tolist() == [0, 1, 2, 0]
    assert read.foreground.flatten().tolist() == [False, True, True, False]
    assert read.valid.flatten().tolist() == [True, True, True, False]
    trainer = make_trainer(MSTKDTrainer, labels=REGIONS_WITH_IGNORE, dimensions=2, block=NO_TERMS)
    read = trainer.read_target(torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).bool().reshape(1, 3, 2, 2))
    assert tuple(read.label.shape) == (1, 2, 2, 2)
    assert read.foreground.flatten().tolist() == [False, True, True, False]
    assert read.valid.flatten().tolist() == [True, True, True, False]
    trainer = make_trainer(MSTKDTrainer, labels=REGIONS, dimensions=2, block=NO_TERMS)
    assert trainer.read_target(torch.zeros(1, 2, 2, 2).bool()).valid is None


# ---- adversary -----------------------------------------------------------------------------------------------------


def test_the_discriminator_moves_by_its_own_step_only(student, monkeypatch):
    before = state(student.adversary.discriminator)
    with monkeypatch.context() as patch:
        patch.setattr(student, "after_step", lambda losses: None)
        student.train_step(batch(student))
    assert same(before, state(student.adversary.discriminator))
    assert all(parameter.grad is None for parameter in student.adversary.discriminator.parameters())
    student.train_step(batch(student))
    assert not same(before, state(student.adversary.discriminator))


def test_the_discriminator_learns_to_tell_teacher_from_student(make_trainer):
    trainer = give_teacher(make_trainer(MSTKDTrainer, block=only(adversarial=0.01)))
    for group in trainer.adversary.optimizer.param_groups:
        group["lr"] = 1e-2
    content = batch(trainer)
    values = [float(trainer.train_step(content)["terms"]["adversarial"]) for _ in range(15)]
    assert isinstance(trainer.adversary.discriminator, PatchDiscriminator)
    # what the student pays grows with what the discriminator knows; log 2 when it cannot tell
    assert values[-1] > values[0] and values[-1] > math.log(2)
    assert all(parameter.requires_grad for parameter in trainer.adversary.discriminator.parameters())


def test_features_that_overflow_do_not_break_the_discriminator(student):
    student.train_step(batch(student))
    discriminator = student.adversary.discriminator
    channels = discriminator.hidden[0].in_channels
    student.adversary.step(torch.full((4, channels, 8, 8, 8), float("inf")))
    assert all(torch.isfinite(value).all() for value in discriminator.state_dict().values())
    assert np.isfinite(list(student.train_step(batch(student))["terms"].values())).all()


# ---- not finite ----------------------------------------------------------------------------------------------------


@pytest.fixture
def overflow(student):
    """A student in mixed precision whose gradients overflow until the returned handle is removed."""
    student.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    return next(student.network.parameters()).register_hook(lambda gradient: gradient * float("inf"))


@pytest.mark.parametrize("cls", [ModalityDropoutTrainer, *METHODS], ids=lambda cls: cls.__name__)
def test_nonfinite_loss_stops_and_names_the_cases(make_trainer, monkeypatch, cls):
    trainer = make_trainer(cls)
    if cls in METHODS:
        give_teacher(trainer)
    monkeypatch.setattr(trainer, "draw_availability", lambda size, present=None: torch.ones(size, 4, dtype=torch.bool))
    trainer.train_step(batch(trainer))
    content = batch(trainer)
    content["data"][1, 2, 3, 4, 5] = float("nan")
    before = deepcopy([trainer.network.state_dict(), memory(trainer), trainer.extra_state()])
    trainer.current_epoch = 3
    with pytest.raises(FloatingPointError) as stop:
        trainer.train_step(content)
    message = str(stop.value)
    assert "not finite in epoch 3, iteration 1: total, segmentation" in message
    assert "cases case_0, case_1" in message and "\n" not in message
    assert same(before[0], state(trainer.network))
    assert same(before, [trainer.network.state_dict(), memory(trainer), trainer.extra_state()])


def test_a_term_that_is_not_finite_is_named(student, monkeypatch):
    first, *others = student.terms
    bad = dataclasses.replace(first, function=lambda s, t, target: s.logits.sum() * float("inf"))
    monkeypatch.setattr(student, "terms", (bad, *others))
    with pytest.raises(FloatingPointError, match=f"iteration 0: total, {first.name} "):
        student.train_step(batch(student))


def test_amp_skips_overflows_and_stops_after_20(student, overflow):
    before = state(student.network)
    for _ in range(MAX_SKIPPED_STEPS):
        student.train_step(batch(student))
    assert same(before, state(student.network))
    with pytest.raises(FloatingPointError, match=f"gradients of {MAX_SKIPPED_STEPS} steps in a row"):
        student.train_step(batch(student))


def test_in_mixed_precision_one_good_step_starts_the_count_anew(student, overflow):
    student.train_step(batch(student))
    overflow.remove()
    before = state(student.network)
    student.train_step(batch(student))
    assert student.monitor.skipped_steps == 1  # before this one
    assert not same(before, state(student.network))
    student.train_step(batch(student))
    assert student.monitor.skipped_steps == 0


def test_in_mixed_precision_logits_that_overflow_are_skipped(student):
    student.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    before = state(student.network)
    content = batch(student)
    content["data"].fill_(float("inf"))
    student.train_step(content)
    assert same(before, state(student.network))
    student.train_step(batch(student))
    assert student.monitor.skipped_steps == 1


# ---- compiled ------------------------------------------------------------------------------------------------------


@pytest.mark.compiled
@pytest.mark.parametrize("method", METHODS, ids=lambda cls: cls.__name__)
def test_compiled_networks_are_saved_under_plain_names(make_trainer, monkeypatch, tmp_path, method):
    variants = []
    compile_with_inductor = torch.compile

    def keep(graph, inputs):
        variants.append(graph)
        return graph.forward

    # nnU-Net compiles on CUDA only; the graphs are taken as there, but run as they are
    monkeypatch.setattr(torch, "compile", lambda module: compile_with_inductor(module, backend=keep))
    monkeypatch.setattr(method, "_do_i_compile", lambda self: True)
    trainer = give_teacher(make_trainer(method))
    trainer.teacher = torch.compile(trainer.teacher)
    plain = trainer.plain_network
    assert plain is not trainer.network
    for seed in range(3):
        assert np.isfinite(list(trainer.train_step(batch(trainer, seed=seed))["terms"].values())).all()
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        trainer.validation_step(batch(trainer))
    trainer.network.train()
    trainer.train_step(batch(trainer))
    assert len(variants) < 8
    trainer.save_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    assert checkpoints.read(tmp_path / "checkpoint_latest.pth")["network_weights"].keys() == plain.state_dict().keys()


# ---- a teacher that is not asked in every step -----------------------------------------------------------------------


@pytest.mark.parametrize("adversarial", [0, 0.005])
def test_a_teacher_is_asked_in_every_third_step_with_three_times_the_weight(make_trainer, adversarial):
    block = {
        "mstkd": {"adversarial": adversarial},
        "distillation": {"every": 3, "ramp": 0, "fade": 0},
        "schedule": {"epochs": 2, "iterations": 4},
    }
    trainer = give_teacher(make_trainer(MSTKDTrainer, block=block))
    asked = []
    trainer.teacher.register_forward_pre_hook(lambda module, inputs: asked.append(trainer.iteration))
    outputs = []
    for epoch in range(2):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        outputs.append([trainer.train_step(batch(trainer, seed=step)) for step in range(4)])
    assert asked == [0, 3, 6]
    names = ["segmentation", *(name for name in TERMS if adversarial or name != "adversarial")]
    assert [list(each["terms"]) for each in outputs[0]] == [names, ["segmentation"], ["segmentation"], names]
    trainer.current_epoch, trainer._step_in_epoch = 0, 3
    content = batch(trainer)
    step = trainer.compute_losses(content["data"], content["target"])
    values = {name: value.item() for name, value in step.terms.items()}
    weighted = sum(3 * term.weight * values[term.name] for term in trainer.terms)
    assert step.total.item() == pytest.approx(values["segmentation"] + weighted, rel=1e-5)
    trainer.current_epoch = 1
    trainer.on_train_epoch_end(outputs[1])  # asked once in four steps
    assert trainer.term_log.history()["kl"][-1] == pytest.approx(outputs[1][2]["terms"]["kl"], rel=1e-5)


def test_a_teacher_that_is_not_asked_still_guides_unlabelled_samples(make_trainer):
    trainer = give_teacher(make_trainer(MSTKDTrainer, block={"distillation": {"every": 2}}))
    trainer.unlabelled_batches = iter([{"data": batch(trainer, seed=seed)["data"]} for seed in range(2)])
    rows = []
    trainer.teacher.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    results = [trainer.train_step(batch(trainer, seed=seed)) for seed in range(2)]
    assert rows == [4, 2]
    assert [list(each["terms"])[:2] for each in results] == [["segmentation", "unlabelled"]] * 2
    assert "kl" in results[0]["terms"] and "kl" not in results[1]["terms"]
