"""What test_killed_training.py runs: trainings in processes of their own, each killed with SIGKILL at a given moment.

``python killed_training.py TRAINER MOMENT ...`` starts the training once per moment, from the second on with ``--c``.
PyTorch and nnU-Net are imported once; each training is a copy of this process. Prints one JSON object per training:
how it ended (minus the signal's number), and what lay in its folder then.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import conftest
import torch
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_mstkd.nnunet import checkpoints
from nnunetv2_mstkd.training.base import SettingsTrainer


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before(owner: object, name: str, when: Callable[..., bool]) -> None:
    """Be killed at the first call of ``owner.name`` whose arguments are such."""
    real = getattr(owner, name)

    def call(*arguments, **options):
        if when(*arguments):
            kill()
        return real(*arguments, **options)

    setattr(owner, name, call)


def in_step(epoch: int, step: int) -> None:
    """Between the backward pass and the optimiser's step."""
    kill_before(SettingsTrainer, "_update_weights", lambda t: (t.current_epoch, t._step_in_epoch) == (epoch, step))


def in_validation(epoch: int) -> None:
    kill_before(nnUNetTrainer, "on_epoch_end", lambda trainer: trainer.current_epoch == epoch)


def within_file(file: str) -> None:
    """When half of the file's bytes are on the disk."""
    real = torch.save

    def save(content, target, *more):
        if file in target.name:
            buffer = io.BytesIO()
            real(content, buffer)
            target.write(buffer.getvalue()[: buffer.tell() // 2])
            target.flush()
            kill()
        real(content, target, *more)

    torch.save = save


def before_rename(file: str) -> None:
    kill_before(os, "replace", lambda source, target: Path(target).name == file)


def after_rename(file: str) -> None:
    real = os.replace

    def replace(source, target):
        real(source, target)
        if Path(target).name == file:
            kill()

    os.replace = replace


def before_removal(file: str) -> None:
    kill_before(os, "remove", lambda path, *_: Path(path).name == file)


MOMENTS: dict[str, Callable[[], None]] = {
    "in the first step": lambda: in_step(0, 0),
    "within the first file": lambda: within_file("checkpoint_best.pth"),
    "in a step": lambda: in_step(1, 1),
    "within latest": lambda: within_file("checkpoint_latest.pth"),
    "before latest is renamed": lambda: before_rename("checkpoint_latest.pth"),
    "between latest and best": lambda: after_rename("checkpoint_latest.pth"),
    "in a later step": lambda: in_step(3, 1),
    "in the last validation": lambda: in_validation(4),
    "within final": lambda: within_file("checkpoint_final.pth"),
    "between final and the end": lambda: before_removal("checkpoint_latest.pth"),
    "never": lambda: None,
}


def train_until(moment: str, trainer: str, proceed: bool, log: Path) -> int:
    """Train in a copy of this process; minus the number of the signal that ended it."""
    child = os.fork()
    if child == 0:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = 1
        try:
            MOMENTS[moment]()
            conftest.train(trainer, continue_training=proceed)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(trainer: str, *moments: str) -> None:
    folder = Path(
        get_trainer_from_args(
            str(conftest.PHANTOM), conftest.CONFIGURATION, 0, trainer, device=torch.device("cpu")
        ).output_folder
    )
    for number, moment in enumerate(moments):
        code = train_until(moment, trainer, number > 0, folder.parents[1] / "log.txt")
        epochs = {path.name: checkpoints.read(path)["current_epoch"] for path in sorted(folder.glob("*.pth"))}
        scratch = sorted(path.name for path in folder.iterdir() if path.name.endswith(".part"))
        print("FOUND", json.dumps({"moment": moment, "code": code, "epochs": epochs, "scratch": scratch}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
