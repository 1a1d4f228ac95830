"""Several training steps with each loaded batch."""

from __future__ import annotations

import itertools
import multiprocessing

import pytest
import torch
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from conftest import draw_nothing, train, train_until_killed
from test_trainers_runs import build, configure, read
from tiny import same

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.methods import ModalityDropoutTrainer
from nnunetv2_mstkd.training.loaders import REPEATED, RepeatingLoader, loader_like, repeating


def test_each_batch_is_given_so_many_times_and_marked_from_the_second_time_on():
    found = list(itertools.islice(RepeatingLoader(iter([{"data": 1}, {"data": 2}, {"data": 3}]), 3), 7))
    assert [batch["data"] for batch in found] == [1, 1, 1, 2, 2, 2, 3]
    assert [REPEATED in batch for batch in found] == [False, True, True, False, True, True, False]


def test_a_host_whose_loader_has_other_attributes_is_an_error():
    class OtherLoader:
        def get_do_oversample(self, sample: int) -> bool:
            return True

    given = SingleThreadedAugmenter(OtherLoader(), None)
    with pytest.raises(RuntimeError, match="has no 'patch_size' in this version"):
        loader_like(given, patch_size=(8, 8, 8))


def test_without_repeats_the_loader_is_nnunets_own():
    loader = iter([])
    assert repeating(loader, 1) is loader


def watched(trainer) -> list[tuple[tuple, torch.Tensor, torch.Tensor]]:
    """Run a training; cases, images and subsets of each step."""
    seen = []
    compute = trainer.compute_losses
    to_device = trainer._to_device

    def noted(batch):
        trainer.cases = tuple(map(str, batch["keys"]))
        return to_device(batch)

    def computed(data, *arguments):
        seen.append((trainer.cases, data.clone()))
        return compute(data, *arguments)

    trainer._to_device, trainer.compute_losses = noted, computed
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        trainer.run_training()
    return seen


def test_steps_share_a_batch_up_to_flips(models):
    configure(models, schedule__epochs=2, schedule__iterations=4, schedule__batch_repeats=2, schedule__seed=1)
    seen = watched(build("ModalityDropoutTrainer"))
    assert len(seen) == 8
    flipped = 0
    for (cases, first), (same_cases, second) in zip(seen[::2], seen[1::2], strict=True):
        assert cases == same_cases
        torch.testing.assert_close(first.flatten().sort().values, second.flatten().sort().values, rtol=0, atol=0)
        flipped += not torch.equal(first, second)
    assert flipped  # each axis with probability 1/2: all four pairs as they were in one of 4096 seeds
    assert not torch.equal(seen[1][1], seen[2][1])


def test_image_and_labels_of_all_resolutions_are_flipped_alike(make_trainer):
    trainer = make_trainer(ModalityDropoutTrainer)
    trainer.inference_allowed_mirroring_axes = (0, 2)
    data = torch.arange(2 * 4 * 4 * 4.0).reshape(2, 1, 4, 4, 4)
    torch.manual_seed(0)
    axes = set()
    for _ in range(20):
        flipped, (fine, coarse) = trainer.flip(data, [data, data[..., ::2, ::2, ::2]])
        assert torch.equal(flipped, fine)
        chosen = next(
            each for each in ((), (2,), (4,), (2, 4)) if torch.equal(flipped, data.flip(each) if each else data)
        )
        expected = data[..., ::2, ::2, ::2]
        assert torch.equal(coarse, expected.flip(chosen) if chosen else expected)
        axes.add(chosen)
    assert axes == {(), (2,), (4,), (2, 4)}
    trainer.inference_allowed_mirroring_axes = None
    assert trainer.flip(data, data)[0] is data


def test_a_resumed_training_equals_an_uninterrupted_one(models):
    configure(models, schedule__epochs=3, schedule__iterations=4, schedule__batch_repeats=2, schedule__patch_phases=2)
    train("ModalityDropoutTrainer")
    whole = read(models, trainer="ModalityDropoutTrainer")
    train_until_killed("ModalityDropoutTrainer", 1)
    train("ModalityDropoutTrainer", continue_training=True)
    resumed = read(models, trainer="ModalityDropoutTrainer")
    assert same(whole["network_weights"], resumed["network_weights"])


def test_worker_processes_end(models, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    configure(models, schedule__epochs=2, schedule__iterations=2, schedule__batch_repeats=2, schedule__patch_phases=2)
    draw_nothing(monkeypatch)
    build("ModalityDropoutTrainer").run_training()
    assert not multiprocessing.active_children()


def test_repeats_must_divide_the_steps_of_an_epoch(make_trainer):
    with pytest.raises(
        InputError, match=r"schedule\.batch_repeats is 3, expected a divisor of schedule\.iterations, 250"
    ):
        make_trainer(ModalityDropoutTrainer, block={"schedule": {"batch_repeats": 3}})
