"""Background processes for preprocessing and export, or the same calls in this process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from nnunetv2_mstkd.errors import InputError, WorkerError

PRELOADED = "nnunetv2_mstkd.nnunet.preprocessing"
"""Imports torch and nnU-Net, which takes seconds."""


class _InThisProcess(Executor):
    def submit(self, function: Callable, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*args, **kwargs))
        return future


def start_server(*modules: str) -> None:
    """Start to import what background processes need, also these modules, while this process does something else.

    On Linux they are then copies of a process that has imported everything. It is a fresh one, because copies of this
    process could not use CUDA. Elsewhere each process imports for itself, and this does nothing.
    """
    if sys.platform == "linux":
        from multiprocessing import forkserver  # not on Windows

        multiprocessing.set_forkserver_preload([PRELOADED, *modules])
        # the server inherits this: only this process gets a Ctrl-C
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        forkserver.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def in_threads(function: Callable, items: Sequence, threads: int, *, progress: bool) -> list:
    """Check items in several threads, which suffice for reading files: it releases the interpreter's lock."""
    pool = ThreadPoolExecutor(max(1, threads))
    try:
        results = pool.map(function, items)
        return list(tqdm(results, "checking", len(items), unit="case", disable=not progress, leave=False))
    finally:
        pool.shutdown(cancel_futures=True)


def refuse_imported_script(processes: int) -> None:
    """Refuse to start background processes in one of them, which runs the whole script again to import it."""
    if processes and getattr(multiprocessing.current_process(), "_inheriting", False):
        raise InputError(
            "a background process has begun to run this script from the start, as Python does to import it: put the "
            "code below  if __name__ == '__main__':  or use no background processes"
        )


@contextmanager
def workers(processes: int, tasks: int) -> Iterator[Executor]:
    """Yield an executor of so many processes, at most one per task; with 0 calls run at once in this process.

    After an error or interrupt in the block, running calls are finished and waiting ones are dropped. A process that
    dies is a WorkerError.
    """
    if processes == 0:
        yield _InThisProcess()
        return
    refuse_imported_script(processes)
    start_server()
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(max(1, min(processes, tasks)), mp_context=context, initializer=_start_worker)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise WorkerError(
            "a background process died; its own message, if it had one, is above. Without one, the likely cause is a "
            "lack of memory; use fewer (-npp 1 -nps 1), or 0 for none"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def ahead(pool: Executor, function: Callable, arguments: Iterable[tuple], limit: int) -> Iterator[Any]:
    """Yield the results of ``function(*arguments)`` in order, while at most ``limit`` others are running or waiting."""
    pending: deque[Future] = deque()
    for each in arguments:
        pending.append(pool.submit(function, *each))
        if len(pending) > limit:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class Backlog:
    """Tasks under way in an executor; ``on_done(label, result)`` is called in the order of submission."""

    def __init__(self, pool: Executor, on_done: Callable[[Any, Any], None]) -> None:
        self._pool, self._on_done = pool, on_done
        self._pending: deque[tuple[Any, Future]] = deque()

    def submit(self, label: Any, function: Callable, *arguments: Any) -> None:
        """Start ``function(*arguments)``."""
        self._pending.append((label, self._pool.submit(function, *arguments)))

    def collect(self, limit: int = 0) -> None:
        """Hand over what is done, and wait until at most ``limit`` tasks are under way: their arguments fill memory."""
        while self._pending and (len(self._pending) > limit or self._pending[0][1].done()):
            label, future = self._pending.popleft()
            self._on_done(label, future.result())


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it: an idle process of a pool waits indefinitely."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: Any) -> None:
    parent.join()
    os._exit(1)
