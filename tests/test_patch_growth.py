"""Training patches that grow: their sizes, and trainings in several phases."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
import torch
from conftest import CONFIGURATION, draw_nothing, train, train_until_killed
from test_trainers_runs import build, configure, log_text, read
from tiny import same

from nnunetv2_mstkd import methods
from nnunetv2_mstkd.training.patch_growth import compile_each_size, patch_sizes, phase_of

CASES = [
    ((128, 128, 128), (32, 32, 32)),
    ((160, 192, 64), (32, 32, 16)),
    ((512, 448), (64, 64)),
    ((40, 48, 40), (8, 8, 8)),
    ((20, 320, 256), (4, 64, 64)),
    ((50, 30), (8, 4)),
]


@pytest.mark.parametrize(("patch", "strides"), CASES)
def test_sizes_grow_one_axis_at_a_time_from_two_positions_per_axis(patch, strides):
    sizes = patch_sizes(patch, strides)
    assert sizes[-1] == patch
    for size, stride, edge in zip(sizes[0], strides, patch, strict=True):
        assert size == min(2 * stride, edge)
    for smaller, larger in itertools.pairwise(sizes):
        steps = [new - old for old, new in zip(smaller, larger, strict=True)]
        assert sum(step > 0 for step in steps) == 1 and min(steps) == 0
        axis = int(np.argmax(steps))
        assert steps[axis] == strides[axis] or larger[axis] == patch[axis]
    legal = [all(e % s == 0 or e == p for e, s, p in zip(size, strides, patch, strict=True)) for size in sizes]
    assert all(legal)


def test_a_patch_that_cannot_grow_is_the_plans():
    assert patch_sizes((32, 64, 64), (32, 32, 32)) == [(32, 64, 64)]
    assert patch_sizes((8, 8), (8, 8)) == [(8, 8)]


def test_phases_are_equally_long_and_end_with_the_plans_patch():
    found = [phase_of(epoch, 10, 4, (128, 128, 128), (32, 32, 32)) for epoch in range(10)]
    assert [phase.number for phase in found] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert found[0].patch == (64, 64, 64) and found[-1].patch == (128, 128, 128)
    volumes = [np.prod(phase.patch) for phase in found]
    assert volumes == sorted(volumes)
    assert found[0].foreground * 0.33 == pytest.approx(0.5) and found[-1].foreground == 1
    assert {phase_of(epoch, 10, 1, (64, 64), (8, 8)) for epoch in range(10)} == {(0, (64, 64), 1.0)}
    # fewer epochs than phases: the last one is always the plan's
    for epochs in (1, 2, 3):
        assert phase_of(epochs - 1, epochs, 4, (64, 64), (8, 8)) == (epochs - 1, (64, 64), 1.0)


# ---- trainings -----------------------------------------------------------------------------------------------------


def shapes_of(trainer) -> list[tuple[int, ...]]:
    """Run a training; the spatial shapes of its training batches, in order."""
    seen = []
    step = trainer.train_step

    def watched(batch):
        seen.append(tuple(batch["data"].shape[2:]))
        return step(batch)

    trainer.train_step = watched
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        trainer.run_training()
    return seen


@pytest.mark.parametrize(
    "name",
    [
        "MSTKDTrainer",
        "AdaMMTrainer",
        "MedMAPTrainer",
        "SMMLTrainer",
        "MMFormerTrainer",
        "RFNetTrainer",
        "FullModalityTrainer",
    ],
)
def test_every_trainer_takes_growing_patches(models, name):
    configure(models, schedule__epochs=4, schedule__patch_phases=4, schedule__validation_iterations=1)
    if name == "AdaMMTrainer":
        train("AdaMMTeacherTrainer")
    trainer = build(name)
    validated = []
    validate = trainer.validation_step
    trainer.validation_step = lambda batch: (validated.append(tuple(batch["data"].shape[2:])), validate(batch))[1]
    shapes = shapes_of(trainer)
    plan = tuple(trainer.configuration_manager.patch_size)
    volumes = [np.prod(shape) for shape in shapes]
    assert volumes == sorted(volumes) and volumes[0] < volumes[-1] / 8
    assert shapes[-1] == plan and set(validated) == {plan}
    assert len(dict.fromkeys(shapes)) == 4
    log = log_text(models.fold(name))
    assert "(phase 1 of 4); 1 of 2 samples must show foreground" in log
    assert read(models, trainer=name)["init_args"]["plans"]["configurations"][CONFIGURATION]["patch_size"] == list(plan)


def test_all_phases_are_augmented_as_the_planned_patch(models):
    configure(models, schedule__epochs=2, schedule__patch_phases=2)
    trainer = build("ModalityDropoutTrainer")
    planned, asked, given = list(trainer.configuration_manager.patch_size), [], []
    choose, transforms = (
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size,
        trainer.get_training_transforms,
    )

    def chosen():
        asked.append(list(trainer.configuration_manager.patch_size))
        rotation, _, initial, mirrored = choose()
        return rotation, True, initial, mirrored  # as for thick slices

    def kept(patch, rotation, scales, mirrored, dummy_2d, **options):
        given.append((tuple(patch), dummy_2d))
        return transforms(patch, rotation, scales, mirrored, dummy_2d, **options)

    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size = chosen
    trainer.get_training_transforms = kept
    trainer.on_train_start()
    assert asked and all(patch == planned for patch in asked)
    assert [flag for _, flag in given] == [True, True] and given[0][0] == tuple(planned) != given[1][0]
    loader = trainer.dataloader_train.data_loader
    assert loader.patch_size[0] == given[1][0][0] < planned[0] and loader.patch_size[1] > given[1][0][1]


@pytest.mark.compiled
def test_each_patch_size_is_compiled_by_itself(make_trainer):
    from torch._dynamo import config

    network = make_trainer(
        methods.MSTKDTrainer, block={"network": {"max_tokens": 16}}, deep_supervision=False
    ).network.eval()
    assert max(network.transformer.patch) > 1
    torch._dynamo.reset()
    with config.patch(automatic_dynamic_shapes=True, cache_size_limit=2):
        compile_each_size(4)
        compiled = torch.compile(network, backend="aot_eager")
        for size in ((16, 16, 16), (24, 16, 16), (24, 24, 32)):
            data = torch.randn(1, 4, *size)
            with torch.no_grad():
                torch.testing.assert_close(compiled(data), network(data), rtol=1e-3, atol=1e-4)
        assert config.cache_size_limit == 6 * 19


@pytest.mark.compiled
def test_all_graphs_of_all_phases_are_kept():
    """Of nnU-Net's compiled Dice, too: validation has made its own, of the plan's patch, in the first epoch."""
    from torch._dynamo import config

    made = []

    def count(graph, inputs):
        made.append(inputs)
        return graph.forward

    torch._dynamo.reset()
    phases, levels = 4, 7
    with config.patch(automatic_dynamic_shapes=True, cache_size_limit=2):
        compile_each_size(phases)
        dice = torch.compile(lambda logits: (logits.sigmoid() * 2).mean(), backend=count)
        for size in (3, 5, 7, 11, 11):
            for level in range(levels):
                logits = torch.randn(1, 1, size * 64 >> level, requires_grad=True)
                dice(logits)
                with torch.no_grad():
                    dice(logits)
    assert len(made) == 2 * phases * levels


def test_a_resumed_training_equals_an_uninterrupted_one(models):
    configure(models, schedule__epochs=4, schedule__patch_phases=3)
    train("MSTKDTrainer")
    whole = read(models)
    folder = models.fold("MSTKDTrainer")
    shutil.rmtree(folder)
    train_until_killed("MSTKDTrainer", 2)  # phases change after epochs 1 and 2
    torch.manual_seed(99)
    np.random.seed(99)
    train("MSTKDTrainer", continue_training=True)
    resumed = read(models)
    assert same(whole["network_weights"], resumed["network_weights"])
    assert same(whole["optimizer_state"], resumed["optimizer_state"])


def test_worker_processes_are_replaced_and_end(models, monkeypatch):
    import multiprocessing

    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    configure(models, schedule__epochs=2, schedule__patch_phases=2, schedule__iterations=2)
    trainer = build("ModalityDropoutTrainer")
    shapes = shapes_of(trainer)
    assert shapes[0] != shapes[-1] == tuple(trainer.configuration_manager.patch_size)
    assert not multiprocessing.active_children()


def test_unlabelled_batches_have_the_patch_of_the_phase(models):
    configure(models, schedule__epochs=2, schedule__patch_phases=2)
    trainer = build("ModalityDropoutTrainer")
    trainer.on_train_start()
    from nnunetv2_mstkd.training.loaders import unlabelled_loader

    cases = trainer.split["train"][:1]
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, cases)
    more = unlabelled_loader(trainer.dataloader_train, dataset, cases, 1)
    assert next(more)["data"].shape[2:] == next(trainer.dataloader_train)["data"].shape[2:]
