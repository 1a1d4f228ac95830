"""The command line of the converters: ``mstkd convert`` and one script per family of releases."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence

from nnunetv2_mstkd.errors import run_and_report

from .conversion import convert, dataset_name
from .description import Description
from .job import Report, count, problem_lines
from .options import GENERIC, GENERIC_TITLE, add_arguments, description_of, options_of
from .releases import RELEASES

EXIT_SKIPPED = 1
"""The data set was written without some cases."""


def add_converters(parser: argparse.ArgumentParser, converters: Iterable[str] = (*RELEASES, GENERIC)) -> None:
    """Add a sub-command for each converter."""
    subparsers = parser.add_subparsers(dest="converter", metavar="RELEASE", required=True)
    for name in converters:
        title = GENERIC_TITLE if name == GENERIC else RELEASES[name].title
        subparser = subparsers.add_parser(name, help=title, description=_purpose(title))
        add_arguments(subparser, name)


def run(args: argparse.Namespace) -> int:
    """Convert as the options say, and print what was written and what comes next; return 0 or EXIT_SKIPPED."""
    description, renamed = description_of(args)
    for own, name in renamed.items():
        print(f"note: {own} is called {name} in the data set, as in all releases")
    report = convert(args.source, description, dataset_name(args.dataset_id, args.name), options_of(args))
    for line in summary(report, description):
        print(line)
    print(f"next: nnUNetv2_plan_and_preprocess -d {args.dataset_id} --verify_dataset_integrity")
    if not report.skipped:
        return 0
    lines = "\n  ".join(problem_lines(report.skipped))
    print(f"{count(report.skipped, 'case')} left out:\n  {lines}", file=sys.stderr)
    return EXIT_SKIPPED


def summary(report: Report, description: Description) -> list[str]:
    """What to tell the user of a conversion."""
    training = report.training
    patients = {case.patient for case in training}
    of = f" of {count(patients, 'patient')}" if len(patients) < len(training) else ""
    special = {"unlabelled": len(report.unlabelled), "incomplete": sum(bool(case.missing) for case in training)}
    listed = ", ".join(f"{number} {word}" for word, number in special.items() if number)
    of += f" ({listed})" if listed else ""
    was = ", already complete" if report.was_finished else ""
    was = f", {count(report.resumed, 'case')} from an interrupted run" if report.resumed else was
    lines = [
        f"{report.folder}: {count(training, 'training case')}{of}, "
        f"{count(len(report.cases) - len(training), 'test case')}, channels {', '.join(description.modalities)}{was}"
    ]
    if report.splits_file is not None:
        lines.append(f"{report.splits_file}: the folds")
    for note, cases in sorted(report.notes.items()):
        some = ", ".join(cases[:3]) + (", ..." if len(cases) > 3 else "")
        lines.append(f"note: {note}" + (f" ({count(cases, 'case')}: {some})" if cases else ""))
    return lines


def main(family: str, argv: Sequence[str] | None = None) -> int:
    """Run the script of a family, which is that of its releases or :data:`GENERIC`, and return its exit code."""
    prog = f"{family}.py"
    if family == GENERIC:
        parser = argparse.ArgumentParser(prog=prog, description=_purpose(GENERIC_TITLE), allow_abbrev=False)
        add_arguments(parser, GENERIC)
    else:
        parser = argparse.ArgumentParser(prog=prog, description=_purpose("a release"), allow_abbrev=False)
        add_converters(parser, [name for name, release in RELEASES.items() if release.family == family])
    return run_and_report(prog, run, parser.parse_args(argv))


def _purpose(title: str) -> str:
    return f"Convert {title} into nnU-Net's raw format."
