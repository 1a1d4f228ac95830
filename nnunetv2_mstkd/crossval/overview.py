"""The states of the steps, and what commands print about them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from nnunetv2_mstkd.crossval.local import Outcome, last_line
from nnunetv2_mstkd.crossval.steps import Step, Train

DONE, RUNNING, QUEUED, STOPPED, WAITING = "done", "running", "queued", "stopped", "waiting"


def state_of(step: Step) -> tuple[str, str]:
    """The state of a step, and details for people."""
    if step.done():
        return DONE, ""
    progress = step.progress()
    details = [] if progress is None else [str(progress)]
    owner = step.lock.owner()
    if owner is not None:
        return QUEUED if owner.waits else RUNNING, ", ".join([*details, owner.name])
    if step.log.is_file():
        return STOPPED, "; ".join([*details, f"last line of {step.log}: {last_line(step.log)}"])
    begun = isinstance(step, Train) and progress is not None  # by hand
    return STOPPED if begun else WAITING, "".join(details)


def overview(steps: Sequence[Step]) -> str:
    """A line for each step, and how many are done."""
    states = [state_of(step) for step in steps]
    width = max(len(step.title) for step in steps)
    lines = [
        f"{state:8s} {step.title:{width}s}  {more}".rstrip() for step, (state, more) in zip(steps, states, strict=True)
    ]
    return "\n".join([*lines, _count([state for state, _ in states])])


def commands(steps: Sequence[Step]) -> str:
    """Each step with its command and what it waits for, if it is not done, and how many are done."""
    titles = {step.key: step.title for step in steps}
    lines, states = [], [state_of(step)[0] for step in steps]
    for step, state in zip(steps, states, strict=True):
        lines.append(f"{state:8s} {step.title}")
        if state != DONE:
            lines.append(f"         {shlex.join(step.command())}")
            after = "; ".join(titles[key] for key in step.needs if key in titles)
            lines += [f"         after: {after}"] if after else []
    return "\n".join([*lines, _count(states)])


def problems(steps: Sequence[Step], outcome: Outcome) -> list[str]:
    """A line for each step that failed or was not started."""
    titles = {step.key: step.title for step in steps}
    failed = [f"{titles[key]} failed: {reason}" for key, reason in outcome.failed.items()]
    return [*failed, *(f"{titles[key]} was not run: {reason}" for key, reason in outcome.left.items())]


def _count(states: Sequence[str]) -> str:
    return f"{states.count(DONE)} of {len(states)} steps are done"
