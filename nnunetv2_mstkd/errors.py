"""Errors that a user can fix, and the one place that prints them.

Everything this package raises for a user's mistake is a :class:`UserError`. It also derives from the built-in exception
that Python code would expect, so ``except ValueError`` works too.
"""

from __future__ import annotations

import difflib
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from nnunetv2_mstkd.processes import Terminated, terminable

EXIT_USER_ERROR = 2
EXIT_INTERNAL_ERROR = 3
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141
EXIT_TERMINATED = 143


class UserError(Exception):
    """A mistake that the user can fix. The message says what was found, what was expected and what to do next."""


class InputError(UserError, ValueError):
    """A value, option or file content that cannot be used."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that does not exist."""


class ExistingFileError(UserError, FileExistsError):
    """A file or folder that would be overwritten."""


class UnsupportedError(UserError, NotImplementedError):
    """Something that nnU-Net can do and this package cannot."""


class DependencyError(UserError, ImportError):
    """An optional package that is not installed."""


class WriteError(UserError, OSError):
    """A file that could not be written: no space, no permission."""


class WorkerError(UserError, ChildProcessError):
    """A background process that died."""


class DivergenceError(UserError, FloatingPointError):
    """A training whose loss is not finite."""


def run_and_report(name: str, run: Callable[[Any], int | None], args: Any) -> int:
    """Call ``run(args)``, print its errors on stderr after ``name`` (``mstkd convert``), and return an exit code.

    With ``args.debug``, or ``MSTKD_DEBUG=1`` in the environment, the traceback is printed too.

    Returns
    -------
    The command's own exit code (None counts as 0; 1: some cases were left out, the rest is done); 2 for a
    :class:`UserError`, an error of the file system or a lack of memory; 3 for an internal error; 130 after an
    interrupt; 141 if standard output was closed, as by ``| head``; 143 after SIGTERM.
    """
    try:
        with terminable():
            return run(args) or 0
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return EXIT_PIPE
        if getattr(args, "debug", False) or wants_traceback():
            traceback.print_exc()
        print(f"{name}: {str(error) or type(error).__name__}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        print(f"{name}: {'terminated' if terminated else 'interrupted'}", file=sys.stderr)
        return EXIT_TERMINATED if terminated else EXIT_INTERRUPTED
    except Exception as error:
        if lacks_memory(error):
            first, gpu = str(error).partition("\n")[0], type(error).__name__ == "OutOfMemoryError"
            text = (
                f"{first} Stop other programs on that GPU, or use -device cpu"
                if gpu
                else f"not enough memory ({first})"
            )
            print(f"{name}: {text}", file=sys.stderr)
            return EXIT_USER_ERROR
        traceback.print_exc()
        print(f"{name}: internal error; please report it together with the traceback above", file=sys.stderr)
        return EXIT_INTERNAL_ERROR


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that was closed, as by ``| head``; then nothing more is written to it."""
    try:
        poll, output = select.poll(), sys.stdout.fileno()  # not on Windows
    except (AttributeError, OSError, ValueError):
        return False
    poll.register(output, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU or the machine has not enough memory; this module does not import torch."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``" (did you mean 'epochs'?)"`` for the closest of the `known` words, or "" if none is close.

    ``cutoff`` is the lowest similarity, from 0 to 1 (:func:`difflib.get_close_matches`).
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {close[0]!r}?)" if close else ""


def install_excepthook() -> None:
    """Print a :class:`UserError` that ends one of nnU-Net's own commands as one line, and exit with code 2. Idempotent.

    ``nnUNetv2_train`` and ``nnUNetv2_predict`` let an exception end the process, so this replaces ``sys.excepthook``.
    All other exceptions go to the hook that was installed before. ``MSTKD_DEBUG=1`` keeps every traceback, and so does
    an interactive interpreter, which must not exit. Processes of a multi-GPU training report to their parent and never
    get here.
    """
    previous = sys.excepthook
    if getattr(previous, "_of_mstkd", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        message = " ".join(str(error).split())
        if not message or not isinstance(error, UserError) or wants_traceback():
            previous(kind, error, trace)
            return
        sys.stdout.flush()
        print(f"nnunetv2_mstkd: {message}", file=sys.stderr, flush=True)
        # the interpreter takes its exit code from a SystemExit that leaves the hook
        raise SystemExit(EXIT_USER_ERROR)

    hook._of_mstkd = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def wants_traceback() -> bool:
    """Whether tracebacks are kept: ``MSTKD_DEBUG=1``, or an interactive interpreter."""
    interactive = hasattr(sys, "ps1") or bool(sys.flags.interactive)
    return interactive or os.environ.get("MSTKD_DEBUG", "0") not in ("", "0")
