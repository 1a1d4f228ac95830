"""Report a dead data-loader worker in one line: nnU-Net's loaders show the tracebacks of three threads."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

from batchgenerators.dataloading import nondet_multi_threaded_augmenter
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunetv2_mstkd.errors import WorkerError, wants_traceback

DEAD = "background workers are no longer alive"
"""What nnU-Net and batchgenerators say of dead processes, and of such that ended themselves after an error."""

CAUSES = {
    "SIGKILL": "the kernel does that when memory runs out",
    "SIGBUS": "shared memory is full (/dev/shm; a container is given more with --shm-size)",
}


def start_workers(make: Callable[[], Any]) -> tuple[Any, list[BaseProcess]]:
    """Return the result of a call, and the processes that it has started."""
    before = multiprocessing.active_children()
    result = make()
    return result, [process for process in multiprocessing.active_children() if process not in before]


def cause_of_death(processes: Iterable[BaseProcess]) -> str:
    """Why a data loader gave up, as far as its processes' exit codes tell.

    Those that are ended from here get SIGTERM, and one that fails by itself prints why.
    """
    for process in processes:
        code = process.exitcode
        if code is not None and code < 0 and code != -signal.SIGTERM:
            name = signal.Signals(-code).name
            return f"was killed by {name}" + (f": {CAUSES[name]}" if name in CAUSES else "")
    return "died; if it printed an error, see above; otherwise memory most likely ran out"


@contextmanager
def report_dead_workers(where: Callable[[], str], processes: Callable[[], Iterable[BaseProcess]]) -> Iterator[None]:
    """Raise WorkerError, one line, for what nnU-Net raises when one of the data loaders' processes has died.

    ``where`` says when that happened, for the message.
    """
    with _without_their_threads():
        try:
            yield
        except RuntimeError as error:
            if DEAD not in str(error):
                raise
            number = get_allowed_n_proc_DA()
            raise WorkerError(
                f"{where()} a data-loader worker {cause_of_death(processes())}. The last checkpoint is "
                f"untouched: ask for more memory or use fewer processes (nnUNet_n_proc_DA={number // 2}, here "
                f"{number}), and continue with --c"
            ) from error


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
