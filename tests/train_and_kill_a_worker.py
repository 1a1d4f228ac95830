"""What test_killed_training.py runs: ``nnUNetv2_train`` whose data loader loses its processes.

``python train_and_kill_a_worker.py MOMENT [ARGUMENTS of nnUNetv2_train]``; moment: ``start``, ``training``,
``validation``, or ``lock``: in training, with a lock of the loader that is never released.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from conftest import draw_nothing
from nnunetv2.run.run_training import run_training_entry

from nnunetv2_mstkd.training import loader_processes
from nnunetv2_mstkd.training.base import SettingsTrainer
from nnunetv2_mstkd.training.modality_dropout import ModalityDropoutTrainer


def kill_workers() -> None:
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)


def kill_before(cls: type, name: str, also: Callable[[Any], object] = lambda trainer: None) -> None:
    """In epoch 1, after another action."""
    real = getattr(cls, name)

    def call(self, *arguments):
        if self.current_epoch == 1:
            also(self)
            kill_workers()
        return real(self, *arguments)

    setattr(cls, name, call)


def hold_lock(trainer: Any) -> None:
    """Keep the lock of the loader's event for good, like a worker that is killed while it holds it."""
    trainer.dataloader_train.abort_event._cond.acquire()


def kill_at_start() -> None:
    real = NonDetMultiThreadedAugmenter._start

    def start(self) -> None:
        real(self)
        kill_workers()

    NonDetMultiThreadedAugmenter._start = start


if __name__ == "__main__":
    moment = sys.argv.pop(1)
    draw_nothing(pytest.MonkeyPatch())
    torch.set_num_threads(1)
    if moment == "start":
        kill_at_start()
    if moment == "training":
        kill_before(SettingsTrainer, "train_step")
    if moment == "lock":
        loader_processes.PATIENCE = 3.0
        kill_before(SettingsTrainer, "train_step", hold_lock)
    if moment == "validation":
        kill_before(ModalityDropoutTrainer, "on_validation_epoch_start")
    run_training_entry()
