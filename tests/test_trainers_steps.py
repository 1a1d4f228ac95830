"""Single steps of every trainer, on hand-made batches."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.training_length.nnUNetTrainer_Xepochs import nnUNetTrainer_5epochs
from tiny import LABELS_WITH_IGNORE, NO_TERMS, REGIONS, REGIONS_WITH_IGNORE, batch, give_teacher, same, state

from nnunetv2_mstkd import methods as trainers
from nnunetv2_mstkd.methods import (
    AdaMMTeacherTrainer,
    FullModalityTrainer,
    ModalityDropoutTrainer,
    MSTKDTrainer,
    SMMLTrainer,
)
from nnunetv2_mstkd.methods.mstkd.settings import TERMS
from nnunetv2_mstkd.nnunet import checkpoints
from nnunetv2_mstkd.training.distillation import DistillationTrainer

TRAINERS = [getattr(trainers, name) for name in trainers.__all__]
STUDENTS = [cls for cls in TRAINERS if issubclass(cls, ModalityDropoutTrainer)]

VARIANTS = {
    "defaults": {},
    "regions": {"labels": REGIONS},
    "one region": {"labels": {"background": 0, "whole": [1, 2]}},
    "two classes": {"labels": {"background": 0, "lesion": 1}},
    "ignore label": {"labels": LABELS_WITH_IGNORE},
    "regions and ignore label": {"labels": REGIONS_WITH_IGNORE},
    "no deep supervision": {"deep_supervision": False},
    "regions, ignore label, no deep supervision": {"labels": REGIONS_WITH_IGNORE, "deep_supervision": False},
    "batch of 1": {"batch_size": 1},
    "batch of 3": {"batch_size": 3, "batch_dice": True},
    "2 channels": {"channels": 2},
    "3 channels": {"channels": 3},
    "7 channels": {"channels": 7},
    "2d": {"dimensions": 2},
    "2d, regions, no deep supervision": {"dimensions": 2, "labels": REGIONS, "deep_supervision": False},
    "residual encoder": {"residual": True},
    "fold all": {"fold": "all"},
}


def build(make_trainer, cls, options):
    trainer = make_trainer(cls, **options)
    return give_teacher(trainer) if issubclass(cls, DistillationTrainer) else trainer


def test_a_checkpoint_has_all_that_nnunets_own_has(make_trainer, tmp_path):
    trainer = make_trainer(ModalityDropoutTrainer)
    trainer.save_checkpoint(str(tmp_path / "ours.pth"))
    trainer.disable_checkpointing = False
    nnUNetTrainer.save_checkpoint(trainer, str(tmp_path / "host.pth"))
    ours, host = (set(checkpoints.read(tmp_path / f"{name}.pth")) for name in ("ours", "host"))
    assert ours - {"mstkd"} == host


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("cls", TRAINERS, ids=lambda cls: cls.__name__)
def test_a_trainer_takes_training_and_validation_steps(make_trainer, cls, options):
    trainer = build(make_trainer, cls, {"edge": 8, **options})
    before = state(trainer.network)
    losses = [float(trainer.train_step(batch(trainer, seed=seed))["loss"]) for seed in range(2)]
    assert np.isfinite(losses).all()
    after = state(trainer.network)
    assert all(torch.isfinite(value).all() for value in after.values())
    outputs = [name for name in before if name.endswith("decoder.seg_layers.1.weight")]
    assert outputs
    assert all(not torch.equal(before[name], after[name]) for name in (next(iter(before)), *outputs))
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        outputs = [trainer.validation_step(batch(trainer, seed=seed)) for seed in range(2)]
    trainer.on_validation_epoch_end(outputs)
    dice = trainer.logger.get_value("dice_per_class_or_region", step=-1)
    assert len(dice) == trainer.label_manager.num_segmentation_heads - (not trainer.label_manager.has_regions)
    assert 0 <= trainer.logger.get_value("mean_fg_dice", step=-1) <= 1
    assert np.isfinite(trainer.logger.get_value("val_losses", step=-1))


@pytest.mark.parametrize(
    "options",
    [{}, {"labels": REGIONS}, {"dimensions": 2}, {"residual": True}],
    ids=["labels", "regions", "2d", "residual encoder"],
)
@pytest.mark.parametrize(
    "cls", [FullModalityTrainer, ModalityDropoutTrainer, AdaMMTeacherTrainer], ids=lambda cls: cls.__name__
)
def test_with_complete_input_steps_equal_nnunets_own_bit_for_bit(make_trainer, monkeypatch, cls, options):
    weights, losses, rates = [], [], []
    for trainer in (make_trainer(nnUNetTrainer, **options), make_trainer(cls, **options)):
        if type(trainer) is ModalityDropoutTrainer:
            monkeypatch.setattr(
                trainer, "draw_availability", lambda size, present=None: torch.ones(size, 4, dtype=torch.bool)
            )
        results = []
        for epoch in range(2):
            trainer.current_epoch = epoch
            trainer.on_train_epoch_start()
            results += [float(trainer.train_step(batch(trainer, seed=step))["loss"]) for step in range(2)]
        weights.append(state(trainer.network))
        losses.append(results)
        rates.append(trainer.logger.get_value("lrs", step=None))
    assert losses[0] == losses[1]
    assert rates[0] == rates[1] and rates[0][0] == 1e-2
    assert same(*weights)


def test_the_full_modality_trainer_validates_as_nnunet_does(make_trainer):
    results = []
    for trainer in (make_trainer(nnUNetTrainer), make_trainer(FullModalityTrainer)):
        trainer.on_validation_epoch_start()
        with torch.no_grad():
            results.append(trainer.validation_step(batch(trainer)))
    assert results[0].keys() == results[1].keys()
    assert all(np.array_equal(results[0][key], results[1][key]) for key in results[0])


def test_a_budget_changes_the_schedule_and_nothing_else(make_trainer):
    block = {"schedule": {"epochs": 30, "iterations": 5, "validation_iterations": 3}}
    trainer = make_trainer(FullModalityTrainer, block=block)
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (30, 5, 3)
    assert trainer.save_every == 1  # 30 // 20
    assert trainer.lr_scheduler.max_steps == 30
    default = make_trainer(FullModalityTrainer)
    plain = make_trainer(nnUNetTrainer)
    names = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "initial_lr", "save_every")
    assert [getattr(default, name) for name in names] == [getattr(plain, name) for name in names]


class Changed(ModalityDropoutTrainer):
    """As one writes trainers for nnU-Net."""

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cpu")):  # noqa: B008
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.initial_lr = 7, 11, 1e-3


class Mixed(nnUNetTrainer_5epochs, ModalityDropoutTrainer):
    """nnU-Net's own variants are mixed in."""


@pytest.mark.parametrize("normalization", ["auto", "plans"])
@pytest.mark.parametrize(
    "cls", [Changed, Mixed, type("ChangedSMML", (Changed, SMMLTrainer), {})], ids=lambda c: c.__name__
)
def test_what_a_subclass_sets_itself_stays(make_trainer, tmp_path, cls, normalization):
    def values(trainer):
        return trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.optimizer.param_groups[0]["initial_lr"]

    block = {"input": {"normalization": normalization}}
    expected = (5, 250, 1e-2) if cls is Mixed else (7, 11, 1e-3)
    trainer = make_trainer(cls, block=block)
    assert values(trainer) == expected and trainer.lr_scheduler.max_steps == expected[0]
    trainer.current_epoch = trainer.num_epochs
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    again = make_trainer(cls, block=block)
    again.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert values(again) == expected and again.finished


@pytest.mark.parametrize("cls", TRAINERS, ids=lambda cls: cls.__name__)
def test_a_seed_makes_start_and_epoch_repeat(make_trainer, cls):
    def draws(seed, epoch, fold=0):
        trainer = make_trainer(cls, block={"schedule": {"seed": seed}, **NO_TERMS}, fold=fold, seed=torch.seed() % 1000)
        trainer.current_epoch = epoch
        trainer.on_epoch_start()
        numbers = [random.random(), np.random.rand(), torch.rand(()).item()]
        if cls in STUDENTS:
            numbers += trainer.draw_availability(8).flatten().tolist()
        return state(trainer.network), numbers

    weights, numbers = draws(3, 5)
    again, same_numbers = draws(3, 5)
    assert same(weights, again) and numbers == same_numbers
    assert numbers != draws(3, 6)[1]
    assert numbers != draws(3, 5, fold=1)[1]
    others, other_numbers = draws(4, 5)
    assert not same(weights, others) and numbers != other_numbers


def test_a_scheduler_of_another_trainer_moves_between_epochs_only(make_trainer):
    class WithPoly(ModalityDropoutTrainer):
        def configure_optimizers(self):
            optimizer, _ = super().configure_optimizers()
            return optimizer, PolyLRScheduler(optimizer, 0.01, self.num_epochs)

    trainer = make_trainer(WithPoly)
    trainer.on_train_epoch_start()
    rate = trainer.optimizer.param_groups[0]["lr"]
    for step in range(2):
        trainer._step_in_epoch = step
        trainer.train_step(batch(trainer))
    assert trainer.optimizer.param_groups[0]["lr"] == rate == 0.01


def test_each_sample_gets_a_subset_of_its_own(make_trainer, monkeypatch):
    trainer = make_trainer(ModalityDropoutTrainer, batch_size=3)
    subsets = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    monkeypatch.setattr(trainer, "draw_availability", lambda size, present=None: subsets)
    seen = []
    trainer.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    content = batch(trainer)
    trainer.train_step(content)
    assert torch.equal((seen[0] != 0).flatten(2).any(2), subsets)
    assert torch.equal(seen[0][2], content["data"][2])


def test_the_sampler_of_the_settings_is_used(make_trainer):
    block = {"sampler": {"kind": "fixed", "subsets": ["T0", "T1+T3"]}}
    trainer = make_trainer(ModalityDropoutTrainer, block=block)
    rows = {tuple(row) for row in trainer.draw_availability(64).int().tolist()}
    assert rows == {(1, 0, 0, 0), (0, 1, 0, 1)}


def test_the_logged_loss_is_the_segmentation_loss_alone(make_trainer):
    trainer = give_teacher(make_trainer(MSTKDTrainer))
    result = trainer.train_step(batch(trainer))
    assert list(result["terms"]) == ["segmentation", *TERMS]
    assert result["loss"] == result["terms"]["segmentation"]
    values = np.array(list(result["terms"].values()))
    assert np.isfinite(values).all() and (values[1:] > 0).all()


@pytest.mark.parametrize("cls", TRAINERS, ids=lambda cls: cls.__name__)
def test_nonfinite_epoch_saves_nothing(make_trainer, cls):
    trainer = make_trainer(cls, block=NO_TERMS)
    step = {"loss": np.float32("nan"), "terms": {"segmentation": np.nan}}
    with pytest.raises(FloatingPointError, match="epoch 0 is not finite; nothing was saved"):
        trainer.on_train_epoch_end([step, step])
    trainer.on_train_epoch_end([step, {**step, "loss": np.float32(1.0)}])
