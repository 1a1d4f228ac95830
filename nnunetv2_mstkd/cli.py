"""The command ``mstkd``: a table of sub-commands, of which only the one asked for is imported.

A sub-command lives in ``nnunetv2_mstkd/commands/NAME.py`` (dashes become underscores) and has two functions,
``add_arguments(parser)`` and ``run(args) -> int | None``.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import nnunetv2_mstkd
from nnunetv2_mstkd.errors import EXIT_USER_ERROR, did_you_mean, run_and_report

COMMANDS = {
    "demo": "train, evaluate and compare two models on a small synthetic data set",
    "phantom": "make a synthetic data set with four modalities",
    "predict": "segment cases with any subset of the modalities",
    "app": "segment a patient's sequences in the browser",
    "evaluate": "evaluate a model on all subsets of its modalities",
    "compare": "compare evaluated models case by case",
    "crossval": "train, evaluate and compare over the folds, here or on a cluster",
    "status": "show the progress of a cross-validation",
    "prior": "make SMML's semantic prior with a Segment Anything model",
    "adapters": "draw the similarity of an AdaMM model's adapters between subsets",
    "fill-missing": "write zero images for absent modalities, for nnUNetv2_predict",
    "configure": "write training settings into a new configuration of the plans",
    "convert": "convert a data set into nnU-Net's raw format",
    "restore-labels": "convert predictions back to a release's label values and file names",
    "path": "print the folder in which nnU-Net finds the trainers",
}


GC_THRESHOLD = 10_000
"""New objects before the garbage collector runs; Python's default is 700 to 2000."""


class Parser(argparse.ArgumentParser):
    """Parser of a command and of its sub-commands: errors are one line, and abbreviated options are errors.

    Options are spelled as in nnU-Net where it has them (``-device``, ``--disable_tta``) and in the usual way elsewhere
    (``--dry-run``). Both styles work for every option: ``--device`` and ``--disable-tta`` too. Help shows one spelling.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse `args`. Unknown arguments are errors of the sub-command, where argparse names the outer parser."""
        spelled = self._spelled_as_declared(sys.argv[1:] if args is None else args)
        known, rest = super().parse_known_args(spelled, namespace)
        if rest:
            self.error(f"unexpected argument {rest[0]!r}{self._usage_hint()}")
        return known, rest

    def error(self, message: str) -> NoReturn:
        """Print one line instead of argparse's usage, and exit with code 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def _spelled_as_declared(self, args: Sequence[str]) -> list[str]:
        """Replace other spellings of options by the declared ones; an unknown option is an error.

        argparse would report a missing argument first, and accepts ``-dev`` for ``-device`` without ``allow_abbrev``.
        """
        args = list(args)
        known = self._option_string_actions
        for place, arg in enumerate(args):
            if arg == "--" or (self._subparsers is not None and not arg.startswith("-")):
                break  # what follows a command's name belongs to that command
            name, equals, value = arg.partition("=")
            if name in known or not _is_option(name):
                continue
            same = next((option for option in known if _spelling(option) == _spelling(name)), None)
            if same is not None:
                args[place] = same + equals + value
                continue
            hint = did_you_mean(name, (option for option in known if len(option) > 2))
            if not hint and name[:2] in known:
                continue  # -d901
            letter = f"-{name.lstrip('-')[:1]}"  # --input
            if not hint and letter in known:
                hint = f" (did you mean {letter!r}?)"
            self.error(f"unknown option {name}{hint}{self._usage_hint()}")
        return args

    def _usage_hint(self) -> str:
        """Return the usage of a command with positional arguments, which are easily mistaken for options."""
        names = [str(action.metavar or action.dest) for action in self._get_positional_actions()]
        return f"; usage: {self.prog} {' '.join(names)} [options]" if names and self._subparsers is None else ""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        if not isinstance(action, argparse._SubParsersAction):
            raise argparse.ArgumentError(action, f"unknown value {value!r}; known are {', '.join(known)}")
        kind = str(action.metavar).lower()
        hint = did_you_mean(str(value), known)
        raise argparse.ArgumentError(None, f"unknown {kind} {value!r}{hint}; known are {', '.join(known)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``mstkd`` with the arguments `argv` (default: those of the process) and return its exit code."""
    # OpenMP reads this when torch is imported: idle threads sleep instead of spinning, which slows a busy machine down
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    collect_rarely()
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser(argv)
    if not argv:
        parser.print_help(sys.stderr)
        return EXIT_USER_ERROR
    args = parser.parse_args(argv)
    # From timm, which nnU-Net's trainer look-up imports; users can do nothing about it.
    warnings.filterwarnings("ignore", r"`torch\.jit\.interface` is deprecated", FutureWarning)
    return run_and_report(f"mstkd {args.command}", args.run, args)


def collect_rarely() -> None:
    """Run the garbage collector less often than Python does, and not at exit.

    PyTorch and nnU-Net create half a million objects that stay alive. Going through them again and again takes a
    quarter of the time of their import, and another second at exit.
    """
    gc.set_threshold(GC_THRESHOLD)
    atexit.register(gc.freeze)


def _parser(argv: Sequence[str]) -> Parser:
    """Return the parser for `argv`; of the sub-commands only the one asked for is imported."""
    parser = Parser(prog="mstkd", description="Missing-modality segmentation for nnU-Net v2.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {nnunetv2_mstkd.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    asked = next((argument for argument in argv if not argument.startswith("-")), None)
    for name, line in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=line, description=f"{line[0].upper()}{line[1:]}.")
        if name == asked:
            subparser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
            module = importlib.import_module(f"nnunetv2_mstkd.commands.{name.replace('-', '_')}")
            subparser.set_defaults(run=module.run)
            module.add_arguments(subparser)
    return parser


def _is_option(name: str) -> bool:
    """Whether argparse would take `name` for an option: no value such as -1, and no text with spaces."""
    with contextlib.suppress(ValueError):
        float(name)
        return False
    return len(name) > 1 and name.startswith("-") and " " not in name


def _spelling(option: str) -> str:
    """Return the part that all spellings of an option share; one-letter options keep their dash."""
    return option.lstrip("-").replace("_", "-") if len(option) > 2 else option


if __name__ == "__main__":
    sys.exit(main())
