"""Self-distillation: the model, or the moving average of its weights, is its own teacher."""

from __future__ import annotations

import pytest
import torch
from conftest import train
from test_kd import divergence
from test_trainers_runs import configure, log_text, read
from tiny import LABELS, REGIONS, batch, same, state

from nnunetv2_mstkd.methods import SelfDistillationTrainer
from nnunetv2_mstkd.networks.decoding import finest
from nnunetv2_mstkd.nnunet.case_facts import CaseFacts

AVERAGE = {"self_distillation": {"decay": 0.75}}


@pytest.fixture
def started(make_trainer):
    def start(**block):
        trainer = make_trainer(SelfDistillationTrainer, **block)
        trainer.on_train_epoch_start()
        return trainer

    return start


@pytest.mark.parametrize("regions", [False, True])
def test_the_loss_is_the_label_and_the_own_prediction_from_all_modalities(started, regions):
    trainer = started(labels=REGIONS if regions else LABELS, block={"distillation": {"ramp": 0}})
    trainer.draw_availability = lambda size, present=None: torch.eye(4, dtype=torch.bool)[:size]
    content, seen = batch(trainer), []
    hook = trainer.network.register_forward_hook(lambda module, given, output: seen.append((given[0], output[0])))
    step = trainer.compute_losses(content["data"], content["target"])
    hook.remove()
    (complete, theirs), (masked, ours) = seen
    assert torch.equal(complete, content["data"]) and not torch.equal(masked, complete)
    assert not theirs.requires_grad and ours.requires_grad
    assert trainer.network.training
    assert list(step.terms) == ["segmentation", "soft_labels"]
    expected = divergence(theirs, ours, regions=regions)
    torch.testing.assert_close(step.terms["soft_labels"], expected)
    # in every second step, with twice the weight
    torch.testing.assert_close(step.total, step.terms["segmentation"] + 2 * expected)
    trainer._step_in_epoch = 1
    assert list(trainer.compute_losses(content["data"], content["target"]).terms) == ["segmentation"]


def test_with_the_full_subset_there_is_nothing_to_learn_from_itself(started):
    trainer = started()
    trainer.draw_availability = lambda size, present=None: torch.ones(size, 4, dtype=torch.bool)
    assert trainer.train_step(batch(trainer))["terms"]["soft_labels"] == pytest.approx(0, abs=1e-6)


def test_the_average_follows_the_weights(started):
    trainer = started(block=AVERAGE)
    initial = state(trainer.network)
    weights = [initial]
    for seed in range(3):
        trainer.train_step(batch(trainer, seed=seed))
        weights.append(state(trainer.network))
    average = state(trainer.teacher)
    for name in initial:
        wanted = weights[1][name]  # the first step's weights are taken over
        for later in weights[2:]:
            wanted = 0.75 * wanted + 0.25 * later[name]
        torch.testing.assert_close(average[name], wanted)
    assert not same(average, weights[-1])
    assert not any(parameter.requires_grad for parameter in trainer.teacher.parameters())
    assert not trainer.teacher.training and trainer.network.training


def test_the_average_is_the_teacher(started):
    trainer = started(block={**AVERAGE, "distillation": {"ramp": 0}})
    trainer.train_step(batch(trainer))
    trainer._step_in_epoch, content, seen = 0, batch(trainer, seed=1), []
    with torch.no_grad():
        for parameter in trainer.teacher.parameters():
            parameter.mul_(1.5)
        theirs = trainer.teacher(content["data"])
    trainer.network.register_forward_hook(lambda module, given, output: seen.append(finest(output)))
    step = trainer.compute_losses(content["data"], content["target"])
    (ours,) = seen  # the model itself sees the subset alone
    torch.testing.assert_close(step.terms["soft_labels"], divergence(theirs, ours, regions=False))


def test_an_average_starts_where_the_model_starts(started):
    trainer = started(block=AVERAGE)
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.add_(0.5)  # as weights that are loaded before the first epoch
    trainer.prepare_training()
    assert same(state(trainer.teacher), state(trainer.network))


def test_checkpoints_hold_the_model_and_beside_it_the_average(started, tmp_path):
    trainer, file = started(block=AVERAGE), str(tmp_path / "checkpoint.pth")
    for seed in range(2):
        trainer.train_step(batch(trainer, seed=seed))
    trainer.save_checkpoint(file)
    content = torch.load(file, weights_only=False)
    assert same(content["network_weights"], state(trainer.network))
    resumed = started(block=AVERAGE)
    resumed.load_checkpoint(file)
    resumed.prepare_training()
    assert same(state(resumed.teacher), state(trainer.teacher))
    assert not same(state(resumed.teacher), state(trainer.network))
    for each in (trainer, resumed):
        each.draw_availability = lambda size, present=None: torch.eye(4, dtype=torch.bool)[:size]
        each.current_epoch, each._step_in_epoch = 1, 0
        each.train_step(batch(each, seed=5))
    assert same(state(resumed.network), state(trainer.network))
    assert same(state(resumed.teacher), state(trainer.teacher))
    without = started()
    assert without.average is None and "average" not in without.extra_state()


def test_weights_cast_without_a_graph_are_not_kept_for_the_model(started, monkeypatch):
    """Before torch 2.10 autocast would give them to the model's own pass, whose weights would have no gradient."""
    trainer, calls = started(), []
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: calls.append("cleared"))
    trainer.network.register_forward_hook(lambda module, given, output: calls.append(torch.is_grad_enabled()))
    trainer.train_step(batch(trainer))
    assert calls[:3] == [False, "cleared", True]


def test_incomplete_cases_have_soft_labels_too(started):
    trainer = started(block={"distillation": {"ramp": 0}})
    trainer.case_facts = {f"case_{number}": CaseFacts((True, True, False, False), True) for number in range(2)}
    trainer.draw_availability = lambda size, present=None: torch.eye(4, dtype=torch.bool)[:size]
    assert trainer.train_step(batch(trainer))["terms"]["soft_labels"] > 1e-4


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_whole_training(models, decay):
    configure(models, schedule__epochs=2, self_distillation__decay=decay)
    train("SelfDistillationTrainer", validate=True)
    text = log_text(models.fold("SelfDistillationTrainer"))
    assert "soft_labels" in text and "started from" not in text
    content = read(models, trainer="SelfDistillationTrainer")
    assert all(torch.isfinite(value).all() for value in content["network_weights"].values())
    assert ("average" in content["mstkd"]) == (decay > 0)


def test_a_teacher_may_return_logits_and_nothing_else(make_trainer):
    class Plain(SelfDistillationTrainer):
        def forward_teacher(self, complete):
            return super().forward_teacher(complete).logits

    values = []
    for cls in (SelfDistillationTrainer, Plain):
        trainer = make_trainer(cls, block={"schedule": {"seed": 3}})
        trainer.on_train_epoch_start()
        values.append(trainer.train_step(batch(trainer))["terms"])
    assert values[0] == values[1] and values[0]["soft_labels"] > 0
