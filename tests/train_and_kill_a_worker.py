"""What test_killed_training.py runs: ``nnUNetv2_train`` whose data loader loses its processes.

``python train_and_kill_a_worker.py MOMENT [ARGUMENTS of nnUNetv2_train]``; moment: ``start``, ``training``,
``validation``, or ``lock``: in training, with a lock of the loader that is never released.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys

import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from nnunetv2.run.run_training import run_training_entry
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_mstkd.training import loader_processes
from nnunetv2_mstkd.training.base import SettingsTrainer
from nnunetv2_mstkd.training.modality_dropout import ModalityDropoutTrainer


def kill_workers() -> None:
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)


def kill_before(cls: type, name: str) -> None:
    """In epoch 1."""
    real = getattr(cls, name)

    def call(self, *arguments):
        if self.current_epoch == 1:
            kill_workers()
        return real(self, *arguments)

    setattr(cls, name, call)


def hold_a_lock() -> None:
    """As a process does that is killed at the wrong moment: the next look at the loader's event waits for ever."""
    loader_processes.PATIENCE = 3.0
    real = SettingsTrainer.train_step

    def call(self, *arguments):
        if self.current_epoch == 1 and multiprocessing.active_children():
            self.dataloader_train.abort_event._cond.acquire()
            kill_workers()
        return real(self, *arguments)

    SettingsTrainer.train_step = call


def kill_at_start() -> None:
    real = NonDetMultiThreadedAugmenter._start

    def start(self) -> None:
        real(self)
        kill_workers()

    NonDetMultiThreadedAugmenter._start = start


if __name__ == "__main__":
    moment = sys.argv.pop(1)
    nnUNetTrainer.plot_network_architecture = lambda self: None
    torch.set_num_threads(1)
    if moment == "start":
        kill_at_start()
    if moment == "training":
        kill_before(SettingsTrainer, "train_step")
    if moment == "lock":
        hold_a_lock()
    if moment == "validation":
        kill_before(ModalityDropoutTrainer, "on_validation_epoch_start")
    run_training_entry()
