"""The demo at its smallest: what it leaves, and what a second call does."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from nnunetv2_mstkd import cli
from nnunetv2_mstkd.crossval.steps import Progress
from nnunetv2_mstkd.demo import pipeline, steps
from nnunetv2_mstkd.demo.pipeline import CONTROLS, STUDENT, TEACHER, Demo, Options
from nnunetv2_mstkd.demo.result import next_commands

SMALLEST = ["--epochs", "1", "--cases", "6", "--test-cases", "1", "--spacing", "6", "--device", "cpu"]
PREPROCESS_HERE = f"""
import os
from pathlib import Path
from conftest import Folders, plan_and_preprocess
folders = (Path(os.environ[f"nnUNet_{{name}}"]) for name in ("raw", "preprocessed", "results"))
plan_and_preprocess(Folders(*folders), {pipeline.DATASET}, "3d_fullres")
"""
"""nnU-Net's own command counts 10^8 voxels, which takes longer than all others together."""


def options(**changes) -> Options:
    values = {"device": "cpu", "epochs": None, "cases": 6, "test_cases": 1, "spacing": 6.0, "seed": 0}
    return Options(**{**values, "anatomy": "procedural", "controls": False, **changes})


def test_runs_through_and_repeats_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "ITERATIONS", 2)
    monkeypatch.setattr(pipeline, "FEATURES", (4, 8, 8, 8))
    monkeypatch.setitem(pipeline.SETTINGS, "schedule.validation_iterations", 1)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(steps.Command, "command", preprocess_here(steps.Command.command))
    out = tmp_path / "demo"
    assert cli.main(["demo", "--out", str(out), *SMALLEST]) == 0, capsys.readouterr().err
    first, bars = capsys.readouterr()
    assert "teacher given zeros" in first and "MST-KDNet student" in first
    assert "say nothing about clinical performance" in first
    assert "train student" in bars and "15/15" in bars
    scores = pd.read_csv(out / "results.csv")
    assert len(scores) == 15 * 2 * 3 and scores["dice"].between(0, 1).all()
    assert scores["subset"].nunique() == 15 and set(scores["region"]) == {"WT", "TC", "ET"}
    for picture in ("heatmap.png", "slices.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    record = json.loads((out / "demo.json").read_text())
    demo = Demo(out, Options(**record["options"]))
    # what moves the bars is still what nnU-Net writes
    assert demo.train(TEACHER).log.read_text().count("Epoch time:") == 2
    assert steps.Train.progress(demo.train(STUDENT)) == Progress("validation")
    assert len(list(demo.predictions(STUDENT).glob("*.nii.gz"))) == 15
    done = [step.split("_")[0] for step in record["seconds"]]
    assert done == ["plan", "configure", "train", "train", "predict", "predict"]

    monkeypatch.setattr(steps, "run_steps", lambda *_, **__: pytest.fail("a finished step ran again"))
    assert cli.main(["demo", "--out", str(out), *SMALLEST]) == 0
    second = capsys.readouterr().out
    assert _table(second) == _table(first)
    assert "minutes in all" in first and "everything is computed" in second and "minutes in all" not in second
    assert cli.main(["demo", "--out", str(out), *SMALLEST, "--seed", "1"]) == 2
    assert "holds a demo with other options: seed 0 (now 1)" in capsys.readouterr().err


def preprocess_here(real):
    def command(step) -> list[str]:
        words = real(step)
        if words[0] != "nnUNetv2_plan_and_preprocess":
            return words
        assert words[1:5] == ["-d", str(pipeline.DATASET), "-c", "3d_fullres"]
        return [sys.executable, "-c", PREPROCESS_HERE]

    return command


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
def demo(tmp_path) -> Demo:
    return Demo(tmp_path / "demo", options())


def command(demo: Demo, code: str, total: int = 2) -> steps.Command:
    """A step that runs a line of Python and counts the files in ``made``."""
    made = demo.folder / "made"
    made.mkdir(parents=True)
    words = [sys.executable, "-c", f"from pathlib import Path; made = Path({str(made)!r}); {code}"]
    return steps.Command(
        demo.training(STUDENT), (), "a step", 1, lambda: words, total, lambda: len(list(made.iterdir()))
    )


def test_bar_follows_the_files_of_a_step(demo, capsys):
    step = command(demo, "import time; (made / 'a').touch(); time.sleep(0.5); (made / 'b').touch(); print('log')")
    assert steps.run_with_bar(step) > 0.4
    error = capsys.readouterr().err
    assert "a step" in error and "2/2" in error
    assert step.log.read_text().splitlines()[1:] == ["log"]


def test_failure_names_last_line_and_log(demo):
    step = command(demo, "import sys; print('no room'); sys.exit(3)")
    with pytest.raises(ValueError, match=rf"a step failed: exit code 3: no room \(log: {step.log}\)"):
        steps.run_with_bar(step)


def test_steps_work_in_the_folder_of_the_demo(demo):
    variables = demo.train(STUDENT).variables()
    assert variables["nnUNet_results"] == str(demo.folder / "results")
    assert (variables["nnUNet_n_proc_DA"], variables["nnUNet_def_n_proc"]) == ("0", "1")
    assert demo.train(STUDENT).command()[-2:] == ["-device", "cpu"]


def test_truncated_predictions_are_made_again(tmp_path):
    file = tmp_path / "case.nii.gz"
    file.write_bytes(b"\x1f\x8b\x08")
    steps.drop_truncated(tmp_path)
    assert not file.exists()


def test_controls_get_the_whole_budget(tmp_path):
    demo = Demo(tmp_path / "demo", options(controls=True))
    plain, no_distillation = CONTROLS
    assert demo.epochs(plain) == demo.epochs(TEACHER) + demo.epochs(STUDENT)
    assert demo.epochs(no_distillation) == demo.epochs(STUDENT)
    assert demo.models == [TEACHER, *CONTROLS, STUDENT]  # the student is shown last
    assert len(demo.configurations()) == 3
    assert demo.minutes_left()["controls"] > 0
    assert "controls" not in Demo(tmp_path / "demo", options()).minutes_left()


def test_changed_options_are_named(tmp_path):
    demo = Demo(tmp_path, options())
    demo._save_record()
    Demo(tmp_path, options(controls=True))  # may be added
    with pytest.raises(ValueError, match=r"other options: epochs by default \(now 3\)"):
        Demo(tmp_path, options(epochs=3))


@pytest.mark.parametrize(("student", "teacher"), [(None, 14), (9, 14), (1, 2), (90, 140)])
def test_teacher_epochs_follow_the_students(student, teacher):
    assert options(epochs=student).teacher_epochs == teacher


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not empty and holds no demo"):
        Demo(tmp_path, options())


def test_next_commands_are_valid(tmp_path):
    export, *commands = next_commands(Demo(tmp_path / "a demo", options()))
    assert len(shlex.split(export)) == 4
    for line in commands:
        words = shlex.split(line)[1:]
        assert cli._parser(words).parse_args(words).d == "901"
