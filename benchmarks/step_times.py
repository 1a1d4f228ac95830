"""Seconds per training step of several trainers in one process, for the equal hours of `accuracy.py`.

    python benchmarks/step_times.py [--bfloat16] DATASET FOLD DEVICE FILE NAME=TRAINER:CONFIGURATION ...

The steps of all trainers are interleaved, so that they share the machine's weather, and their mean over four moments of
the training counts, because not every step of a trainer costs the same, nor does every patch where patches grow. On a
CPU the clock is that of the process. The times are added to the JSON FILE; if it has the time of one of the names
already, that stays, and the others are scaled by it, as if they had been measured beside it.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measured_training import autocast_on_cpu
from nnunetv2.run.run_training import get_trainer_from_args

from nnunetv2_mstkd.images.atomic import read_json, write_json

MOMENTS, WARM_UP, ROUNDS = 4, 3, 8
"""Moments of the training; at each the first steps, which are left out, and those that count. A term of every k-th step
has its share for k up to 8."""


def start(dataset: str, fold: int, device: torch.device, trainer: str, configuration: str) -> Any:
    """A trainer that has not begun its first epoch."""
    started = get_trainer_from_args(dataset, configuration, fold, trainer, device=device)
    started.on_train_start()
    return started


def enter(trainer: Any, moment: int) -> None:
    """Go to the middle of a quarter of the training, with the loaders of the patch that it has there."""
    trainer.current_epoch = int((moment + 0.5) / MOMENTS * trainer.num_epochs)
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()


def step(trainer: Any, number: int) -> float:
    """Run one step and return its seconds."""
    cuda = trainer.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    trainer._step_in_epoch = number % trainer.num_iterations_per_epoch
    begin = clock()
    trainer.train_step(next(trainer.dataloader_train))  # on CUDA processes of their own load what comes next
    if cuda:
        torch.cuda.synchronize()
    return clock() - begin


def main() -> None:
    """Measure what the command line names."""
    words = sys.argv[1:]
    if words[0] == "--bfloat16":
        autocast_on_cpu()
        words = words[1:]
    dataset, fold, device, file, *named = words
    if device == "cpu":  # as in measured_training.py: what loads the data is part of the time
        os.environ.update(nnUNet_n_proc_DA="0", nnUNet_def_n_proc="1")
        torch.set_num_threads(1)
    trainers = {}
    for word in named:
        name, trainer = word.split("=", 1)
        trainers[name] = start(dataset, int(fold), torch.device(device), *trainer.split(":", 1))
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for moment in range(MOMENTS):
        for trainer in trainers.values():
            enter(trainer, moment)
        for number in range(WARM_UP + ROUNDS):
            for name, trainer in trainers.items():
                seconds = step(trainer, number)
                if number >= WARM_UP:
                    times[name].append(seconds)
    for trainer in trainers.values():
        trainer.finish_loaders()
        if not any(Path(trainer.output_folder).glob("checkpoint_*.pth")):
            shutil.rmtree(trainer.output_folder, ignore_errors=True)
    known = read_json(Path(file)) if Path(file).is_file() else {}
    found = {name: sum(values) / len(values) for name, values in times.items()}
    scale = next((known[name] / found[name] for name in found if name in known), 1.0)
    write_json(Path(file), {name: round(scale * value, 5) for name, value in found.items()} | known)


if __name__ == "__main__":
    main()
