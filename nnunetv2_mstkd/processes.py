"""Processes: the commands of this environment, and a clean end after SIGTERM."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path


def command_path(name: str) -> str:
    """Return the path of a command, preferring the one of this Python environment to others on the PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed; pip install nnunetv2 nnunetv2_mstkd")
    return found


CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Where a container finds its limit of processor time, as microseconds per period, or "max"."""


def usable_cores() -> int:
    """Return how many cores this process may use, which a scheduler or a container may have limited; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def default_workers() -> int:
    """Return how many processes to use where the user does not say: one per usable core, at most 8."""
    return min(8, usable_cores())


class Terminated(KeyboardInterrupt):
    """SIGTERM: a cluster scheduler, ``kill`` or a shutdown asks this process to end."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise :class:`Terminated`, so that open files are cleaned up; by default the process ends at once."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield  # signals reach the main thread only; a handler that somebody else installed stays
        return
    signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stop(*_: object) -> None:
    raise Terminated


class _Fork(threading.local):
    """Restore the default SIGTERM in forked children, such as those of nnU-Net's pools.

    A pool ends its processes with that signal. A child that starts to wait at that moment would never run our handler,
    and one that has not run yet would lose the signal, because Python clears pending signals in a new child; the pool
    would then wait indefinitely. So the signal is blocked until the child has the default handler again.
    """

    holds = False

    def before(self) -> None:
        if signal.getsignal(signal.SIGTERM) is _stop:
            self.holds = signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def in_parent(self) -> None:
        if self.holds:
            self.holds = False
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def in_child(self) -> None:
        if signal.getsignal(signal.SIGTERM) is _stop:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.in_parent()


if hasattr(os, "register_at_fork"):  # not on Windows
    _fork = _Fork()
    os.register_at_fork(before=_fork.before, after_in_parent=_fork.in_parent, after_in_child=_fork.in_child)
