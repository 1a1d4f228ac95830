"""See everything work on one GPU, in at most 6 minutes.

    python benchmarks/gpu_check.py --out FOLDER                 # needs CUDA
    python benchmarks/gpu_check.py --out FOLDER --device cpu    # the same, less what CUDA adds

A tiny phantom goes through nnU-Net's own commands: every trainer is trained for two epochs (on CUDA with autocast,
gradient scaling and torch.compile), one with growing patches is killed and resumed with ``--c``, one is trained in a
group of one process with nccl; a model predicts and is evaluated on the GPU and on the CPU, whose labels must agree
except near the decision; and `step_cost.py` times the trainers, eager and compiled. A part that fails does not stop
the others. The table at the end is also in FOLDER/gpu_check.json. Nothing has to be installed that PYTHONPATH can
hold: the commands are scripts in FOLDER/bin.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from nnunetv2_mstkd.crossval.local import last_line, run_steps
from nnunetv2_mstkd.crossval.plan import plan_steps
from nnunetv2_mstkd.crossval.steps import Step, Train, finished_epochs
from nnunetv2_mstkd.demo.steps import FOLDERS, environment
from nnunetv2_mstkd.methods.registry import trainers
from nnunetv2_mstkd.phantom.dataset import write_dataset
from nnunetv2_mstkd.processes import usable_cores
from nnunetv2_mstkd.reporting.tables import TEXT, frame_table

DATASET = 902
CONFIGURATION = "tiny"
LONGER = "tiny_longer"
"""For the resumed training, which must live long enough to be killed; its patches grow, each batch is used twice."""
RESUMED = "ModalityDropoutTrainer"
DISTRIBUTED = "KDTrainer"
MINUTES = 6.0
NEAR = 0.5
"""Logits: labels may differ between devices where the CPU's decision is as close as that; CUDA computes in float16."""

COMMANDS = {
    "nnUNetv2_train": "nnunetv2.run.run_training:run_training_entry",
    "nnUNetv2_plan_and_preprocess": (
        "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:plan_and_preprocess_entry"
    ),
    "mstkd": "nnunetv2_mstkd.cli:main",
}
SCRIPT = """#!{python}
import sys
from {module} import {function}

if __name__ == "__main__":
    sys.exit({function}())
"""
GROUP_OF_ONE = """
from nnunetv2.run.run_training import run_ddp
run_ddp(0, "{dataset}", "{configuration}", 0, "{trainer}", "nnUNetPlans", False, False, False, None, False, False, 1)
"""


class CheckError(RuntimeError):
    """A part did not do what it should."""


class OutOfTimeError(Exception):
    """The minutes are over."""


class Check:
    """All parts, in a folder; `rows` holds what was found."""

    def __init__(self, folder: Path, device: str, names: Sequence[str], jobs: int, minutes: float) -> None:
        self.folder, self.device, self.names, self.jobs = folder.resolve(), device, names, jobs
        self.end = time.monotonic() + 60 * minutes
        self.rows: list[dict[str, str | float]] = []
        for sub in FOLDERS.values():
            (self.folder / sub).mkdir(parents=True)
        write_commands(self.folder / "bin")
        roots = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        os.environ |= environment(self.folder) | {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, roots)),
            "nnUNet_def_n_proc": "2",
        }

    @property
    def images(self) -> Path:
        """Test images."""
        return next((self.folder / "raw").glob("Dataset*")) / "imagesTs"

    def part(self, name: str, run: Callable[[], list[str] | None]) -> bool:
        """Run a part, and note its seconds, its outcome and the details that it returns; whether all is well."""
        begin, details, outcome = time.monotonic(), None, "ok"
        try:
            if begin > self.end:
                raise OutOfTimeError
            details = run()
        except OutOfTimeError:
            outcome = "not reached: the minutes were over"
        except Exception as error:  # whatever it is, the other parts are worth seeing
            traceback.print_exc()
            outcome = f"FAILED: {error}"
        self.note(name, outcome, time.monotonic() - begin, "; ".join(details or []))
        return outcome == "ok"

    def note(self, part: str, outcome: str, seconds: float, details: str = "") -> None:
        """Add a row and print it."""
        self.rows.append({"part": part, "outcome": outcome, "seconds": round(seconds, 1), "details": details})
        print(f"{part:<44}{seconds:7.1f} s  {outcome}{'; ' if details else ''}{details}", flush=True)

    def run(self, name: str, *words: object) -> str:
        """Run a command to its end and return what it printed, also kept in FOLDER/logs."""
        log = self.folder / "logs" / f"{name.replace(' ', '_')}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("w", encoding="utf-8") as stream:
            left = max(1.0, self.end - time.monotonic())
            try:
                done = subprocess.run(
                    [str(word) for word in words], stdout=stream, stderr=subprocess.STDOUT, timeout=left, check=False
                )
            except subprocess.TimeoutExpired as error:
                raise OutOfTimeError from error
        if done.returncode:
            raise CheckError(f"exit code {done.returncode}: {last_line(log)} (log: {log})")
        return log.read_text(encoding="utf-8")

    # ---- parts -------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """The phantom, its plans, and configurations with a tiny network."""
        write_dataset(self.folder / "raw", DATASET, name="Check", cases=6, test_cases=1, spacing=6.0, seed=0)
        command = f"nnUNetv2_plan_and_preprocess -d {DATASET} -c 3d_fullres -np 2 -npfp 2".split()
        self.run("plan", *command)
        plans = json.loads(next((self.folder / "preprocessed").glob("*/nnUNetPlans.json")).read_text())
        stages = len(plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["strides"])
        settings = ["schedule.iterations=4", "schedule.validation_iterations=1", "schedule.seed=0"]
        growing = ["schedule.patch_phases=4", "schedule.batch_repeats=2"]
        for name, epochs, more in ((CONFIGURATION, 2, []), (LONGER, 8, growing)):
            lengths = [f"schedule.epochs={epochs}", f"teacher.epochs={epochs}", "schedule.save_every=1"]
            words = [word for setting in (*settings, *lengths, *more) for word in ("--set", setting)]
            features = [8, 16, 16, *[16] * stages][:stages]
            self.run(
                f"configure {name}", *f"mstkd configure -d {DATASET} -c 3d_fullres --name {name}".split(), *words,
                "--features", *features, "--batch-size", 2,
            )  # fmt: skip

    def train(self) -> None:
        """Every trainer, several at once; a student after its teacher."""
        os.environ["nnUNet_n_proc_DA"] = "0"  # a tiny patch is made faster than a process is started
        steps = plan_steps(str(DATASET), CONFIGURATION, self.names, [0], device=self.device, evaluation=False)
        times: dict[str, list[float]] = {}

        def report(line: str) -> None:
            title = line[8:].split(":")[0]
            times.setdefault(title, []).append(time.monotonic())

        def watch(step: Step) -> None:
            if time.monotonic() > self.end:
                raise OutOfTimeError

        failed: dict[str, str] = {}
        try:
            outcome = run_steps(steps, jobs=self.jobs, report=report, watch=watch)
            failed = outcome.failed | outcome.left
        except OutOfTimeError:
            pass
        for step in steps:
            begin, *end = times.get(step.title, [0.0])
            if step.done():
                losses = "FAILED: the loss is not finite" if not finite_losses(step) else "ok"
                self.note(f"train {step.model.trainer}", losses, end[0] - begin if end else 0.0)
            else:
                reason = failed.get(step.key)
                outcome_text = f"FAILED: {reason}" if reason else "not reached: the minutes were over"
                self.note(f"train {step.model.trainer}", outcome_text, end[0] - begin if end else 0.0)

    def resume(self) -> list[str]:
        """Kill a training after its first checkpoint, and continue it."""
        (step,) = plan_steps(str(DATASET), LONGER, [RESUMED], [0], device=self.device, evaluation=False)
        assert isinstance(step, Train)
        latest = step.output / "checkpoint_latest.pth"
        (self.folder / "logs").mkdir(exist_ok=True)
        with (self.folder / "logs" / "killed.log").open("w") as stream:
            process = subprocess.Popen(step.command(), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
            while not latest.is_file() and process.poll() is None and time.monotonic() < self.end:
                time.sleep(0.02)
            process.kill()
            process.wait()
        if not latest.is_file():
            raise CheckError(f"no checkpoint was written (log: {stream.name})")
        before = finished_epochs(step.output)
        if step.done() or before is None:
            raise CheckError("the training ended before it was killed")
        self.run("resume", *step.command())
        after = finished_epochs(step.output)
        if not step.done() or after is None or after[0] != after[1]:
            raise CheckError(f"the resumed training ended after epoch {after}")
        if not finite_losses(step):
            raise CheckError("a loss is not finite")
        return [f"killed after epoch {before[0]}, resumed to {after[0]} of {after[1]}"]

    def distributed(self) -> None:
        """nnU-Net's process of a group, in a group of one."""
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29512"}
        (*_, step) = plan_steps(str(DATASET), CONFIGURATION, [DISTRIBUTED], [0], device=self.device, evaluation=False)
        code = GROUP_OF_ONE.format(dataset=DATASET, configuration=CONFIGURATION, trainer=DISTRIBUTED)
        assert isinstance(step, Train)
        for file in step.output.glob("*"):  # of the training without a group
            if file.is_file():
                file.unlink()
        self.run("distributed", sys.executable, "-c", code)
        if not step.done():
            raise CheckError("the training has left no final checkpoint")

    def predict(self) -> list[str]:
        """Predict on both devices with a modality missing, and compare labels."""
        model = ["-d", DATASET, "-c", CONFIGURATION, "-f", 0, "-tr", RESUMED, "--drop", "T1ce", "--save_probabilities"]
        found = {}
        for device in dict.fromkeys((self.device, "cpu")):
            output = self.folder / "predictions" / device
            self.run(
                f"predict {device}", "mstkd", "predict", "-i", self.images, "-o", output, *model, "-device", device
            )
            found[device] = np.load(next(output.glob("*.npz")))["probabilities"].astype(np.float64)
        mine, reference = found[self.device], found["cpu"]
        differing = (mine >= 0.5) != (reference >= 0.5)
        clipped = np.clip(reference[differing], 1e-12, 1 - 1e-12)
        margin = float(np.abs(np.log(clipped / (1 - clipped))).max(initial=0.0))
        if margin > NEAR:
            raise CheckError(f"a voxel has another label, although the CPU's logit is {margin:.2f} from the decision")
        return [f"{differing.sum()} of {differing.size} decisions differ, at most {margin:.3f} logit from it"]

    def evaluate(self) -> list[str]:
        """Evaluate all subsets on both devices, and compare the Dice."""
        tables = []
        for device in dict.fromkeys((self.device, "cpu")):
            output = self.folder / "evaluations" / device
            model = f"-d {DATASET} -c {CONFIGURATION} -f 0 -tr {RESUMED} -device {device} --metrics dice".split()
            labels = self.images.with_name("labelsTs")
            self.run(f"evaluate {device}", "mstkd", "evaluate", *model, "-i", self.images, "-l", labels, "-o", output)
            tables.append(pd.read_csv(output / "results.csv"))
        difference = float((tables[0]["value"] - tables[-1]["value"]).abs().max())
        if difference > 0.05:
            raise CheckError(f"a Dice differs by {100 * difference:.1f} points between the devices")
        return [f"{tables[0]['subset'].nunique()} subsets; largest difference {100 * difference:.2f} points of Dice"]

    def step_cost(self, compiled: bool) -> list[str]:
        """Time the trainers' steps."""
        file = self.folder / f"step_cost{'_compiled' if compiled else ''}.json"
        words = [sys.executable, Path(__file__).with_name("step_cost.py"), "--plan", "small", "--repetitions", 3]
        words += ["--device", self.device, "--json", file, *(["--compile"] if compiled else [])]
        self.run(file.stem, *words)
        return [file.name]


def finite_losses(step: Step) -> bool:
    """Whether all training losses in a fold's log are numbers."""
    assert isinstance(step, Train)
    losses = [
        float(line.rsplit("train_loss", 1)[1])
        for log in step.output.glob("training_log_*.txt")
        for line in log.read_text(encoding="utf-8").splitlines()
        if "train_loss" in line
    ]
    return bool(losses) and bool(np.isfinite(losses).all())


def write_commands(folder: Path) -> None:
    """Scripts for the commands, which an installation would have made."""
    folder.mkdir()
    for name, target in COMMANDS.items():
        module, function = target.split(":")
        file = folder / name
        file.write_text(SCRIPT.format(python=sys.executable, module=module, function=function), encoding="utf-8")
        file.chmod(0o755)


def needs(trainer: str, names: Sequence[str]) -> str:
    """Why a part is left out whose trainer is not among those asked for."""
    return "" if trainer in names else f"{trainer} was not asked for"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts; 0 if all of them are fine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--trainers", metavar="NAME", nargs="+", help="default: all")
    parser.add_argument("--jobs", type=int, help="trainings at once (default: one for two cores, at most 6)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="parts after that are left out")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU")
    if args.out.exists():
        parser.error(f"{args.out} exists")
    names = list(trainers()) if args.trainers is None else args.trainers
    jobs = args.jobs or max(1, min(6, usable_cores() // 2))
    check, cuda = Check(args.out, args.device, names, jobs, args.minutes), args.device == "cuda"
    without = "" if cuda else "needs CUDA"
    parts: list[tuple[str, Callable[[], list[str] | None], str]] = [
        ("resume after a kill", check.resume, ""),
        ("a group of one process, nccl", check.distributed, without or needs(DISTRIBUTED, names)),
        ("mstkd predict, as on the CPU", check.predict, needs(RESUMED, names)),
        ("mstkd evaluate, as on the CPU", check.evaluate, needs(RESUMED, names)),
        ("step_cost, eager", lambda: check.step_cost(False), without),
        ("step_cost, compiled", lambda: check.step_cost(True), without),
    ]
    prepared = check.part("phantom, plans, configurations", check.prepare)
    if prepared:
        check.train()
    for name, run, reason in parts:
        if not prepared:
            check.note(name, "not reached: there are no plans", 0.0)
        elif reason:
            check.note(name, "left out", 0.0, reason)
        else:
            check.part(name, run)
    gpu = torch.cuda.get_device_name() if cuda else "no GPU"
    about = {"machine": f"{platform.machine()}, {usable_cores()} cores, {gpu}", "torch": torch.__version__}
    content = {**about, "date": str(date.today()), "rows": check.rows}
    (args.out / "gpu_check.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"\n{about['machine']}, torch {about['torch']}\n{frame_table(pd.DataFrame(check.rows), fmt=TEXT, digits=1)}")
    return int(any(str(row["outcome"]).startswith(("FAILED", "not")) for row in check.rows))


if __name__ == "__main__":
    raise SystemExit(main())
