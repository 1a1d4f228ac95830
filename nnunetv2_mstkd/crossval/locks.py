"""Locks of steps: a file beside the log of a running step names its owner, so that no other call starts it again."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.atomic import write_json

NO_ANSWER = "state not known: squeue does not answer"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "COMPLETING")


class RunningStepError(InputError):
    """A step that something else runs; the message names it, and the file to remove if that is not true."""


class Owner(NamedTuple):
    """The owner of a lock: its name for people, and whether it still waits for other steps or in SLURM's queue."""

    name: str
    waits: bool = False


@dataclass(frozen=True)
class Lock:
    """The lock of a step, ``KEY.running``."""

    file: Path

    def owner(self) -> Owner | None:
        """The process or job that holds the lock; None if it is free, or its owner no longer exists."""
        return self._owner_in(self._text())

    def acquire(self) -> None:
        """Lock the step for this process; RunningStepError if it is locked."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        content = {"host": socket.gethostname(), **_process(os.getpid()), "since": _now(), "waits": True}
        for _ in range(2):
            try:
                stream = self.file.open("x", encoding="utf-8")
            except FileExistsError:
                text = self._text()
                owner = self._owner_in(text)
                if owner is not None:
                    raise RunningStepError(
                        f"{self.file.stem} is run by {owner.name}; wait for it or stop it. If it no longer runs, "
                        f"remove {self.file}"
                    ) from None
                self._discard(text)
                continue
            try:
                with stream:
                    json.dump(content, stream)
            except BaseException:  # a full disk, or an interrupt: an empty lock would never be free
                self.release()
                raise
            return
        raise RunningStepError(f"{self.file.stem} was locked by another process just now")

    def pass_to(self, *, pid: int | None = None, job: str | None = None) -> None:
        """Make another process of this machine, or a SLURM job, the owner of the lock that this process holds."""
        owner = _process(pid or os.getpid()) if job is None else {"job": job}
        write_json(self.file, {"host": socket.gethostname(), "since": _now(), **owner})

    def take(self, job: str) -> None:
        """Make this process's SLURM job the owner; RunningStepError if another job is."""
        text = self._text()
        try:
            named = None if text is None else json.loads(text).get("job")
        except ValueError:  # being written, by the process that submitted this job
            named = None
        if named not in (None, job) and (owner := self._owner_in(text)) is not None:
            raise RunningStepError(f"{self.file.stem} is run by {owner.name}, not by job {job}")
        self.pass_to(job=job)

    def release(self) -> None:
        """Unlock the step."""
        self.file.unlink(missing_ok=True)

    def _text(self) -> str | None:
        try:
            return self.file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def _owner_in(self, text: str | None) -> Owner | None:
        try:
            return None if text is None else _owner(json.loads(text))
        except ValueError:  # being written
            return Owner(f"a process that locked it with {self.file}")

    def _discard(self, text: str | None) -> None:
        """Remove a lock without owner, unless another process has locked the step while SLURM was asked about it."""
        aside = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        with suppress(FileNotFoundError):
            self.file.rename(aside)
            if aside.read_text(encoding="utf-8") == text:
                aside.unlink()
            else:
                aside.rename(self.file)


def job_state(job: str) -> str | None:
    """The state of a job that waits or runs, as ``squeue`` prints it; None if SLURM no longer knows it.

    If SLURM does not answer, the job counts as one that still exists.
    """
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return NO_ANSWER
    if answer.returncode:
        return None if "invalid job id" in answer.stderr.lower() else NO_ANSWER
    return next((state for state in answer.stdout.split() if state not in ENDED), None)


def _owner(content: dict[str, Any]) -> Owner | None:
    waits = bool(content.get("waits"))
    since = f"since {content.get('since')}"
    if "job" in content:
        state = job_state(str(content["job"]))
        return None if state is None else Owner(f"SLURM job {content['job']} ({state}), {since}", state == "PENDING")
    if content.get("host") != socket.gethostname():
        return Owner(f"process {content.get('pid')} on {content.get('host')}, {since}", waits)
    pid = int(content.get("pid", 0))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it belongs to another user
    started = content.get("started")
    if started is not None and _start_of(pid) != started:
        return None
    return Owner(f"process {pid} on this machine, {since}", waits)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _process(pid: int) -> dict[str, Any]:
    return {"pid": pid, "started": _start_of(pid)}


def _start_of(pid: int) -> str | None:
    """When a process was started, in the kernel's clock; numbers of processes are reused."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return None
