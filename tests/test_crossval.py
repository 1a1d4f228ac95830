from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIGURATION, PHANTOM, Folders
from test_faults import full_disk

from nnunetv2_mstkd import cli, errors
from nnunetv2_mstkd.commands import crossval as crossval_command
from nnunetv2_mstkd.crossval import locks
from nnunetv2_mstkd.crossval.cluster import _parameters, minutes_of, sbatch_options, submit_steps
from nnunetv2_mstkd.crossval.local import run_steps
from nnunetv2_mstkd.crossval.locks import RunningStepError
from nnunetv2_mstkd.crossval.overview import overview, state_of
from nnunetv2_mstkd.crossval.plan import make_steps, needed_by
from nnunetv2_mstkd.crossval.steps import Compare, Evaluate, Progress, Step, Train, Training, finished_epochs
from nnunetv2_mstkd.inference.evaluation_files import COMPARISON
from nnunetv2_mstkd.nnunet import checkpoints


@dataclass(frozen=True)
class Script(Step):
    """A step that runs a line of Python and is done when its file is there."""

    name: str = "step"
    code: str = "open(output, 'w')"

    @property
    def key(self) -> str:
        return self.name

    @property
    def title(self) -> str:
        return f"the {self.name}"

    @property
    def output(self) -> Path:
        return self.model.results / self.name

    def done(self) -> bool:
        return self.output.is_file()

    def command(self) -> list[str]:
        return [sys.executable, "-c", f"import os, sys, time; output = {str(self.output)!r}; {self.code}"]


class OnTwo(Script):
    gpus = 2


@pytest.fixture
def model(tmp_path: Path) -> Training:
    return Training(tmp_path, "1", "3d_fullres", "Any")


def run(steps: list[Step], **options):
    lines: list[str] = []
    return run_steps(steps, report=lines.append, **options), lines


# ---- running here --------------------------------------------------------------------------------------------------


def test_steps_run_after_their_dependencies(model):
    check = "assert os.path.exists(os.path.join(os.path.dirname(output), 'first')); open(output, 'w')"
    steps = [Script(model, name="first", code="time.sleep(0.5); open(output, 'w')")]
    steps += [Script(model, ("first",), name=name, code=check) for name in ("second", "third")]
    outcome, lines = run(steps, jobs=3)
    assert outcome.finished[0] == "first"
    assert sorted(outcome.finished) == ["first", "second", "third"]
    assert outcome.failed == outcome.left == {}
    assert lines[:2] == ["begin   the first", "done    the first"]
    assert not list(model.logs.glob("*.running"))


def test_done_steps_are_skipped(model):
    (model.results / "first").write_text("untouched")
    steps = [Script(model, name="first"), Script(model, ("first",), name="second")]
    outcome, _ = run(steps)
    assert outcome.finished == ["second"]
    assert (model.results / "first").read_text() == "untouched"
    assert run(steps)[0].finished == []


def test_failure_leaves_only_dependent_steps(model):
    steps = [
        Script(model, name="bad", code="print('no space left'); sys.exit(3)"),
        Script(model, ("bad",), name="after"),
        Script(model, ("after",), name="last"),
        Script(model, name="other"),
    ]
    outcome, _ = run(steps)
    assert outcome.finished == ["other"]
    assert list(outcome.left) == ["after", "last"]
    assert "exit code 3: no space left" in outcome.failed["bad"]
    assert str(model.logs / "bad.log") in outcome.failed["bad"]
    assert "no space left" in (model.logs / "bad.log").read_text()


def test_step_without_output_has_failed(model):
    outcome, _ = run([Script(model, name="empty", code="pass")])
    assert "without its output" in outcome.failed["empty"]


def test_signals_are_named(model):
    outcome, _ = run([Script(model, name="killed", code="os.kill(os.getpid(), 9)")])
    assert "SIGKILL" in outcome.failed["killed"]


@pytest.mark.parametrize(("jobs", "most"), [(1, 1), (3, 3)])
def test_jobs_limit_concurrent_steps(model, jobs, most):
    code = (
        "d = os.path.dirname(output); mine = os.path.join(d, f'on_{os.getpid()}'); open(mine, 'w'); time.sleep(0.6); "
    )
    count = "time.sleep(0.6); n = sum(f.startswith('on_') for f in os.listdir(d)); open(output, 'w').write(str(n))"
    steps = [Script(model, name=f"s{number}", code=f"{code}{count}; os.remove(mine)") for number in range(3)]
    run(steps, jobs=jobs)
    assert max(int(step.output.read_text()) for step in steps) == most


def test_gpus_are_shared(model):
    code = "time.sleep(0.3); open(output, 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    steps = [OnTwo(model, name=f"s{number}", code=code) for number in range(3)]
    run(steps, jobs=3, gpus=["4", "5", "6"])
    given = [step.output.read_text().split(",") for step in steps]
    assert all(len(each) == 2 and set(each) < {"4", "5", "6"} for each in given)


def test_gpus_per_kind_of_step(model):
    two = dataclasses.replace(model, gpus=2)
    assert [Train(two).gpus, Evaluate(two).gpus, Compare(two).gpus] == [2, 1, 0]
    assert Train(dataclasses.replace(two, device="cpu")).gpus == 0


def test_interrupt_ends_children_and_releases_locks(model):
    code = (
        "import subprocess; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "open(output + '.child', 'w').write(str(child.pid)); time.sleep(600)"
    )
    step = Script(model, name="long", code=code)
    child = Path(f"{step.output}.child")

    class InterruptedByHandError(Exception):
        pass

    def report(line: str) -> None:
        for _ in range(200):
            if child.is_file() and child.read_text():
                raise InterruptedByHandError
            time.sleep(0.1)

    with pytest.raises(InterruptedByHandError):
        run_steps([step], report=report)
    assert not list(model.logs.glob("*.running"))
    for _ in range(100):
        if not _alive(int(child.read_text())):
            break
        time.sleep(0.1)
    assert not _alive(int(child.read_text()))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_locked_steps_are_refused(model):
    steps = [Script(model, name="free"), Script(model, name="taken")]
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        steps[1].lock.acquire()
        steps[1].lock.pass_to(pid=other.pid)
        with pytest.raises(RunningStepError, match=rf"taken is run by process {other.pid} on this machine"):
            run(steps)
        assert not steps[0].done()
        assert not steps[0].lock.file.exists()
        assert state_of(steps[1])[0] == "running"
        other.kill()
        other.wait()
        assert run(steps)[0].finished == ["free", "taken"]


def test_lock_of_a_reused_pid_is_stale(model):
    lock = Script(model).lock
    lock.acquire()
    assert lock.owner().waits
    assert state_of(Script(model))[0] == "queued"
    content = json.loads(lock.file.read_text())
    lock.file.write_text(json.dumps({**content, "started": "1"}))
    assert lock.owner() is None


def test_lock_of_another_machine_counts(model):
    lock = Script(model).lock
    lock.acquire()
    content = json.loads(lock.file.read_text())
    lock.file.write_text(json.dumps({**content, "host": "elsewhere"}))
    with pytest.raises(RunningStepError, match=r"on elsewhere.*remove .*step.running"):
        lock.acquire()


def test_lock_that_changes_while_it_is_judged_is_kept(model, monkeypatch):
    lock = Script(model).lock
    lock.file.parent.mkdir()
    lock.file.write_text('{"job": "7"}')

    def another_process_is_faster(job: str) -> None:
        lock.file.unlink()
        lock.acquire()

    monkeypatch.setattr(locks, "job_state", another_process_is_faster)
    with pytest.raises(RunningStepError, match=f"is run by process {os.getpid()} on this machine"):
        lock.acquire()
    assert [path.name for path in lock.file.parent.iterdir()] == [lock.file.name]


def test_a_lock_that_has_no_room_is_removed(model):
    lock = Script(model).lock
    with full_disk(0), pytest.raises(OSError, match="File too large"):
        lock.acquire()
    assert not lock.file.exists()
    lock.acquire()


def test_a_job_takes_the_lock_of_the_process_that_submitted_it(model, monkeypatch):
    lock, alive = Script(model).lock, {"8"}
    monkeypatch.setattr(locks, "job_state", lambda job: "RUNNING" if job in alive else None)
    lock.acquire()
    lock.take("7")
    assert lock.owner() is None  # job 7 has ended
    lock.take("8")
    assert lock.owner().name.startswith("SLURM job 8 (RUNNING)")
    lock.take("8")  # queued again
    with pytest.raises(RunningStepError, match=r"is run by SLURM job 8 .*, not by job 9"):
        lock.take("9")
    lock.release()
    lock.take("9")


def test_a_job_without_a_place_in_the_lock_is_cancelled(model, monkeypatch):
    submitit = pytest.importorskip("submitit")
    cancelled = []

    class Executor:
        def __init__(self, *arguments, **options) -> None: ...
        def update_parameters(self, **options) -> None: ...
        def submit(self, job) -> SimpleNamespace:
            return SimpleNamespace(job_id="7", cancel=lambda check: cancelled.append("7"))

    def no_room(*arguments, **options) -> None:
        raise OSError("no room")

    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    monkeypatch.setattr(locks.Lock, "pass_to", no_room)
    with pytest.raises(OSError, match="no room"):
        submit_steps([Script(model)], {})
    assert cancelled == ["7"] and not Script(model).lock.file.exists()


def test_half_written_lock_counts(model):
    lock = Script(model).lock
    lock.file.parent.mkdir()
    lock.file.write_text("{")
    assert lock.owner() is not None


# ---- what the files say --------------------------------------------------------------------------------------------


def train_step(results: Path, **options) -> Train:
    return Train(Training(results, "7", "3d_fullres", "Some", device="cpu", **options), fold=2)


def test_training_starts_resumes_validates(tmp_path):
    step = train_step(tmp_path, gpus=2)
    words = "nnUNetv2_train 7 3d_fullres 2 -tr Some -p nnUNetPlans -device cpu -num_gpus 2"
    assert step.command() == words.split()
    assert (step.done(), step.progress()) == (False, None)
    step.output.mkdir(parents=True)
    (step.output / "checkpoint_latest.pth").touch()
    assert step.command() == [*words.split(), "--c"]
    (step.output / "checkpoint_final.pth").touch()
    assert step.command() == [*words.split(), "--val"]
    assert (step.done(), step.progress()) == (False, Progress("validation"))
    (step.output / "validation").mkdir()
    (step.output / "validation" / "summary.json").touch()
    assert step.done()


def test_epochs_are_counted_over_all_logs(tmp_path):
    assert finished_epochs(tmp_path) is None
    first = tmp_path / "training_log_1.txt"
    first.write_text("x: Epoch 0 \nx: Epoch time: 2 s \nx: Epoch 1 \nx: Epoch time: 2 s \nx: Epoch 2 \n")
    assert finished_epochs(tmp_path) == (2, None)
    second = tmp_path / "training_log_2.txt"
    second.write_text("x: Epoch 1 \nx: Epoch time: 2 s \nx: Epoch 2 \nx: Epoch time: 2 s \n")
    os.utime(first, (1, 1))
    (tmp_path / "debug.json").write_text('{"num_epochs": "50"}')
    assert finished_epochs(tmp_path) == (3, 50)


@pytest.fixture
def evaluated(tmp_path: Path) -> tuple[Evaluate, Evaluate]:
    """The steps of fold 1 and of folds 0 and 1 together, all of whose files are there, each newer than the last."""
    splits = tmp_path / "splits_final.json"
    splits.write_text(json.dumps([{"train": [], "val": ["a"]}, {"train": [], "val": ["b", "c"]}]))
    one = Evaluate(Training(tmp_path, "7", "3d_fullres", "Some"), folds=(1,), splits=splits)
    both = dataclasses.replace(one, folds=(0, 1), pooled=True)
    for number, name in enumerate(
        ["fold_0/checkpoint_final.pth", "fold_1/checkpoint_final.pth", "subsets/cases/fold_0/a.json",
         "subsets/cases/fold_1/b.json", "subsets/cases/fold_1/c.json", "subsets/results.csv", "subsets/summary.json"]
    ):  # fmt: skip
        file = one.model.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("case,fold\na,0\nb,1\nc,1\n" if name.endswith("csv") else "")
        os.utime(file, (number + 10, number + 10))
    return one, both


def test_evaluation_needs_all_cases(evaluated):
    one, both = evaluated
    assert one.done() and both.done()
    (one.output / "cases" / "fold_1" / "c.json").unlink()
    assert not one.done() and not both.done()
    assert str(one.progress()) == "case 1 of 2"


def test_evaluation_needs_the_cases_that_it_has_noted(evaluated):
    """Those without a label are left out, and a checkpoint may be of another split."""
    one, both = evaluated
    (one.output / "cases" / "fold_1" / "c.json").unlink()
    (one.output / "cases" / "fold_1.json").write_text('{"cases": ["b"]}')
    assert one.done() and both.done() and str(one.progress()) == "case 1 of 1"
    os.utime(one.splits, (time.time() + 9, time.time() + 9))  # another split
    assert not one.done()


def test_evaluation_needs_every_subset(evaluated):
    """A quick look with ``--subsets all`` is none, and it may have replaced the tables of all folds."""
    one, both = evaluated
    other, note = dataclasses.replace(one, folds=(0,)), one.output / "cases" / "fold_1.json"
    for complete in (False, True):
        note.write_text(json.dumps({"cases": ["b", "c"], "complete": complete}))
        assert (one.done(), both.done(), other.done()) == (complete, complete, True)


def test_a_note_of_an_evaluation_counts_if_the_tables_are_of_another_fold(evaluated):
    """After a copy without times, a fold is evaluated again: its records are kept, and another fold has the tables."""
    one, _ = evaluated
    checkpoint, note = one.model.folder / "fold_1" / "checkpoint_final.pth", one.output / "cases" / "fold_1.json"
    os.utime(checkpoint, (time.time() + 9, time.time() + 9))
    (one.output / "results.csv").write_text("fold\n0\n")
    note.write_text(json.dumps({"cases": ["b", "c"], "complete": True}))
    assert not one.done()
    os.utime(note, (time.time() + 10, time.time() + 10))
    assert one.done()
    note.write_text(json.dumps({"cases": ["b", "c"], "complete": False}))
    os.utime(one.splits, (time.time() + 20, time.time() + 20))
    os.utime(note, (time.time() + 10, time.time() + 10))
    assert not one.done()


def test_a_fold_that_was_trained_again_is_evaluated_anew(evaluated):
    one, both = evaluated
    checkpoint = one.model.folder / "fold_1" / "checkpoint_final.pth"
    old, new = {"a": torch.zeros(2)}, {"a": torch.ones(2)}
    for case in ("b", "c"):
        file = one.output / "cases" / "fold_1" / f"{case}.json"
        file.write_text(json.dumps({"weights": checkpoints.fingerprint(old)}))
        os.utime(file, (13, 13))
    assert "--restart" not in one.command()
    torch.save({"network_weights": old}, checkpoint)  # as copied: newer, and the same
    assert not one.done() and "--restart" not in one.command()
    torch.save({"network_weights": new}, checkpoint)
    assert not one.done() and "--restart" in one.command()
    assert "--restart" not in both.command()  # which comes after it
    other = dataclasses.replace(one, folds=(0,))
    assert other.done() and "--restart" not in other.command()


def test_other_options_than_those_of_the_results_are_refused(evaluated):
    one, _ = evaluated
    unmirrored = dataclasses.replace(one, options=("--disable_tta",))
    one.check_options()
    unmirrored.check_options()
    (one.output / "cases" / "run.json").write_text('{"mirroring": true}')
    one.check_options()
    with pytest.raises(errors.InputError, match="evaluated with mirroring; leave out --disable_tta"):
        unmirrored.check_options()
    (one.output / "cases" / "run.json").write_text('{"mirroring": false}')
    unmirrored.check_options()
    with pytest.raises(errors.InputError, match="evaluated without mirroring; give --disable_tta"):
        one.check_options()


def test_the_comparison_of_many_trainers_has_a_name_that_fits(tmp_path):
    models = [Training(tmp_path, "7", "3d_fullres", f"{'Long' * 8}{number}Trainer") for number in range(20)]
    key = Compare(models[0], models=tuple(models)).key
    assert len(f"{key}.running") < 255 and key.startswith("LongLong") and "_and_19_others_" in key
    assert key != Compare(models[0], models=(*models[:-1], models[1])).key
    assert Compare(models[0], models=tuple(models[:2])).key.count("Trainer") == 2


def test_evaluation_of_other_cases_is_not_that_of_the_fold(evaluated):
    """``mstkd evaluate -i`` without ``-o`` writes into the same folder."""
    one, _ = evaluated
    (one.output / "cases" / "fold_1" / "c.json").rename(one.output / "cases" / "fold_1" / "test_case.json")
    assert not one.done() and str(one.progress()) == "case 1 of 2"


def test_pooled_evaluation_needs_the_table_of_its_folds(evaluated):
    one, both = evaluated
    (both.output / "results.csv").write_text("case,fold\na,0\n")
    assert one.done()
    assert not both.done()
    (both.output / "results.csv").unlink()
    assert one.done() and not both.done()


def test_evaluation_that_was_killed_before_its_summary_is_not_done(evaluated):
    _, both = evaluated
    os.utime(both.output / "results.csv")  # newer than the summary, which is that of an earlier call
    assert not both.done()
    os.utime(both.output / "summary.json")
    assert both.done()
    (both.output / "summary.json").unlink()
    assert not both.done()


def test_evaluation_of_older_weights_is_not_done(evaluated):
    one, both = evaluated
    os.utime(one.model.folder / "fold_1" / "checkpoint_final.pth")
    assert not one.done() and not both.done()


def test_comparison_must_be_newer_than_its_inputs(tmp_path):
    models = tuple(Training(tmp_path, "7", "3d_fullres", name) for name in ("One", "Two"))
    step = Compare(models[0], models=models)
    for model in models:
        (model.folder / "subsets").mkdir(parents=True)
        (model.folder / "subsets" / "results.csv").touch()
    assert not step.done()
    step.output.mkdir(parents=True)
    (step.output / "table.md").touch()
    assert not step.done()  # killed before the page, which is written last
    (step.output / COMPARISON).touch()
    assert step.done()
    os.utime(models[1].folder / "subsets" / "results.csv", (time.time() + 9, time.time() + 9))
    assert not step.done()
    others = tuple(dataclasses.replace(model, plans="Others") for model in models)
    assert Compare(others[0], models=others).output != step.output


# ---- the plan ------------------------------------------------------------------------------------------------------


def plans_of(folders: Folders) -> dict:
    return json.loads(folders.plans_file.read_text())


def steps_for(folders: Folders, *trainers: str, folds=(0, 1), **options) -> dict[str, Step]:
    models = [Training(folders.results / folders.dataset, "902", CONFIGURATION, name) for name in trainers]
    steps = make_steps(folders.preprocessed / folders.dataset, models, folds, plans_of(folders), **options)
    assert all(
        need in [other.key for other in steps[:number]] for number, step in enumerate(steps) for need in step.needs
    )
    return {step.title: step for step in steps}


def test_steps_of_a_distilled_model(phantom):
    steps = steps_for(phantom, "MSTKDTrainer")
    assert list(steps) == [
        "train MSTKDTeacherTrainer (tiny), fold 0",
        "train MSTKDTrainer (tiny), fold 0",
        "evaluate MSTKDTrainer (tiny), fold 0",
        "train MSTKDTeacherTrainer (tiny), fold 1",
        "train MSTKDTrainer (tiny), fold 1",
        "evaluate MSTKDTrainer (tiny), fold 1",
        "pool MSTKDTrainer (tiny), folds 0 1",
    ]
    teacher, student, evaluation = list(steps.values())[:3]
    assert student.needs == (teacher.key,)
    assert evaluation.needs == (student.key,)
    assert steps["pool MSTKDTrainer (tiny), folds 0 1"].needs == (
        evaluation.key,
        steps["evaluate MSTKDTrainer (tiny), fold 1"].key,
    )


def test_steps_of_one_fold(phantom):
    steps = steps_for(phantom, "MSTKDTrainer", "MSTKDTeacherTrainer", "nnUNetTrainer", folds=(0,))
    assert list(steps) == [
        "train MSTKDTeacherTrainer (tiny), fold 0",
        "train MSTKDTrainer (tiny), fold 0",
        "evaluate MSTKDTrainer (tiny), fold 0",
        "evaluate MSTKDTeacherTrainer (tiny), fold 0",
        "train nnUNetTrainer (tiny), fold 0",
        "evaluate nnUNetTrainer (tiny), fold 0",
        "compare MSTKDTrainer, MSTKDTeacherTrainer, nnUNetTrainer",
    ]
    assert len(steps_for(phantom, "MSTKDTrainer", "nnUNetTrainer", evaluation=False)) == 6


def test_teacher_of_a_parent_configuration(phantom):
    plans = plans_of(phantom)
    plans["configurations"]["other"] = {"inherits_from": CONFIGURATION, "mstkd": {"schedule": {"epochs": 9}}}
    model = Training(phantom.results / phantom.dataset, "902", "other", "MSTKDTrainer")
    assert [each.configuration for each in needed_by(model, plans, 0)] == [CONFIGURATION]
    own = phantom.fold("MSTKDTeacherTrainer", configuration="other")
    own.mkdir(parents=True)
    (own / "checkpoint_latest.pth").touch()
    assert [each.configuration for each in needed_by(model, plans, 0)] == ["other"]
    parent = phantom.fold("MSTKDTeacherTrainer")
    parent.mkdir(parents=True)
    (parent / "checkpoint_final.pth").touch()
    assert [each.configuration for each in needed_by(model, plans, 0)] == [CONFIGURATION]


def test_two_models_of_one_trainer_may_be_needed(phantom):
    """The student starts from one with its own patch size, and its teacher was trained in another configuration."""
    plans = plans_of(phantom)
    block = {"schedule": {"init_from": "KDTeacherTrainer"}, "teacher": {"configuration": CONFIGURATION}}
    patch = [16, 16, 16]
    plans["configurations"]["other"] = {"inherits_from": CONFIGURATION, "patch_size": patch, "mstkd": block}
    model = Training(phantom.results / phantom.dataset, "902", "other", "KDTrainer")
    needed = [(each.trainer, each.configuration) for each in needed_by(model, plans, 0)]
    assert needed == [("KDTeacherTrainer", "other"), ("KDTeacherTrainer", CONFIGURATION)]


@pytest.mark.parametrize(
    ("block", "shared"),
    [
        ({"schedule": {"epochs": 9, "optimizer": "adamw"}, "mstkd": {"kl": 0}, "teacher": {"warm_start": False}}, True),
        ({"teacher": {"cases": "all"}}, False),
        ({"teacher": {"epochs": 20}}, False),
        ({"schedule": {"init_from": "FullModalityTrainer"}}, False),
        ({"schedule": {"init_from": "MSTKDTeacherTrainer"}}, True),  # which starts the student alone
        ({"network": {"placement": "main"}}, False),
        ({"input": {"normalization": "per_channel"}}, False),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else str(value),
)
def test_a_teacher_that_would_be_another_is_trained_in_the_configuration_itself(phantom, block, shared):
    plans = plans_of(phantom)
    plans["configurations"]["other"] = {"inherits_from": CONFIGURATION, "mstkd": block}
    model = Training(phantom.results / phantom.dataset, "902", "other", "MSTKDTrainer")
    (teacher,) = [each for each in needed_by(model, plans, 0) if each.trainer == "MSTKDTeacherTrainer"]
    assert teacher.configuration == (CONFIGURATION if shared else "other")
    parent = phantom.fold("MSTKDTeacherTrainer")
    parent.mkdir(parents=True)
    (parent / "checkpoint_final.pth").touch()  # one that is there is used if its student can use it
    (teacher,) = [each for each in needed_by(model, plans, 0) if each.trainer == "MSTKDTeacherTrainer"]
    usable = shared or "schedule" in block or "epochs" in block.get("teacher", {})
    assert teacher.configuration == (CONFIGURATION if usable else "other")


def test_a_model_to_start_from_is_trained_first(phantom):
    """Its own, and that of the teacher; not that trainer itself, and not in a circle."""
    for source, expected in (
        ("FullModalityTrainer", ["FullModalityTrainer", "MSTKDTeacherTrainer", "MSTKDTrainer"]),
        ("MSTKDTeacherTrainer", ["MSTKDTeacherTrainer", "MSTKDTrainer"]),
        ("MSTKDTrainer", ["MSTKDTeacherTrainer", "MSTKDTrainer"]),
        ("elsewhere/checkpoint_final.pth", ["MSTKDTeacherTrainer", "MSTKDTrainer"]),
    ):
        plans = plans_of(phantom)
        plans["configurations"][CONFIGURATION]["mstkd"] = {"schedule": {"init_from": source}}
        model = Training(phantom.results / phantom.dataset, str(PHANTOM), CONFIGURATION, "MSTKDTrainer")
        steps = make_steps(phantom.preprocessed / phantom.dataset, [model], [0], plans, evaluation=False)
        assert [step.model.trainer for step in steps] == expected
        assert set(steps[-1].needs) == {step.key for step in steps[:-1]}


# ---- the commands --------------------------------------------------------------------------------------------------


def command(*words: str) -> int:
    return cli.main(["crossval", "-d", str(PHANTOM), "-c", CONFIGURATION, "-device", "cpu", *words])


def test_dry_run_only_prints(phantom, capsys):
    assert command("--folds", "0", "--dry-run") == 0
    assert "-tr ModalityDropoutTrainer" in capsys.readouterr().out
    assert command("--folds", "0", "--dry-run", "-tr", "MSTKDTrainer") == 0
    printed = capsys.readouterr().out
    assert "nnUNetv2_train 902 tiny 0 -tr MSTKDTeacherTrainer -p nnUNetPlans -device cpu" in printed
    assert "after: train MSTKDTeacherTrainer (tiny), fold 0" in printed
    assert "mstkd evaluate -d 902 -c tiny -tr MSTKDTrainer -p nnUNetPlans -f 0" in printed
    assert printed.splitlines()[0].split()[0] == "waiting"
    assert printed.endswith("0 of 3 steps are done\n")
    assert list(phantom.results.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--folds", "5"], "the folds 0 to 4"),  # of nnU-Net, or of its splits_final.json
        (["--folds", "-1"], "folds are numbers from 0"),
        (["--folds", "1", "1"], "--folds names 1 twice"),
        (["-tr", "NoTrainer"], "trainer 'NoTrainer' was not found"),
        (
            ["--num-gpus", "3", "-device", "cuda"],
            "a batch of tiny has 2 samples, and each GPU needs one; take at most 2",
        ),
        (["--jobs", "0"], "expected numbers from 1"),
        (["-p", "Other"], "nnUNetv2_plan_and_preprocess"),
        (["--gpus", "0"], "--gpus shares GPUs of this machine"),
        (["--slurm-partition", "gpu"], "--slurm-partition needs --executor slurm"),
        (["--executor", "slurm", "--slurm-time", "soon"], "--slurm-time soon: expected"),
        (["--executor", "slurm", "--slurm-option", "=1"], "--slurm-option =1: expected KEY=VALUE, or KEY alone"),
        (["--executor", "slurm", "--slurm-option", "dependency"], "--slurm-option dependency: expected KEY=VALUE"),
        (["--executor", "slurm", "--slurm-time", "0:00:00"], "--slurm-time 0:00:00: a step needs a limit"),
        (["--executor", "slurm", "--jobs", "2"], "--jobs 2 is for --executor local"),
        (["--num-gpus", "2"], "--num-gpus 2 needs -device cuda"),
        (["--disable_tta", "--no-evaluation"], "which --no-evaluation leaves out"),
        (["--executor", "slurm", "--slurm-option", "dependency=afterok:1?afterok:2"], "join that to alternatives"),
    ],
)
def test_bad_input_is_one_line(phantom, capsys, words, line):
    assert command(*words) == errors.EXIT_USER_ERROR
    printed = capsys.readouterr()
    assert line in printed.err
    assert printed.err.count("\n") == 1
    assert list(phantom.results.iterdir()) == []


def test_default_folds_are_those_of_the_data_set(phantom, capsys):
    splits = phantom.preprocessed / phantom.dataset / "splits_final.json"
    splits.write_text(json.dumps([{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}]))
    assert command("--dry-run", "-tr", "nnUNetTrainer") == 0
    printed = capsys.readouterr().out
    assert "fold 1" in printed and "fold 2" not in printed


def test_unknown_configuration_lists_known_ones(phantom, capsys):
    assert cli.main(["status", "-d", str(PHANTOM), "-c", "4d"]) == errors.EXIT_USER_ERROR
    assert "has no configuration '4d'; it has" in capsys.readouterr().err


def test_missing_slurm_names_the_remedy(phantom, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert command("--executor", "slurm") == errors.EXIT_USER_ERROR
    assert "there is no command sbatch on this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        (15, 15),
        ("1:30", 2),
        ("2:00:00", 120),
        ("1-0", 1440),
        ("1-2:30", 1590),
        ("1-0:0:1", 1441),
        ("0:1", 1),
    ],
)
def test_sbatch_times(text, minutes):
    assert minutes_of(text) == minutes


@pytest.mark.parametrize(
    ("options", "after", "dependency"),
    [
        ({}, ["7", "8"], "afterok:7:8"),
        ({"dependency": "afterany:3"}, ["7", "8"], "afterok:7:8,afterany:3"),
        ({"dependency": "afterany:3"}, [], "afterany:3"),
        ({}, [], None),
    ],
)
def test_a_dependency_of_the_user_is_added_to_that_on_other_steps(model, options, after, dependency):
    given = _parameters(Script(model), options, after)["slurm_additional_parameters"]
    assert given.get("dependency") == dependency


def test_options_of_sbatch_may_have_no_value(model):
    options = sbatch_options({"time": "60"}, ["exclusive", "--requeue", "nodelist=node01"])
    assert options == {"time": "60", "exclusive": True, "requeue": True, "nodelist": "node01"}
    assert _parameters(Script(model), options, [])["slurm_additional_parameters"]["requeue"] is True


def test_a_number_of_two_data_sets_is_not_used(phantom, capsys):
    (phantom.results / f"Dataset{PHANTOM}_Old").mkdir()
    assert command("--folds", "0", "--dry-run") == errors.EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert f"is ambiguous in nnU-Net's folders: Dataset{PHANTOM}_Old, {phantom.dataset}; give the full name" in error
    words = ["crossval", "-d", phantom.dataset, "-c", CONFIGURATION, "-device", "cpu", "--folds", "0", "--dry-run"]
    assert cli.main(words) == 0
    assert f"nnUNetv2_train {phantom.dataset} {CONFIGURATION} 0" in capsys.readouterr().out


def test_the_command_to_follow_jobs_names_the_same_steps():
    parser = argparse.ArgumentParser()
    crossval_command.add_arguments(parser)
    words = ["-d", "7", "-c", "c", "-tr", "A", "B", "-f", "0", "2", "-p", "Other", "--no-evaluation"]
    assert crossval_command._status_command(parser.parse_args(words)) == f"mstkd status {' '.join(words)}"
    assert crossval_command._status_command(parser.parse_args(words[:6])) == "mstkd status -d 7 -c c -tr A"
    with pytest.raises(SystemExit):
        parser.parse_args(["-d", "7", "-c", "c", "-f", "all"])


def test_concurrent_call_is_refused(phantom, capsys):
    step = steps_for(phantom, "MSTKDTrainer", folds=(0,))["train MSTKDTrainer (tiny), fold 0"]
    step.lock.acquire()
    assert command("--folds", "0", "-tr", "MSTKDTrainer") == errors.EXIT_USER_ERROR
    assert f"is run by process {os.getpid()} on this machine" in capsys.readouterr().err
    assert [path.name for path in step.log.parent.iterdir()] == [step.lock.file.name]


def test_sigterm_ends_the_steps(tmp_path):
    script = tmp_path / "call.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_crossval import Script, Training\n"
        "from pathlib import Path\n"
        "from nnunetv2_mstkd import errors\n"
        "from nnunetv2_mstkd.crossval.local import run_steps\n"
        "report = lambda line: print(line, flush=True)\n"
        f"model = Training(Path({str(tmp_path)!r}), '1', 'c', 'T')\n"
        "step = Script(model, name='long', code='time.sleep(600)')\n"
        "sys.exit(errors.run_and_report('mstkd crossval', lambda args: run_steps([step], report=report), None))\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as call:
        assert call.stdout.readline() == "begin   the long\n"
        call.send_signal(signal.SIGTERM)
        assert call.communicate(timeout=60)[1] == "mstkd crossval: terminated\n"
    assert call.returncode == errors.EXIT_TERMINATED
    assert not list(tmp_path.glob("crossval/*.running"))


def test_validates_evaluates_and_shows_trained_models(models, capsys, monkeypatch):
    teacher = models.fold("MSTKDTeacherTrainer") / "validation"
    teacher.mkdir()
    (teacher / "summary.json").write_text("{}")
    assert command("--folds", "0", "--disable_tta", "-tr", "MSTKDTrainer") == 0
    printed = capsys.readouterr().out
    assert "Teacher" not in printed
    assert "begin   train MSTKDTrainer (tiny), fold 0" in printed  # its validation is what is missing
    assert "3 of 3 steps are done" in printed
    folder = models.fold("MSTKDTrainer").parent
    assert (folder / "fold_0" / "validation" / "summary.json").is_file()
    assert (folder / "subsets" / "results.csv").is_file()
    assert "--val" in (models.results / models.dataset / "crossval" / f"{folder.name}.fold_0.train.log").read_text()

    assert command("--folds", "0", "--dry-run", "-tr", "MSTKDTrainer") == errors.EXIT_USER_ERROR
    assert "was evaluated without mirroring" in capsys.readouterr().err
    assert command("--folds", "0", "--dry-run", "--disable_tta", "-tr", "MSTKDTrainer") == 0
    printed = capsys.readouterr().out
    assert "nnUNetv2_train" not in printed and printed.endswith("3 of 3 steps are done\n")
    assert cli.main(["status", "-d", str(PHANTOM), "-c", CONFIGURATION, "-tr", "MSTKDTrainer", "-f", "0", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["done"] * 3 + ["waiting"] * 4
    assert lines[-1] == "3 of 7 steps are done"
    (models.fold("MSTKDTrainer") / "checkpoint_final.pth").unlink()
    shown = overview(list(steps_for(models, "MSTKDTrainer", folds=(0,)).values()))
    assert "stopped  train MSTKDTrainer (tiny), fold 0" in shown
    assert "epoch 2 of 2" in shown
