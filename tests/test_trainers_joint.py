"""MST-KDNet as published: teacher and student in the same steps, one subset per batch, Dice alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import LABELS_WITH_IGNORE, NO_TERMS, REGIONS, REGIONS_WITH_IGNORE, batch, same, state

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.methods import AdaMMTrainer, MedMAPKDTrainer, ModalityDropoutTrainer, MSTKDTrainer, SMMLTrainer
from nnunetv2_mstkd.methods.mstkd import published
from nnunetv2_mstkd.methods.mstkd.settings import TERMS
from nnunetv2_mstkd.nnunet import checkpoints

PAPER = {"mstkd": {"recipe": "paper"}}
JOINT = {"teacher": {"joint": True}}


# ---- the teacher ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [MSTKDTrainer, AdaMMTrainer])
def test_both_networks_learn_and_only_the_student_is_the_model(make_trainer, tmp_path, cls):
    trainer = make_trainer(cls, block=JOINT)
    teacher, student = state(trainer.teacher), state(trainer.network)
    result = [trainer.train_step(batch(trainer, seed=seed)) for seed in range(2)][-1]
    assert list(result["terms"])[:2] == ["segmentation", "teacher"]
    assert not same(teacher, state(trainer.teacher)) and not same(student, state(trainer.network))
    file = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    content = checkpoints.read(file)
    assert content["network_weights"].keys() == trainer.network.state_dict().keys()
    assert same(content["mstkd"]["teacher_network"], trainer.teacher.state_dict())

    other = make_trainer(cls, block=JOINT, seed=9)
    other.load_checkpoint(str(file))
    assert same(state(other.teacher), state(trainer.teacher))
    for each in (trainer, other):
        torch.manual_seed(4)
        each._subset_generator.manual_seed(4)
        each.current_epoch = each._step_in_epoch = 0
        each.train_step(batch(each, seed=7))
    assert same(state(other.teacher), state(trainer.teacher)) and same(state(other.network), state(trainer.network))


def test_the_losses_of_both_are_weighted(make_trainer):
    trainer = make_trainer(MSTKDTrainer, block={**NO_TERMS, "teacher": {"joint": True, "joint_weight": 0.25}})
    content = batch(trainer)
    losses = trainer.compute_losses(content["data"], content["target"])
    student, teacher = losses.terms["segmentation"].item(), losses.terms["teacher"].item()
    assert losses.total.item() == pytest.approx(0.75 * student + 0.25 * teacher)
    expected = trainer.loss(trainer.teacher(content["data"]), content["target"]).item()
    assert teacher == pytest.approx(expected, rel=1e-4)
    losses.total.backward()
    assert all(p.grad is not None for p in trainer.teacher.encoder.parameters())


def test_published_terms_pull_at_the_teacher_and_relative_ones_do_not(make_trainer):
    found = {}
    for form in ("published", "relative"):
        section = {**dict.fromkeys(TERMS, 0), "maps": 1.0, "form": form}
        trainer = make_trainer(MSTKDTrainer, block={**JOINT, "mstkd": section})
        content = batch(trainer)
        losses = trainer.compute_losses(content["data"], content["target"])
        parameters = list(trainer.teacher.transformer.parameters())
        gradients = torch.autograd.grad(losses.terms["maps"], parameters, allow_unused=True)
        found[form] = any(gradient is not None and bool(gradient.any()) for gradient in gradients)
    assert found == {"published": True, "relative": False}


def test_an_incomplete_case_does_not_train_the_teacher(make_trainer):
    trainer = make_trainer(MSTKDTrainer, block={**NO_TERMS, **JOINT, "teacher": {"joint": True}})
    content = batch(trainer)
    present = torch.tensor([[True] * 4, [True, False, True, True]])
    losses = trainer.compute_losses(content["data"], content["target"], present)
    first = trainer.loss(trainer.teacher(content["data"][:1]), [level[:1] for level in content["target"]])
    assert losses.terms["teacher"].item() == pytest.approx(first.item() / 2, rel=1e-4)


def test_a_teacher_of_all_cases_learns_from_incomplete_ones(make_trainer):
    trainer = make_trainer(MSTKDTrainer, block={**NO_TERMS, "teacher": {"joint": True, "cases": "all"}})
    content = batch(trainer)
    present = torch.tensor([[True] * 4, [True, False, True, True]])
    losses = trainer.compute_losses(content["data"], content["target"], present)
    expected = trainer.loss(trainer.teacher(content["data"]), content["target"]).item()
    assert losses.terms["teacher"].item() == pytest.approx(expected, rel=1e-4)


def test_no_teacher_is_looked_for(make_trainer):
    trainer = make_trainer(MSTKDTrainer, block=PAPER)
    trainer.prepare_training()  # without a teacher's checkpoint this would raise
    assert trainer.teacher.training and trainer._teacher_identity is None


# ---- the recipe ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize(
    "labels", [REGIONS, REGIONS_WITH_IGNORE, LABELS_WITH_IGNORE], ids=["regions", "both", "labels"]
)
def test_the_paper_recipe_trains_with_every_term(make_trainer, labels, dimensions):
    trainer = make_trainer(MSTKDTrainer, block=PAPER, labels=labels, dimensions=dimensions)
    result = [trainer.train_step(batch(trainer, seed=seed)) for seed in range(3)][-1]
    assert list(result["terms"]) == ["segmentation", "teacher", *TERMS, "content"]
    assert np.isfinite(list(result["terms"].values())).all() and min(result["terms"].values()) > 0


def test_the_paper_recipe_is_that_of_the_paper(make_trainer):
    trainer = make_trainer(MSTKDTrainer, block=PAPER)
    assert trainer.network.transformer.joins and not trainer.enable_deep_supervision
    group = trainer.optimizer.param_groups[0]
    assert (type(trainer.optimizer), group["lr"], group["weight_decay"]) == (torch.optim.Adam, 1e-4, 1e-5)
    assert group["betas"] == (0.9, 0.99)
    moved = {id(parameter) for parameter in group["params"]}
    assert all(id(p) in moved for net in (trainer.network, trainer.teacher) for p in net.transformer.parameters())
    content = batch(trainer)
    target = trainer.read_target(content["target"])
    with torch.no_grad():
        logits = trainer.network(content["data"])
    expected = published.dice(logits, target.label, regions=trainer.label_manager.has_regions)
    assert trainer.loss(logits, content["target"]).item() == pytest.approx(expected.item())


def test_as_published_the_discrepancy_alone_rises(make_trainer):
    trainer = make_trainer(MSTKDTrainer, block={**PAPER, "schedule": {"epochs": 10, "iterations": 10}})
    for epoch, expected in ((0, np.exp(-5)), (1, np.exp(-5 / 4)), (2, 1.0), (9, 1.0)):
        trainer.current_epoch, trainer._step_in_epoch = epoch, 0
        factors = {term.name: (term.factor or trainer.teacher_factor)() for term in trainer.terms}
        assert factors.pop("discrepancy") == pytest.approx(expected)
        assert set(factors.values()) == {1.0}


def test_without_deep_supervision_no_head_is_trained_in_vain(make_trainer):
    trainer = make_trainer(MSTKDTrainer, block=PAPER)
    content = batch(trainer)
    trainer.compute_losses(content["data"], content["target"]).total.backward()
    for network in (trainer.network, trainer.teacher):
        for name, parameter in network.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name


# ---- one subset per batch ------------------------------------------------------------------------------------------


def test_one_subset_for_the_whole_batch(make_trainer):
    trainer = make_trainer(ModalityDropoutTrainer, block={"sampler": {"per_batch": True}})
    drawn = [trainer.draw_availability(6) for _ in range(40)]
    assert all((rows == rows[0]).all() and rows.any() for rows in drawn)
    assert len({tuple(rows[0].tolist()) for rows in drawn}) > 5


def test_the_subset_of_a_batch_lies_within_all_cases(make_trainer):
    trainer = make_trainer(ModalityDropoutTrainer, block={"sampler": {"per_batch": True}})
    present = torch.tensor([[True, True, False, True], [False, True, True, True]])
    for _ in range(20):
        rows = trainer.draw_availability(2, present)
        assert torch.equal(rows[0], rows[1]) and not rows[0, 0] and not rows[0, 2] and rows.any()
    apart = torch.tensor([[True, False, False, False], [False, True, False, False]])
    assert torch.equal(trainer.draw_availability(2, apart), apart)


def test_smml_refuses_one_subset_per_batch(make_trainer):
    with pytest.raises(InputError, match=r"sampler\.per_batch: SMML draws two subsets per sample"):
        make_trainer(SMMLTrainer, block={"sampler": {"per_batch": True}})


@pytest.mark.parametrize("cls", [SMMLTrainer, MedMAPKDTrainer], ids=lambda cls: cls.__name__)
def test_what_a_recipe_has_set_is_refused_by_its_name(make_trainer, cls):
    with pytest.raises(InputError, match=r"\(mstkd\.recipe=paper sets it; take a configuration without this recipe\)"):
        make_trainer(cls, block={"mstkd": {"recipe": "paper"}})


# ---- weight decay --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "default"), [("sgd", 3e-5), ("adamw", 0.01), ("adam", 0.0)])
def test_weight_decay(make_trainer, optimizer, default):
    for given, expected in ((None, default), (0.5, 0.5)):
        schedule = {"optimizer": optimizer, "weight_decay": given}
        trainer = make_trainer(ModalityDropoutTrainer, block={"schedule": schedule})
        assert trainer.optimizer.param_groups[0]["weight_decay"] == expected
