"""The command ``mstkd``: a table of sub-commands, of which only the one asked for is imported.

A sub-command lives in ``nnunetv2_mstkd/commands/NAME.py`` (dashes become underscores) and has two functions,
``add_arguments(parser)`` and ``run(args) -> int | None``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence

import nnunetv2_mstkd

COMMANDS = {
    "demo": "run the whole method on a small synthetic data set",
    "phantom": "make a synthetic data set with four modalities",
    "predict": "segment cases whose modalities are partly absent",
    "evaluate": "measure a model on all subsets of its modalities",
    "compare": "compare evaluated models case by case",
    "crossval": "train, evaluate and compare over the folds, here or on a cluster",
    "status": "show how far a cross-validation is",
    "fill-missing": "write zero images for absent modalities, for nnUNetv2_predict",
    "configure": "write the settings of a training into a new configuration of the plans",
    "convert": "turn a data set into nnU-Net's raw format",
    "restore-labels": "turn predictions back into a release's label values and file names",
    "path": "print the folder in which nnU-Net finds the trainers",
}

USER_ERRORS = (ValueError, OSError, NotImplementedError, ImportError)
"""Raised for what the user can mend: printed as one line. Anything else is a defect and keeps its traceback."""

EXIT_USER_ERROR = 2
EXIT_DEFECT = 3
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class Terminated(KeyboardInterrupt):
    """SIGTERM: a cluster's scheduler, ``kill`` or a shutdown asks this process to end."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``mstkd`` with the arguments `argv` (default: those of the process) and return its exit code."""
    args = _parser(sys.argv[1:] if argv is None else argv).parse_args(argv)
    return run_and_report(f"mstkd {args.command}", args.run, args)


def run_and_report(name: str, run: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """Call ``run(args)`` and turn its errors into a line on stderr and an exit code.

    Parameters
    ----------
    name
        What stands before the message, for example ``mstkd convert``.
    run
        A sub-command's function; None counts as exit code 0.
    args
        Its arguments; with ``args.debug``, or ``MSTKD_DEBUG=1`` in the environment, the traceback is printed too.

    Returns
    -------
    The sub-command's own exit code (1: something was left out, the rest is done), 2 for an error that the user can
    mend, 3 for any other, 130 after an interrupt, or 143 after SIGTERM, which ends a command as Ctrl-C does: what is
    finished stays, what is begun is cleared away.
    """
    try:
        with _terminable():
            return run(args) or 0
    except USER_ERRORS as error:
        if getattr(args, "debug", False) or os.environ.get("MSTKD_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        print(f"{name}: {str(error) or type(error).__name__}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Terminated:
        print(f"{name}: terminated", file=sys.stderr)
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; this module does not import it
            first = str(error).partition("\n")[0]
            print(f"{name}: {first} End what else runs on that GPU, or use -device cpu", file=sys.stderr)
            return EXIT_USER_ERROR
        traceback.print_exc()
        print(f"{name}: an error that it should have foreseen; please report it with the lines above", file=sys.stderr)
        return EXIT_DEFECT


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM raise :class:`Terminated`; without it the process would end on the spot."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield  # signals are for the main thread only, and somebody else's handler stays
        return
    signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stop(*_: object) -> None:
    raise Terminated


class _Fork(threading.local):
    """A forked child, such as those of nnU-Net's pools, ends on the spot at SIGTERM.

    A pool ends its processes by that signal. One that begins to wait at that moment would never get to a handler of
    ours, and one that has not yet run would lose the signal, because Python clears in a new child what the handler has
    noted; the pool would wait for either for ever. So the signal is held back until the child has the default again.
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


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser for `argv`; of the sub-commands only the one asked for is imported."""
    parser = argparse.ArgumentParser(
        prog="mstkd", description="Missing-modality segmentation for nnU-Net v2.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {nnunetv2_mstkd.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="NAME", required=True)
    asked = next((argument for argument in argv if not argument.startswith("-")), None)
    for name, line in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=line, description=f"{line[0].upper()}{line[1:]}.")
        if name == asked:
            subparser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
            module = importlib.import_module(f"nnunetv2_mstkd.commands.{name.replace('-', '_')}")
            subparser.set_defaults(run=module.run)
            module.add_arguments(subparser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
