"""SIGKILL, as a cluster or the kernel sends it, to a training or to one of its data loaders' processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CONFIGURATION, PHANTOM, configure, train
from tiny import same

from nnunetv2_mstkd.errors import EXIT_USER_ERROR
from nnunetv2_mstkd.nnunet import checkpoints
from nnunetv2_mstkd.training.loader_processes import cause_of_death, report_dead_workers

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is neither fork nor SIGKILL")

KILLED = -getattr(signal, "SIGKILL", 9)
EPOCHS = 5
MOMENTS = [
    "in the first step",
    "within the first file",
    "in a step",
    "within latest",
    "before latest is renamed",
    "between latest and best",
    "in a later step",
    "in the last validation",
    "within final",
    "between final and the end",
]


def start(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("trainer", ["MSTKDTeacherTrainer", "MSTKDTrainer"])
def test_killed_training_resumes_to_the_same_model(models, trainer):
    folder = models.fold(trainer)
    shutil.rmtree(folder)
    configure(models, schedule__epochs=EPOCHS, schedule__save_every=2)
    train(trainer)
    names = ["checkpoint_best.pth", "checkpoint_final.pth"]
    whole = {name: checkpoints.read(folder / name) for name in names}
    shutil.rmtree(folder)

    done = start("killed_training.py", trainer, *MOMENTS, "never")
    assert done.returncode == 0, done.stderr[-3000:]  # it reads each checkpoint that it finds
    found = [json.loads(line[len("FOUND ") :]) for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    log = (folder.parents[1] / "log.txt").read_text()
    assert {each["moment"]: each["code"] for each in found} == {**dict.fromkeys(MOMENTS, KILLED), "never": 0}, log[
        -3000:
    ]
    left = {each["moment"]: each for each in found}
    for moment in ("within the first file", "within latest", "before latest is renamed", "within final"):
        assert len(left[moment]["scratch"]) == 1, moment
    assert left["before latest is renamed"]["epochs"].keys() == {"checkpoint_best.pth"}
    assert left["between final and the end"]["epochs"] == {
        **left["within final"]["epochs"],
        "checkpoint_final.pth": EPOCHS,
    }

    assert sorted(path.name for path in folder.iterdir() if path.suffix in (".pth", ".part")) == names
    for name in names:
        resumed = checkpoints.read(folder / name)
        for key in ("network_weights", "optimizer_state", "mstkd", "current_epoch"):
            assert same(whole[name][key], resumed[key]), (name, key)
        for key, values in whole[name]["logging"].items():
            assert "timestamps" in key or same(values, resumed["logging"][key]), (name, key)


# ---- processes of a data loader -------------------------------------------------------------------------------------


KILLED_BY = "a data-loader worker was killed by SIGKILL: the kernel does that when memory runs out."


@pytest.mark.parametrize(
    ("moment", "told"),
    [
        ("start", "before the first iteration a data-loader worker died; if it printed an error, see above"),
        ("training", rf"in epoch 1, iteration \d+, {KILLED_BY}"),
        ("validation", f"in the online validation of epoch 1 {KILLED_BY}"),
        ("lock", rf"in epoch 1, iteration \d+, {KILLED_BY}"),
    ],
)
def test_killed_data_loader_worker_is_one_line(phantom, moment, told):
    # more than what the loaders have ready
    configure(phantom, schedule__epochs=3, schedule__iterations=12, schedule__validation_iterations=12)
    trainer = "ModalityDropoutTrainer"
    command = [str(PHANTOM), CONFIGURATION, "0", "-tr", trainer, "-device", "cpu"]
    done = start("train_and_kill_a_worker.py", moment, *command, nnUNet_n_proc_DA="2", MSTKD_DEBUG="0")
    assert done.returncode == EXIT_USER_ERROR
    lines = [line for line in done.stderr.splitlines() if "Warning" not in line and "warnings.warn" not in line]
    assert len(lines) == 1, done.stderr
    assert re.match(f"nnunetv2_mstkd: {told}", lines[0])
    assert lines[0].endswith(
        " The last checkpoint is untouched: ask for more memory or use fewer processes (nnUNet_n_proc_DA=1, here 2), "
        "and continue with --c"
    )
    left = {path.name for path in phantom.fold(trainer).glob("*.pth")}
    if moment == "start":
        assert left == set()
    else:
        assert checkpoints.read(phantom.fold(trainer) / "checkpoint_latest.pth")["current_epoch"] == 1


@pytest.mark.parametrize(
    ("codes", "told"),
    [
        ([0, -signal.SIGTERM, KILLED], "was killed by SIGKILL: the kernel does that when memory runs out"),
        (
            [-getattr(signal, "SIGBUS", 7)],
            "was killed by SIGBUS: shared memory is full (/dev/shm; a container is given",
        ),
        ([-signal.SIGSEGV, 0], "was killed by SIGSEGV"),
        ([0, 1, None, -signal.SIGTERM], "died; if it printed an error, see above"),  # ended by nnU-Net
        ([], "died; if it printed an error, see above"),
    ],
)
def test_the_exit_code_tells_why_a_process_ended(codes, told):
    assert cause_of_death([SimpleNamespace(exitcode=code) for code in codes]).startswith(told)


def test_other_errors_and_threads_are_left_as_they_are(monkeypatch):
    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    hook = threading.excepthook
    with pytest.raises(RuntimeError, match="out of memory"), report_dead_workers(lambda: "now", list):
        for error in (ValueError("a defect"), OSError("not of the loader")):
            thread = threading.Thread(target=fail, args=(error,))
            thread.start()
            thread.join()
        raise RuntimeError("CUDA out of memory")
    assert [type(each.exc_value) for each in told] == [ValueError, OSError]
    assert threading.excepthook == hook


def fail(error: Exception) -> None:
    raise error
