"""The demo at its smallest: what it leaves, and what a second call does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import Folders, plan_and_preprocess

from nnunetv2_mstkd import cli
from nnunetv2_mstkd.demo import pipeline, steps
from nnunetv2_mstkd.demo.pipeline import CONTROLS, STUDENT, TEACHER, Demo, Options, budget
from nnunetv2_mstkd.nnunet import checkpoints

SMALLEST = ["--epochs", "1", "--cases", "6", "--test-cases", "1", "--spacing", "6", "--device", "cpu"]


def options(**changes) -> Options:
    values = {"device": "cpu", "epochs": None, "cases": 6, "test_cases": 1, "spacing": 6.0, "seed": 0}
    return Options(**{**values, "anatomy": "procedural", "controls": False, **changes})


def test_the_demo_runs_through_and_a_second_call_repeats_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "ITERATIONS", 2)
    monkeypatch.setattr(pipeline, "FEATURES", (4, 8, 8, 8))
    monkeypatch.setitem(pipeline.SETTINGS, "schedule.validation_iterations", 1)
    monkeypatch.setattr(steps, "run", preprocess_here(steps.run))
    out = tmp_path / "demo"
    assert cli.main(["demo", "--out", str(out), *SMALLEST]) == 0, capsys.readouterr().err
    first = capsys.readouterr().out
    assert "teacher given zeros" in first and "MST-KDNet student" in first
    assert "say nothing about clinical performance" in first
    scores = pd.read_csv(out / "results.csv")
    assert len(scores) == 15 * 2 * 3 and scores["dice"].between(0, 1).all()
    assert scores["subset"].nunique() == 15 and set(scores["region"]) == {"WT", "TC", "ET"}
    for picture in ("heatmap.png", "slices.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    # what moves the bars is still what nnU-Net prints
    logs = out / "logs"
    assert (logs / f"train_{TEACHER.folder}.log").read_text().count("Epoch time:") == 2
    assert (logs / f"train_{STUDENT.folder}.log").read_text().count("Epoch time:") == 1
    predicted = (logs / f"predict_{STUDENT.folder}.log").read_text().splitlines()
    assert sum(line.startswith("Predicting ") for line in predicted) == 15
    assert len(list((out / "predictions" / STUDENT.folder).glob("*.nii.gz"))) == 15
    state = json.loads((out / "demo.json").read_text())
    done = [step.split()[0] for step in state["seconds"]]
    assert done == ["data", "preprocessing", "train", "train", "predict", "predict"]

    monkeypatch.setattr(steps, "run", lambda *_, **__: pytest.fail("a finished step ran again"))
    assert cli.main(["demo", "--out", str(out), *SMALLEST]) == 0
    assert _table(capsys.readouterr().out) == _table(first)
    assert cli.main(["demo", "--out", str(out), *SMALLEST, "--seed", "1"]) == 2
    assert "holds a demo with other options: seed 0 (now 1)" in capsys.readouterr().err


def preprocess_here(real):
    """All commands as they are but the first, which counts 10^8 voxels and takes longer than the others together."""

    def run(arguments, *, variables, **more) -> None:
        if arguments[0] != "nnUNetv2_plan_and_preprocess":
            real(arguments, variables=variables, **more)
            return
        raw, preprocessed, results = (Path(variables[f"nnUNet_{name}"]) for name in ("raw", "preprocessed", "results"))
        assert arguments[1:5] == ["-d", str(pipeline.DATASET), "-c", "3d_fullres"]
        plan_and_preprocess(Folders(raw, preprocessed, results), pipeline.DATASET, "3d_fullres")

    return run


def _table(text: str) -> str:
    return text[text.index("Dice in percent") : text.index("measured in")]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--cases", "5"], "--cases is 5, expected at least 6"),
        (["--test-cases", "0"], "--test-cases is 0, expected at least 1"),
        (["--seed", "-1"], "--seed is -1, expected 0 to"),
        pytest.param(
            ["--device", "cuda"],
            "torch finds no CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_impossible_options_are_one_line(tmp_path, capsys, given, told):
    assert cli.main(["demo", "--out", str(tmp_path / "demo"), *given]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "demo").exists()


# ---- steps ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def python(monkeypatch):
    monkeypatch.setattr(steps, "command_path", lambda name: sys.executable)

    def run(code: str, log: Path, **more) -> None:
        arguments = {"variables": {}, "title": "a step", "total": 3, "tick": "^done ", **more}
        steps.run(["python", "-c", code], log=log, **arguments)

    return run


def test_a_command_writes_its_log_and_moves_the_bar(tmp_path, python, capsys):
    log = tmp_path / "logs" / "step.log"
    python("import sys; print('done 1'); print('more', file=sys.stderr); print('done 2')", log, first=1)
    assert sorted(log.read_text().splitlines()[1:]) == ["done 1", "done 2", "more"]
    error = capsys.readouterr().err
    assert "a step" in error and "3/3" in error


def test_a_command_that_fails_is_told_with_its_last_line_and_log(tmp_path, python):
    log = tmp_path / "logs" / "step.log"
    with pytest.raises(ValueError, match=rf"python stopped with exit code 3: no room \(whole output in {log}\)"):
        python("import sys; print('no room'); sys.exit(3)", log)


def test_an_interrupt_ends_the_command(tmp_path, python, monkeypatch):
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(steps.tqdm, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):  # and does not wait for it
        python("import time; print('done 1', flush=True); time.sleep(600)", tmp_path / "logs" / "step.log")


def test_a_training_that_was_stopped_goes_on(tmp_path, monkeypatch):
    demo, calls = Demo(tmp_path / "demo", options()), []
    monkeypatch.setattr(steps, "run", lambda arguments, **more: calls.append((arguments, more["first"])))
    demo._train(STUDENT)
    fold = demo.folder / "results" / demo.dataset / STUDENT.folder / "fold_0"
    fold.mkdir(parents=True)
    checkpoints.write({"network_weights": {}, "current_epoch": 4}, fold / "checkpoint_latest.pth")
    demo._train(STUDENT)
    assert [(arguments[-1], first) for arguments, first in calls] == [("cpu", 0), ("--c", 4)]


def test_controls_get_the_budget_of_teacher_and_student_together(tmp_path):
    demo = Demo(tmp_path / "demo", options(controls=True))
    plain, no_distillation = CONTROLS
    assert demo.epochs(plain) == demo.epochs(TEACHER) + demo.epochs(STUDENT)
    assert demo.epochs(no_distillation) == demo.epochs(STUDENT)
    # the student needs its teacher, and is shown last
    assert demo._training_order() == [TEACHER, STUDENT, *CONTROLS] and demo.models[-1] == STUDENT
    assert dict(budget(options(controls=True)))["controls"] > 0 and "controls" not in dict(budget(options()))
    # a demo may be continued with controls
    assert Demo(tmp_path / "demo", options()).models == [TEACHER, STUDENT]


@pytest.mark.parametrize(("student", "teacher"), [(None, 14), (9, 14), (1, 2), (90, 140)])
def test_the_teachers_epochs_follow_the_students(student, teacher):
    assert options(epochs=student).teacher_epochs == teacher


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not empty and holds no demo"):
        Demo(tmp_path, options())
