"""Report a dead data-loader worker in one line: nnU-Net's loaders show the tracebacks of three threads."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

from batchgenerators.dataloading import nondet_multi_threaded_augmenter
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunetv2_mstkd.errors import EXIT_USER_ERROR, WorkerError, wants_traceback

DEAD = "background workers are no longer alive"
"""What nnU-Net and batchgenerators say of dead processes, and of such that ended themselves after an error."""

PATIENCE = 120.0
"""Seconds without a training step after which a training whose worker was killed counts as stuck."""

CAUSES = {
    "SIGKILL": "the kernel does that when memory runs out",
    "SIGBUS": "shared memory is full (/dev/shm; a container is given more with --shm-size)",
}


def start_workers(make: Callable[[], Any]) -> tuple[Any, list[BaseProcess]]:
    """Return the result of a call, and the processes that it has started."""
    before = multiprocessing.active_children()
    result = make()
    return result, [process for process in multiprocessing.active_children() if process not in before]


def killed_by(processes: Iterable[BaseProcess]) -> str | None:
    """Name of the signal that killed one of these processes; None: none was. Those that are ended here get SIGTERM."""
    codes = [process.exitcode for process in processes]
    return next((signal.Signals(-code).name for code in codes if code and code < 0 and code != -signal.SIGTERM), None)


def cause_of_death(processes: Iterable[BaseProcess]) -> str:
    """Why a data loader gave up, as far as its processes' exit codes tell; one that fails by itself prints why."""
    name = killed_by(processes)
    if name is not None:
        return f"was killed by {name}" + (f": {CAUSES[name]}" if name in CAUSES else "")
    return "died; if it printed an error, see above; otherwise memory most likely ran out"


@contextmanager
def report_dead_workers(where: Callable[[], str], processes: Callable[[], Iterable[BaseProcess]]) -> Iterator[None]:
    """Raise WorkerError, one line, for what nnU-Net raises when one of the data loaders' processes has died.

    ``where`` says when that happened, for the message. A killed process may hold a lock that the main thread then waits
    for without end; so if it does not get on, this process ends with the same line and exit code 2.
    """
    with _without_their_threads(), _ended_if_stuck(where, processes):
        try:
            yield
        except RuntimeError as error:
            if DEAD not in str(error):
                raise
            raise WorkerError(_told(where, processes)) from error


def _told(where: Callable[[], str], processes: Callable[[], Iterable[BaseProcess]]) -> str:
    number = get_allowed_n_proc_DA()
    return (
        f"{where()} a data-loader worker {cause_of_death(processes())}. The last checkpoint is untouched: ask for more "
        f"memory or use fewer processes (nnUNet_n_proc_DA={number // 2}, here {number}), and continue with --c"
    )


@contextmanager
def _ended_if_stuck(where: Callable[[], str], processes: Callable[[], Iterable[BaseProcess]]) -> Iterator[None]:
    """End this process if one of those was killed and ``where`` has not changed for :data:`PATIENCE` seconds since."""
    finished = threading.Event()

    def watch() -> None:
        moment, since = "", time.monotonic()
        while not finished.wait(1):
            if killed_by(processes()) is None or where() != moment:
                moment, since = where(), time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                print(f"nnunetv2_mstkd: {_told(where, processes)}", file=sys.stderr, flush=True)
                for process in processes():
                    process.kill()
                os._exit(EXIT_USER_ERROR)  # nothing else ends a thread that waits for a lock

    if not hasattr(sys, "ps1"):  # an interactive interpreter is not ended
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        finished.set()


@contextmanager
def _without_their_threads() -> Iterator[None]:
    """Keep the threads that collect batches from printing what the main thread is told anyway: of a dead process."""
    previous = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        error = arguments.exc_value
        # a handle whose process is gone cannot be opened
        dead = isinstance(error, (OSError, EOFError)) or DEAD in str(error)
        if not (dead and _is_collecting(arguments.exc_traceback)) or wants_traceback():
            previous(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = previous


def _is_collecting(trace: TracebackType | None) -> bool:
    code = nondet_multi_threaded_augmenter.results_loop.__code__
    return any(frame.f_code is code for frame, _ in traceback.walk_tb(trace))
