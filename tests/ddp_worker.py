"""What each of two processes of test_ddp.py does: nnU-Net's trainers under torch's DDP, on CPUs with gloo.

nnU-Net sends the processes of a multi-GPU training to CUDA devices. Three things are changed for a CPU and nothing
else: the process group is gloo's, nnU-Net's name ``DDP`` drops ``device_ids``, and device and scaler are put back after
construction.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import conftest
import pytest
import tiny
import torch
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunet_module
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_mstkd import methods as trainers
from nnunetv2_mstkd import modalities
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.nnunet.case_facts import CaseFacts
from nnunetv2_mstkd.training.distributed import first_process_first

RANKS = 2
STEPS = 3
SUBSET = "T0+T2"
OTHER = "T1+T2"
"""What the second of two students that train together has."""


def call(rank: int, variables: dict[str, str], function: Callable[..., None], *arguments: Any) -> None:
    """``function(rank, *arguments)`` with these environment variables."""
    os.environ.update(variables)
    function(rank, *arguments)


class OnCpu(DistributedDataParallel):
    def __init__(self, module: torch.nn.Module, device_ids: Any = None) -> None:
        super().__init__(module)


def block(trainer: str) -> dict[str, Any]:
    """Settings with every term of the trainer at work from the first step, for one fixed subset.

    But for two of SMML's, which relate the samples of a rank to one another and are not the mean over ranks.
    """
    if "SMML" in trainer:
        return {
            "sampler": {"kind": "fixed", "subsets": [SUBSET, OTHER]},
            "schedule": {"seed": 3, "epochs": 2, "iterations": STEPS},
            "smml": {"prior": "self", "warmup": 0.0, "pixel": 0.0, "feature": 0.0},
        }
    return {
        "sampler": {"kind": "fixed", "subsets": [SUBSET]},
        "schedule": {"seed": 3, "epochs": 2, "iterations": STEPS},
        "distillation": {"ramp": 0, "fade": 0, "where": "everywhere", "every": 1},
        # a voxel at a decision may change sides with the size of the batch: without the Dice, and most are certain
        "unlabelled": {"ramp": 0, "confidence": 0.5, "dice": 0.0},
        "teacher": {"joint": JOINT in trainer},
    }


INCOMPLETE, UNLABELLED = " with an incomplete case", " with unlabelled cases"
"""Endings of names: one rank's case lacks a modality; both have unlabelled samples beside theirs."""
JOINT = " with a teacher that learns"
"""The teacher is trained in the same steps."""
BATCH_DICE = " with batch Dice"
"""The Dice is that of the batch, over all ranks, as in nnU-Net's 2-D configurations."""


def build(name: str, labels: dict[str, Any] | None = None, **options: Any):
    """A trainer after ``initialize``, in the process group if there is one."""
    given, name = name, name.split(" ")[0]
    options = {"block": block(given), "batch_size": RANKS, "batch_dice": given.endswith(BATCH_DICE), **options}
    content = tiny.plans(**options)
    content["continue_training"] = False
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = getattr(trainers, name)(content, "tiny", 0, tiny.dataset_json(4, labels), torch.device("cpu"))
        trainer.device, trainer.grad_scaler = torch.device("cpu"), None
        trainer.initialize()
    trainer.network.train()
    if hasattr(trainer, "teacher_trainer") and trainer.needs_teacher and not trainer.teacher_learns:
        tiny.give_teacher(trainer)
    if hasattr(trainer, "draw_partner"):
        first, second = modalities.parse_subsets((SUBSET, OTHER), [f"T{number}" for number in range(4)])
        trainer.draw_availability = lambda size, present=None: first.expand(size, -1)
        trainer.draw_partner = lambda availability, present=None: second.expand(len(availability), -1)
    if INCOMPLETE in given:
        trainer.case_facts = {
            "case_0": CaseFacts((True,) * 4, True),
            "case_1": CaseFacts((True, False, True, True), True),
        }
    trainer.current_epoch = 0
    return trainer


def take_steps(trainer: Any, rank: int, ranks: int, *, unlabelled: bool = False) -> dict[str, Any]:
    """Train on this rank's share of fixed batches; the weights after it, and each step's terms."""
    if unlabelled:
        others = (tiny.batch(trainer, seed=100 + step)["data"] for step in range(STEPS))
        mine = slice(rank * RANKS // ranks, (rank + 1) * RANKS // ranks)
        trainer.unlabelled_batches = ({"data": data[mine]} for data in others)
    trainer._step_in_epoch = 0
    terms = []
    for step in range(STEPS):
        whole = tiny.batch(trainer, seed=step)
        share = slice(rank * RANKS // ranks, (rank + 1) * RANKS // ranks)
        target = whole["target"]
        target = [level[share] for level in target] if isinstance(target, list) else target[share]
        result = trainer.train_step({"data": whole["data"][share], "target": target, "keys": whole["keys"][share]})
        terms.append([float(value) for value in result["terms"].values()])
    state = {key: value.clone() for key, value in trainer.plain_network.state_dict().items()}
    adversary = getattr(trainer, "adversary", None)
    if adversary is not None:
        weights = adversary.discriminator.state_dict()
        state |= {f"discriminator.{key}": value.clone() for key, value in weights.items()}
    for part in ("refiners", "teacher_network"):
        for key, value in trainer.extra_state().get(part, {}).items():
            state[f"{part}.{key}"] = value.clone()
    return {"state": state, "terms": terms}


def begin(rank: int, folder: Path, name: str) -> None:
    """Join the process group, with nnU-Net's wrapper fit for a CPU."""
    torch.set_num_threads(1)
    nnunet_module.DDP = OnCpu
    dist.init_process_group("gloo", init_method=f"file://{folder / name}", rank=rank, world_size=RANKS)
    dist.barrier()


def run_steps(rank: int, folder: Path, names: list[str]) -> None:
    """Steps of every trainer, in two processes and then, in the first one, alone on the joined batch."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[variable] = str(folder / variable)
    if rank == 0:
        tiny.write_empty_data()
    begin(rank, folder, "store")
    found: dict[str, Any] = {}
    for name in names:
        trainer = build(name)
        found[name] = take_steps(trainer, rank, RANKS, unlabelled=name.endswith(UNLABELLED))
        trainer._seed_everything(0)
        found[name]["random"] = float(torch.rand(()))
    dist.destroy_process_group()
    torch.save(found, folder / f"rank_{rank}.pt")
    if rank == 0:
        alone = {name: take_steps(build(name), 0, 1, unlabelled=name.endswith(UNLABELLED)) for name in names}
        torch.save(alone, folder / "alone.pt")


def wait_for_the_first(rank: int, folder: Path) -> None:
    """The first process takes three times as long as the process group waits for a message."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    dist.barrier()  # both are there
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    with first_process_first():
        if rank == 0:
            time.sleep(3)
            (folder / "made").touch()
        assert (folder / "made").is_file()
    with pytest.raises(InputError), first_process_first():
        raise InputError("both processes refuse, and neither reports a lost connection")
    dist.destroy_process_group()


class StoppedError(Exception):
    """A training that was ended in its middle."""


def run_training(rank: int, folder: Path, results: tuple[str, str], trainer_name: str) -> None:
    """nnU-Net's own loaders, epochs, checkpoints and validation: once in one go, once stopped and continued."""
    with pytest.MonkeyPatch.context() as patch, conftest.in_this_process(patch):
        conftest.draw_nothing(patch)
        begin(rank, folder, "training_store")
        for number, (output, stop, go_on) in enumerate(
            [(results[0], False, False), (results[1], True, False), (results[1], False, True)]
        ):
            patch.setenv("nnUNet_results", output)
            trainer = get_trainer_from_args(
                str(conftest.PHANTOM), conftest.CONFIGURATION, 0, trainer_name, continue_training=go_on
            )
            trainer.device, trainer.grad_scaler = torch.device("cpu"), None
            maybe_load_checkpoint(trainer, go_on, False, None)
            if stop:
                trainer.on_epoch_end = functools.partial(_end_and_stop, trainer.on_epoch_end)
            try:
                trainer.run_training()
            except StoppedError:
                dist.barrier()
                continue
            if number == 0:
                trainer.perform_actual_validation()
        dist.destroy_process_group()


def _end_and_stop(end: Callable[[], None]) -> None:
    end()
    raise StoppedError
