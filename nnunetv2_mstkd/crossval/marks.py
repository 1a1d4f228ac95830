"""Marks of steps that run: a file per step that says who runs it, so that nobody starts it a second time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2_mstkd.crossval.steps import Step
from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.atomic import scratch_file

UNKNOWN_TO_SLURM = ("invalid job id",)


class RunningStepError(InputError):
    """Somebody else runs a step; the message says who, and which file to remove if that is not so."""


class Holder(NamedTuple):
    """Who has a step.

    Attributes
    ----------
    name:
        for people.
    waits:
        it has not begun yet: it waits for other steps, or in SLURM's queue.
    """

    name: str
    waits: bool = False


@dataclass(frozen=True)
class Mark:
    """The mark of a step, ``KEY.running`` beside its log."""

    file: Path

    @classmethod
    def of(cls, step: Step) -> Mark:
        return cls(step.log.with_suffix(".running"))

    def holder(self) -> Holder | None:
        """Who has the step; None: nobody. The mark of a process or job that is gone does not count."""
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:  # being written
            return Holder(f"a process that marked it in {self.file}")
        return _holder(content)

    def take(self) -> None:
        """Mark the step as one that this process will run.

        Raises
        ------
        RunningStepError
            if somebody else runs it.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        content = {"host": socket.gethostname(), **_process(os.getpid()), "since": _now(), "waits": True}
        for _ in range(2):
            try:
                with self.file.open("x", encoding="utf-8") as stream:
                    json.dump(content, stream)
                return
            except FileExistsError:
                holder = self.holder()
                if holder is not None:
                    raise RunningStepError(
                        f"{self.file.stem} is run by {holder.name}; wait for it or stop it. If it does not run any "
                        f"more, remove {self.file}"
                    ) from None
                self.file.unlink(missing_ok=True)
        raise RunningStepError(f"{self.file.stem} was taken by another process just now")

    def hand_to(self, *, pid: int | None = None, job: str | None = None) -> None:
        """Say that another process of this machine, or a job of SLURM, runs the step that this process has marked."""
        content = {"host": socket.gethostname(), "since": _now()}
        content |= {"job": job} if job is not None else _process(int(pid or os.getpid()))
        with scratch_file(self.file) as scratch:
            scratch.write_text(json.dumps(content), encoding="utf-8")

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _process(pid: int) -> dict[str, Any]:
    return {"pid": pid, "started": _start_of(pid)}


def _start_of(pid: int) -> str | None:
    """When a process was started, in the kernel's clock; numbers of processes are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return None


def _holder(content: dict[str, Any]) -> Holder | None:
    waits = bool(content.get("waits"))
    since = f"since {content.get('since')}"
    if "job" in content:
        state = job_state(str(content["job"]))
        return None if state is None else Holder(f"SLURM job {content['job']} ({state}), {since}", state == "PENDING")
    if content.get("host") != socket.gethostname():
        return Holder(f"process {content.get('pid')} on {content.get('host')}, {since}", waits)
    pid = int(content.get("pid", 0))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # another user's
    started = content.get("started")
    if started is not None and _start_of(pid) != started:
        return None
    return Holder(f"process {pid} on this machine, {since}", waits)


def job_state(job: str) -> str | None:
    """The state of a job that waits or runs, as ``squeue`` prints it; None: SLURM does not know it any more.

    A SLURM that does not answer counts as one that still has the job.
    """
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "state not known: squeue does not answer"
    if answer.returncode:
        gone = any(text in answer.stderr.lower() for text in UNKNOWN_TO_SLURM)
        return None if gone else "state not known: squeue does not answer"
    states = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    states = [state for state in states if state not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "COMPLETING")]
    return states[0] if states else None
