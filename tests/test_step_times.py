"""The time of a training step, from which benchmarks/accuracy.py derives equal hours."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CONFIGURATION, PHANTOM, configure

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import accuracy
import step_times
from accuracy_rows import chosen_rows
from measured_training import autocast_on_cpu

from nnunetv2_mstkd.methods import MSTKDTrainer
from nnunetv2_mstkd.training import distillation
from nnunetv2_mstkd.training.base import SettingsTrainer


def test_steps_are_timed_with_the_patches_of_their_moment(models):
    configure(models, schedule__epochs=8, schedule__patch_phases=4)
    trainer = step_times.start(str(PHANTOM), 0, torch.device("cpu"), "ModalityDropoutTrainer", CONFIGURATION)
    sizes = []
    for moment in range(step_times.MOMENTS):
        step_times.enter(trainer, moment)
        assert trainer.current_epoch == 2 * moment + 1
        sizes.append(next(trainer.dataloader_train)["data"][0, 0].numel())
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] == np.prod(trainer.configuration_manager.patch_size)


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """Runs the script with trainings whose names are the seconds of a step."""

    def start(dataset, fold, device, trainer, configuration):
        folder = tmp_path / configuration
        return SimpleNamespace(seconds=float(trainer), output_folder=folder, finish_loaders=lambda: None)

    monkeypatch.setattr(step_times, "start", start)
    monkeypatch.setattr(step_times, "enter", lambda trainer, moment: None)
    monkeypatch.setattr(step_times, "step", lambda trainer, number: trainer.seconds)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    for name in ("nnUNet_n_proc_DA", "nnUNet_def_n_proc"):
        monkeypatch.setenv(name, "1")
    file = tmp_path / "times.json"

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["step_times.py", "903", "0", "cpu", str(file), *words])
        step_times.main()
        return json.loads(file.read_text())

    return run


def test_what_is_timed_later_is_scaled_by_what_was_there(timed):
    assert timed("first=0.5:a", "other=1.5:b") == {"first": 0.5, "other": 1.5}
    # the machine is half as fast now
    assert timed("first=1.0:a", "new=4.0:c") == {"first": 0.5, "other": 1.5, "new": 2.0}


def test_rows_that_are_added_are_timed_beside_an_earlier_one(tmp_path, monkeypatch):
    benchmark, called = accuracy.Benchmark(tmp_path, "slices", changes={"hours": 0.1}), []
    monkeypatch.setattr(accuracy.Benchmark, "configure", lambda self, rows, seeds: called.append((rows[0].name, seeds)))
    monkeypatch.setattr(accuracy.subprocess, "run", lambda words, **options: called.append(words))
    rows = chosen_rows(["dropout-growing", "self"])
    (tmp_path / accuracy.STEP_TIMES).write_text('{"dropout-growing": 1.0, "dropout": 2.0, "dropout-warm": 3.0}')
    benchmark.measure_steps(rows, 7)
    configured, words = called
    assert configured == ("dropout", [7])
    assert words[-2:] == ["self=SelfDistillationTrainer:self_s7", "dropout=ModalityDropoutTrainer:dropout_s7"]
    (tmp_path / accuracy.STEP_TIMES).write_text('{"dropout-growing": 1.0, "self": 2.0}')
    benchmark.measure_steps(rows, 7)
    assert len(called) == 2


def test_a_joint_teacher_runs_in_bfloat16_like_its_student(make_trainer, monkeypatch):
    monkeypatch.setattr(SettingsTrainer, "initialize", SettingsTrainer.initialize)  # restored afterwards
    monkeypatch.setattr(distillation, "load_teacher", distillation.load_teacher)
    autocast_on_cpu()
    trainer, seen = make_trainer(MSTKDTrainer, block={"teacher": {"joint": True}}), []
    for network in (trainer.network, trainer.teacher):
        convolution = next(each for each in network.modules() if isinstance(each, torch.nn.Conv3d))
        convolution.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
        output = network(torch.zeros(1, 4, 16, 16, 16))
        assert output[0].dtype == torch.float32
    assert seen == [torch.bfloat16] * 2
