"""Run the steps of a plan on this machine, several at once."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from nnunetv2_mstkd.crossval.steps import Step
from nnunetv2_mstkd.processes import command_path

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 20.0
"""Time that a step may take to end after SIGTERM before it is killed."""


@dataclass
class Outcome:
    """Keys of the steps that ran to their end, failed (with the reason and the log) and were not started (reason)."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


@dataclass
class _Running:
    step: Step
    process: subprocess.Popen
    gpus: tuple[str, ...]


def run_steps(
    steps: Sequence[Step],
    *,
    jobs: int = 1,
    gpus: Sequence[str] = (),
    report: Callable[[str], None] = print,
    watch: Callable[[Step], None] = lambda step: None,
) -> Outcome:
    """Run the steps that are not done; an interrupt stops the running ones and leaves the rest for the next call.

    Parameters
    ----------
    steps
        Each after those that it needs.
    jobs
        Maximum number of steps at once.
    gpus
        Identifiers for CUDA_VISIBLE_DEVICES, shared among the running steps; empty: all steps see all GPUs.
    report
        Called with a line for each step that begins or ends.
    watch
        Called with each running step several times a second.

    Raises
    ------
    RunningStepError
        Before anything is started, if another call runs one of the steps.
    """
    waiting = [step for step in steps if not step.done()]
    keys = {step.key for step in waiting}
    locked: dict[str, Step] = {}
    outcome = Outcome()
    running: list[_Running] = []
    free = list(gpus)
    try:
        for step in waiting:
            step.lock.acquire()
            locked[step.key] = step
        while waiting or running:
            for entry in [entry for entry in running if entry.process.poll() is not None]:
                running.remove(entry)
                free += entry.gpus
                _note_end(entry, outcome, report)
                locked.pop(entry.step.key).lock.release()
            for step in list(waiting):
                missing = [need for need in step.needs if need in keys and need not in outcome.finished]
                lost = [need for need in missing if need in outcome.failed or need in outcome.left]
                wanted = step.gpus if gpus else 0
                if lost:
                    waiting.remove(step)
                    outcome.left[step.key] = f"it needs {lost[0]}"
                    locked.pop(step.key).lock.release()
                elif not missing and len(running) < jobs and wanted <= len(free):
                    waiting.remove(step)
                    given, free = tuple(free[:wanted]), free[wanted:]
                    running.append(_start(step, given, bool(gpus)))
                    step.lock.pass_to(pid=running[-1].process.pid)
                    report(f"begin   {step.title}")
            for entry in running:
                watch(entry.step)
            time.sleep(POLL_SECONDS)
    finally:
        _stop([entry.process for entry in running])
        for step in locked.values():
            step.lock.release()
    return outcome


def open_log(step: Step) -> tuple[list[str], Path]:
    """The command of a step with its program's path, and its log with the command appended."""
    command = step.command()
    step.log.parent.mkdir(parents=True, exist_ok=True)
    with step.log.open("a", encoding="utf-8") as stream:
        stream.write(f"$ {' '.join(command)}\n")
    return [command_path(command[0]), *command[1:]], step.log


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    with suppress(OSError):
        for line in reversed(log.read_text(encoding="utf-8", errors="replace").splitlines()):
            if line.strip():
                return line.strip()
    return ""


def _start(step: Step, gpus: tuple[str, ...], share: bool) -> _Running:
    command, log = open_log(step)
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1", **step.variables()}
    if share:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    with log.open("a", encoding="utf-8") as stream:
        # in a separate session, so that Ctrl-C reaches only this process, which then stops the step and its children
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=variables,
            start_new_session=True,
        )  # fmt: skip
    return _Running(step, process, gpus)


def _note_end(entry: _Running, outcome: Outcome, report: Callable[[str], None]) -> None:
    step, code = entry.step, entry.process.returncode
    if code == 0 and step.done():
        outcome.finished.append(step.key)
        report(f"done    {step.title}")
        return
    if code == 0:
        reason = f"it ended without its output (log: {step.log})"
    elif code < 0:
        reason = f"it was stopped by signal {signal.Signals(-code).name} (log: {step.log})"
    else:
        reason = f"exit code {code}: {last_line(step.log)} (log: {step.log})"
    _signal(entry.process, signal.SIGKILL)  # its children may hold the memory of a GPU
    outcome.failed[step.key] = reason
    report(f"FAILED  {step.title}: {reason}")


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """End processes and all their children, with SIGTERM first."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    end = time.monotonic() + PATIENCE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
