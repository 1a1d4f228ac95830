"""Online validation: which subset each sample gets, and what becomes of the counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import LABELS, LABELS_WITH_IGNORE, REGIONS_WITH_IGNORE, batch

from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.methods import ModalityDropoutTrainer
from nnunetv2_mstkd.training import modality_dropout


def result(counts, rows, loss=1.0):
    return {"loss": np.float32(loss), "counts": np.array(counts, dtype=np.float32), "rows": np.array(rows)}


def logged(trainer, key):
    return trainer.logger.get_value(key, step=-1)


def test_each_epoch_walks_the_same_subsets(make_trainer):
    trainer = make_trainer(ModalityDropoutTrainer, batch_size=4)
    for _ in range(2):
        trainer.on_validation_epoch_start()
        with torch.no_grad():
            rows = [trainer.validation_step(batch(trainer))["rows"].tolist() for _ in range(4)]
        assert [row for step in rows for row in step] == [*range(15), 0]


def test_each_sample_is_masked_with_its_entry_of_the_list(make_trainer):
    trainer = make_trainer(ModalityDropoutTrainer, batch_size=3)
    seen = []
    trainer.network.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0] != 0).flatten(2).any(2)))
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        for _ in range(5):
            trainer.validation_step(batch(trainer))
    assert torch.equal(torch.cat(seen), modalities.all_subsets(4))


@pytest.mark.parametrize(
    ("channels", "batch_size", "asked", "steps"),
    [(4, 2, 1, 8), (4, 15, 1, 1), (4, 4, 1, 4), (4, 2, 50, 50), (2, 2, 1, 2), (3, 7, 1, 1), (7, 2, 1, 8)],
)
def test_there_are_enough_validation_steps_for_every_subset(make_trainer, channels, batch_size, asked, steps):
    block = {"schedule": {"validation_iterations": asked}}
    trainer = make_trainer(ModalityDropoutTrainer, channels=channels, batch_size=batch_size, block=block)
    assert trainer.num_val_iterations_per_epoch == steps


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_share_the_list_as_they_share_the_batch(make_trainer, monkeypatch, ranks):
    whole = 5
    trainer = make_trainer(ModalityDropoutTrainer, batch_size=whole)
    monkeypatch.setattr(modality_dropout, "world_size", lambda: ranks)
    trainer.on_validation_epoch_start()
    trainer._validation_step = 2
    rows = []
    for rank in range(ranks):
        monkeypatch.setattr(modality_dropout, "rank", lambda rank=rank: rank)
        # nnU-Net's own division of a batch
        size = whole // ranks + (rank < whole % ranks)
        rows += trainer._validation_rows(size).tolist()
    assert rows == [10, 11, 12, 13, 14]


def test_score_is_the_mean_over_subsets(make_trainer):
    trainer = make_trainer(ModalityDropoutTrainer, channels=2)
    # two heads; true positives, false positives, false negatives. Subset 0 in two steps, subset 1 and 2 once
    trainer.on_validation_epoch_end(
        [
            result([[[1, 0, 1], [0, 0, 4]], [[90, 10, 10], [50, 0, 0]]], [0, 1], loss=1.0),
            result([[[1, 2, 1], [0, 0, 0]], [[0, 5, 0], [0, 0, 0]]], [0, 2], loss=3.0),
        ]
    )
    # head 0: subset 0: 2*2/(2*2+2+2) = 0.5; subset 1: 180/200 = 0.9; subset 2: 0/5 = 0
    # head 1: subset 0: 0/4 = 0;               subset 1: 100/100 = 1;  subset 2: nothing to find and nothing found
    assert logged(trainer, "mean_fg_dice") == pytest.approx((0.25 + 0.95 + 0.0) / 3)
    assert logged(trainer, "dice_per_class_or_region") == pytest.approx([1.4 / 3, 0.5])
    assert logged(trainer, "val_losses") == 2.0


def test_subset_without_foreground_is_left_out(make_trainer):
    trainer = make_trainer(ModalityDropoutTrainer, channels=2)
    trainer.on_validation_epoch_end([result([[[8, 1, 1], [3, 1, 1]], [[0, 0, 0], [0, 0, 0]]], [0, 1])])
    assert logged(trainer, "mean_fg_dice") == pytest.approx((16 / 18 + 6 / 8) / 2)


def test_epoch_without_foreground_has_a_score(make_trainer):
    trainer = make_trainer(ModalityDropoutTrainer, channels=2)
    trainer.on_validation_epoch_end([result([[[0, 0, 0], [0, 0, 0]]], [0])])
    assert logged(trainer, "mean_fg_dice") == 0
    assert logged(trainer, "ema_fg_dice") == 0
    assert np.isnan(logged(trainer, "dice_per_class_or_region")).all()


def test_label_counts_are_per_sample(make_trainer):
    trainer = make_trainer(ModalityDropoutTrainer, labels=LABELS, dimensions=2)
    predicted = torch.tensor([[0, 1, 1, 2], [2, 2, 0, 0]])
    target = torch.tensor([[0, 1, 2, 2], [0, 2, 0, 1]]).reshape(2, 1, 2, 2)
    output = torch.nn.functional.one_hot(predicted, 3).movedim(-1, 1).reshape(2, 3, 2, 2).float()
    counts = trainer._count(output, target.short())
    assert counts.tolist() == [[[1, 1, 0], [1, 0, 1]], [[0, 0, 1], [1, 1, 0]]]


def test_voxels_with_the_ignore_label_are_not_counted(make_trainer):
    trainer = make_trainer(ModalityDropoutTrainer, labels=LABELS_WITH_IGNORE, dimensions=2)
    predicted = torch.tensor([[1, 1, 2, 2]])
    target = torch.tensor([1, 3, 3, 2]).reshape(1, 1, 2, 2)
    output = torch.nn.functional.one_hot(predicted, 3).movedim(-1, 1).reshape(1, 3, 2, 2).float()
    assert trainer._count(output, target.short()).tolist() == [[[1, 0, 0], [1, 0, 0]]]
    assert target.flatten().tolist() == [1, 3, 3, 2]


def test_counts_of_regions_leave_the_ignore_label_out(make_trainer):
    trainer = make_trainer(ModalityDropoutTrainer, labels=REGIONS_WITH_IGNORE, dimensions=2)
    output = torch.tensor([[1.0, 1.0, -1.0, 1.0], [-1.0, 1.0, 1.0, -1.0]]).reshape(1, 2, 2, 2)
    # whole, core, ignore
    target = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 1]]).bool().reshape(1, 3, 2, 2)
    assert trainer._count(output, target).tolist() == [[[1, 1, 1], [1, 1, 0]]]
