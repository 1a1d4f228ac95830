"""The demo at its smallest: what it leaves, and what a second call does."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from nnunetv2_mstkd import cli
from nnunetv2_mstkd.crossval.steps import Progress
from nnunetv2_mstkd.demo import pipeline, result, steps
from nnunetv2_mstkd.demo.pipeline import BASELINE, RECOMMENDED, Demo, Model, Options
from nnunetv2_mstkd.demo.result import next_commands

DROPOUT = Model(RECOMMENDED)
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
    values = {"device": "cpu", "epochs": 11, "cases": 6, "test_cases": 1, "spacing": 6.0, "seed": 0}
    return Options(**{**values, "anatomy": "procedural", "trainers": (), **changes})


def test_runs_through_and_repeats_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "ITERATIONS", 2)
    monkeypatch.setattr(pipeline, "FEATURES", (4, 8, 8, 8))
    monkeypatch.setitem(pipeline.SETTINGS, "schedule.validation_iterations", 1)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(steps.Command, "command", preprocess_here(steps.Command.command))
    out = tmp_path / "demo"
    assert cli.main(["demo", "--out", str(out), *SMALLEST]) == 0, capsys.readouterr().err
    first, bars = capsys.readouterr()
    header = [cell.strip() for cell in _table(first).splitlines()[2].split("|")[1:-1]]
    assert header == ["T1", "T1ce", "T2", "FLAIR", "nnU-Net given zeros", RECOMMENDED]
    assert _table(first).count("\u25cf") == 32  # 15 subsets of four
    assert "say nothing about clinical performance" in first
    assert f"train {RECOMMENDED}" in bars and f"evaluate {RECOMMENDED}" in bars and "min left in all" in bars
    record = json.loads((out / "demo.json").read_text())
    demo = Demo(out, Options.read(record))
    for model in demo.models:
        scores = pd.read_csv(demo.evaluation(model) / "results.csv")
        assert len(scores) == 15 * 3 and scores["value"].between(0, 1).all() and set(scores["model"]) == {model.title}
        assert (demo.evaluation(model) / "report.html").is_file()
    assert (out / "comparison" / "heat_map.png").read_bytes().startswith(b"\x89PNG")
    assert "Pictures" in (out / "comparison" / "comparison.md").read_text()
    # what moves the bars is still what nnU-Net writes
    assert demo.train(BASELINE).log.read_text().count("Epoch time:") == 1
    assert steps.Train.progress(demo.train(DROPOUT)) == Progress("validation")
    done = [step.split("_")[0] for step in record["seconds"]]
    assert done == ["plan", "configure", "train", "train", "evaluate", "evaluate"]

    monkeypatch.setattr(steps, "run_steps", lambda *_, **__: pytest.fail("a finished step ran again"))
    assert cli.main(["demo", "--out", str(out), *SMALLEST]) == 0
    second = capsys.readouterr().out
    assert _table(second) == _table(first)
    assert "timed anew" in first and "everything is computed" in second and "timed anew" not in second
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
    return text[text.index("Dice in %") : text.index("total computing time")]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--cases", "5"], "--cases is 5, expected at least 6"),
        (["--test-cases", "0"], "--test-cases is 0, expected at least 1"),
        (["--seed", "-1"], "--seed is -1, expected 0 to"),
        (
            ["--trainers", "KDTrainer", "nnUNetTrainer_5epochs"],
            "nnUNetTrainer_5epochs does not read the demo's settings",
        ),
        (["--trainers", "MSTKTrainer"], "'MSTKTrainer' was not found (did you mean 'MSTKDTrainer'?)"),
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
        demo.training(DROPOUT), (), "a step", words=lambda: words, total=total, count=lambda: len(list(made.iterdir()))
    )


def test_bar_follows_the_files_of_a_step(demo, capsys):
    step = command(demo, "import time; (made / 'a').touch(); time.sleep(0.5); (made / 'b').touch(); print('log')")
    steps.run_with_bar(step, steps.Clock())
    error = capsys.readouterr().err
    assert "a step" in error and "2/2" in error
    assert step.log.read_text().splitlines()[1:] == ["log"]


def test_the_time_of_an_interrupted_step_counts(demo, monkeypatch):
    step, now = command(demo, "pass"), [0.0]
    monkeypatch.setattr(pipeline.time, "monotonic", lambda: now[0])

    def stopped(*_) -> None:
        now[0] += 20
        raise KeyboardInterrupt

    def ended(*_) -> None:
        now[0] += 5

    for run, seconds in ((stopped, 20), (stopped, 40), (ended, 45)):
        monkeypatch.setattr(steps, "run_with_bar", run)
        with contextlib.suppress(KeyboardInterrupt):
            demo._run(step, 0.0)
        assert json.loads((demo.folder / "demo.json").read_text())["seconds"][step.key] == seconds


def test_data_of_other_configurations_do_not_count(demo):
    step = demo.preprocess()
    for folder in ("nnUNetPlans_3d_fullres", "nnUNetPlans_2d", "gt_segmentations"):
        (demo.preprocessed / folder).mkdir(parents=True)
    for case in range(demo.options.cases):
        (demo.preprocessed / "nnUNetPlans_2d" / f"{case}.pkl").touch()
        (demo.preprocessed / "gt_segmentations" / f"{case}.nii.gz").touch()
    assert not step.done()
    for case in range(demo.options.cases):
        (demo.preprocessed / "nnUNetPlans_3d_fullres" / f"{case}.pkl").touch()
    assert step.done()


def test_failure_names_last_line_and_log(demo):
    step = command(demo, "import sys; print('no room'); sys.exit(3)")
    with pytest.raises(ValueError, match=rf"a step failed: exit code 3: no room \(log: {step.log}\)"):
        steps.run_with_bar(step, steps.Clock())


def test_steps_work_in_the_folder_of_the_demo(demo):
    variables = demo.train(DROPOUT).variables()
    assert variables["nnUNet_results"] == str(demo.folder / "results")
    assert (variables["nnUNet_n_proc_DA"], variables["nnUNet_def_n_proc"]) == ("0", "1")
    assert demo.train(DROPOUT).command()[-2:] == ["-device", "cpu"]


def test_time_left_follows_the_pace_of_trainings(demo):
    clock, train = steps.Clock(), demo.train(DROPOUT)
    clock.measure(demo.preprocess(), 1000.0, 0.5)
    assert clock.minutes_left(train, 0.0, 60.0) == pytest.approx((train.seconds + 60) / 60)
    clock.measure(train, 3 * (steps.START + (train.seconds - steps.START) / 4), 0.25)  # thrice as slow as estimated
    assert clock.minutes_left(train, 0.25, 60.0) == pytest.approx(3 * (0.75 * train.seconds + 60) / 60)


def test_further_trainers_have_their_teachers_trained_first(tmp_path):
    demo = Demo(tmp_path / "demo", options(trainers=("MSTKDTrainer", "KDTrainer", RECOMMENDED)))
    assert [model.trainer for model in demo.models] == ["FullModalityTrainer", RECOMMENDED, "MSTKDTrainer", "KDTrainer"]
    trained = [step.model.trainer for step in demo.commands() if isinstance(step, steps.TrainModel)]
    teachers = ["MSTKDTeacherTrainer", "KDTeacherTrainer"]
    assert trained == ["FullModalityTrainer", RECOMMENDED, *teachers, "MSTKDTrainer", "KDTrainer"]
    evaluated = [step.model.trainer for step in demo.commands() if step.name.startswith("evaluate")]
    assert evaluated == [model.trainer for model in demo.models]


def test_each_model_is_trained_once(tmp_path):
    demo = Demo(tmp_path / "demo", options(trainers=("FullModalityTrainer", "KDTeacherTrainer", "KDTrainer")))
    trained = [step.model.trainer for step in demo.commands() if isinstance(step, steps.TrainModel)]
    assert trained == ["FullModalityTrainer", RECOMMENDED, "KDTeacherTrainer", "KDTrainer"]
    assert [model.trainer for model in demo.models] == trained


def test_changed_options_are_named(tmp_path):
    demo = Demo(tmp_path, options())
    demo._save_record()
    Demo(tmp_path, options(trainers=("MSTKDTrainer",)))  # may be added
    with pytest.raises(ValueError, match=r"other options: epochs 11 \(now 3\)"):
        Demo(tmp_path, options(epochs=3))


def test_the_record_of_another_version_is_refused(tmp_path):
    record = {"options": {"device": "cpu", "controls": False}, "seconds": {}}
    (tmp_path / "demo.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="another version; choose another folder"):
        Demo(tmp_path, options())


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not empty and holds no demo"):
        Demo(tmp_path, options())


@pytest.mark.parametrize("installed", [True, False])
def test_next_commands_are_valid(tmp_path, monkeypatch, installed):
    monkeypatch.setattr(result, "find_spec", lambda name: installed or None)
    demo = Demo(tmp_path / "a demo", options())
    export, predict, app = next_commands(demo)
    assert len(shlex.split(export)) == 4
    words = shlex.split(predict)[1:]
    parsed = cli._parser(words).parse_args(words)
    assert (parsed.d, parsed.tr, parsed.drop) == ("901", RECOMMENDED, "T1ce")
    assert cli._parser(words).parse_args([*words, "T2"]).drop == "T1ce,T2"  # further words, too
    assert ("nnunetv2_mstkd[app]" in app) != installed
    words = shlex.split(app, comments=True)[1:]
    parsed = cli._parser(words).parse_args(words)
    assert parsed.demo and parsed.out == demo.folder
