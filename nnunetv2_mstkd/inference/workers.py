"""Background processes for preprocessing and export, or none: the same calls in this very process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any


class _InThisProcess(Executor):
    def submit(self, function: Callable, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*args, **kwargs))
        return future


@contextmanager
def workers(processes: int, tasks: int) -> Iterator[Executor]:
    """An executor of so many processes, at most one per task; 0: everything runs in this process, at once.

    An error or interrupt in the block waits for the calls that are running and drops those that are not.

    Raises
    ------
    ChildProcessError
        if a process died.
    """
    if processes == 0:
        yield _InThisProcess()
        return
    context = multiprocessing.get_context("spawn")  # as nnU-Net: a forked CUDA process cannot work
    pool = ProcessPoolExecutor(max(1, min(processes, tasks)), mp_context=context, initializer=_start_worker)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a background process died, most likely for lack of memory; use fewer: -npp 1 -nps 1, or 0 for none"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def ahead(pool: Executor, function: Callable, arguments: Iterable[tuple], limit: int) -> Iterator[Any]:
    """The results of ``function(*arguments)`` in order, with at most ``limit`` more of them under way or waiting."""
    pending: deque[Future] = deque()
    for each in arguments:
        pending.append(pool.submit(function, *each))
        if len(pending) > limit:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it: a pool's idle process waits for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: Any) -> None:
    parent.join()
    os._exit(1)
