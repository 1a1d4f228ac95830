"""What `mstkd status` says of the steps of a plan."""

from __future__ import annotations

from collections.abc import Sequence

from nnunetv2_mstkd.crossval.local import last_line
from nnunetv2_mstkd.crossval.marks import Mark
from nnunetv2_mstkd.crossval.steps import Step, Train

DONE, RUNNING, QUEUED, STOPPED, WAITING = "done", "running", "queued", "stopped", "waiting"


def state_of(step: Step) -> tuple[str, str]:
    """The state of a step, and more about it for people."""
    if step.done():
        return DONE, ""
    progress = step.progress()
    holder = Mark.of(step).holder()
    if holder is not None:
        return QUEUED if holder.waits else RUNNING, ", ".join(text for text in (progress, holder.name) if text)
    by_hand = isinstance(step, Train) and progress
    if by_hand or step.log.is_file():
        where = [f"last line of {step.log}: {last_line(step.log)}"] if step.log.is_file() else []
        return STOPPED, "; ".join([*([progress] if progress else []), *where])
    return WAITING, progress


def overview(steps: Sequence[Step]) -> str:
    """A line for each step, and how many are done."""
    states = [state_of(step) for step in steps]
    width = max(len(step.title) for step in steps)
    lines = [
        f"{state:8s} {step.title:{width}s}  {more}".rstrip() for step, (state, more) in zip(steps, states, strict=True)
    ]
    done = sum(state == DONE for state, _ in states)
    return "\n".join([*lines, f"{done} of {len(steps)} steps are done"])
