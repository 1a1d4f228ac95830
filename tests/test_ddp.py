"""Trainings on several processes, as ``nnUNetv2_train -num_gpus 2`` starts them, on CPUs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ddp_worker
import pytest
import torch
from conftest import Folders

from nnunetv2_mstkd import methods as trainers
from nnunetv2_mstkd.inference.workers import start_server
from nnunetv2_mstkd.nnunet import checkpoints

NAMES = [
    *sorted(trainers.__all__),
    *(f"{name}{ddp_worker.INCOMPLETE}" for name in ("MSTKDTrainer", "AdaMMTrainer", "SMMLTrainer")),
    *(f"{name}{ddp_worker.UNLABELLED}" for name in ("ModalityDropoutTrainer", "AdaMMTrainer")),
    *(f"{name}{ddp_worker.JOINT}" for name in ("MSTKDTrainer", "AdaMMTrainer")),
    f"KDTrainer{ddp_worker.JOINT}{ddp_worker.INCOMPLETE}{ddp_worker.BATCH_DICE}",
]
OF_RANK = [f"{name}{ddp_worker.INCOMPLETE}{ddp_worker.BATCH_DICE}" for name in ("RFNetTrainer", "SMMLMMFormerTrainer")]
"""Their decoders of single modalities have as many rows as there are modalities, so that their Dice is that of a rank's
batch, and two ranks do not do what one process does with the joined batch."""
BY_GROUPS = {"MSTKDTrainer", "MedMAPMSTKDTrainer"}
"""Their logit term is a mean over the foreground and one over the background of the batch, not a mean over samples, so
that its mean over two ranks is not exactly that of the joined batch; and AdamW enlarges small differences."""
NO_GRADIENT = {"MMFormerTrainer", "MedMAPMMFormerTrainer", "SMMLMMFormerTrainer"}
"""The norm behind the transformer removes its last biases, whose gradient is rounding: AdamW makes full steps of it."""
KINKS = {"SMMLRFNetTrainer"}
"""The largest network: rounding moves a feature across the kink of a LeakyReLU. With another seed it agrees to 3e-6."""


def on_each_rank(function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` in a process for each rank, which has nnU-Net imported when it starts."""
    start_server()
    arguments = dict(os.environ), function, *arguments  # the server keeps the variables with which it began
    torch.multiprocessing.start_processes(ddp_worker.call, arguments, ddp_worker.RANKS, start_method="forkserver")


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of both ranks, and of one process on the joined batch, by trainer."""
    folder = tmp_path_factory.mktemp("ddp")
    on_each_rank(ddp_worker.run_steps, folder, NAMES + OF_RANK)
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("rank_0", "rank_1", "alone")}


@pytest.mark.parametrize("name", NAMES + OF_RANK)
def test_both_ranks_have_equal_weights_after_some_steps(steps, name):
    first, second = steps["rank_0"][name]["state"], steps["rank_1"][name]["state"]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", NAMES)
def test_weights_equal_one_process_on_joined_batch(steps, name):
    ranks, alone = steps["rank_0"][name]["state"], steps["alone"][name]["state"]
    # nnU-Net gives the coarsest level of deep supervision the weight 1e-6 under DDP, and 0 without
    tolerance = 2e-4 if name.split(" ")[0] in BY_GROUPS | NO_GRADIENT | KINKS else 2e-5
    for key, value in alone.items():
        torch.testing.assert_close(
            ranks[key], value, rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", NAMES)
def test_ranks_see_different_samples(steps, name):
    first, second = steps["rank_0"][name], steps["rank_1"][name]
    assert first["terms"] != second["terms"]
    assert first["terms"][0][0] != first["terms"][-1][0]


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_of_the_terms_is_that_of_the_joined_batch(steps, name):
    ranks = torch.tensor([steps["rank_0"][name]["terms"], steps["rank_1"][name]["terms"]]).mean(0)
    tolerance = 1e-4 if name.split(" ")[0] in BY_GROUPS else 3e-6
    tolerance *= 2 if ddp_worker.JOINT in name else 1  # both networks move
    torch.testing.assert_close(ranks, torch.tensor(steps["alone"][name]["terms"]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_each_rank_draws_its_own_subsets(steps, name):
    assert steps["rank_0"][name]["random"] != steps["rank_1"][name]["random"]


def test_the_others_wait_for_the_first_process_longer_than_for_a_message(tmp_path: Path):
    on_each_rank(ddp_worker.wait_for_the_first, tmp_path)


def test_two_ranks_write_once_and_resume(models: Folders, tmp_path: Path):
    other = tmp_path / "results_of_the_stopped_one"
    dataset = models.results / models.dataset
    student = models.fold("MSTKDTrainer").parent
    for file in sorted(student.rglob("*"), reverse=True):  # the student of the fixture; its teacher stays
        file.unlink() if file.is_file() else file.rmdir()
    student.rmdir()
    (other / models.dataset).mkdir(parents=True)
    teacher = models.fold("MSTKDTeacherTrainer").parent
    (other / models.dataset / teacher.name).symlink_to(teacher)

    on_each_rank(ddp_worker.run_training, tmp_path, (str(models.results), str(other)), "MSTKDTrainer")

    folder = dataset / student.name / "fold_0"
    assert len(list(folder.glob("training_log_*.txt"))) == 1
    assert sorted(path.name for path in folder.glob("checkpoint_*")) == ["checkpoint_best.pth", "checkpoint_final.pth"]
    assert len(list((folder / "validation").glob("*.nii.gz"))) == 2
    assert (folder / "validation" / "summary.json").is_file()

    stopped = other / models.dataset / student.name / "fold_0"
    assert len(list(stopped.glob("training_log_*.txt"))) == 2
    whole, continued = (checkpoints.read(path / "checkpoint_final.pth") for path in (folder, stopped))
    assert whole["network_weights"].keys() == continued["network_weights"].keys()
    for key, value in whole["network_weights"].items():
        assert torch.equal(value, continued["network_weights"][key]), key
    assert not any(key.startswith("module.") for key in whole["network_weights"])
    history = [content["logging"]["mean_fg_dice"] for content in (whole, continued)]
    assert history[0] == history[1]
    assert len(history[0]) == 2
