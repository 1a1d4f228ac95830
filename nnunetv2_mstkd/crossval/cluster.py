"""Hands the steps of a plan to SLURM, through submitit: each step a job that waits for those that it needs."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnunetv2_mstkd.crossval.local import last_line, open_log
from nnunetv2_mstkd.crossval.marks import Mark
from nnunetv2_mstkd.crossval.steps import Step
from nnunetv2_mstkd.errors import DependencyError, InputError

JOB_MINUTES = 24 * 60
"""Time limit of a job where none is given; a job that reaches it is put into the queue again and goes on."""

MOST_TIMEOUTS = 1000
"""A training of many days goes through its time limit often, and each time it gets farther."""


@dataclass
class StepJob:
    """What a job runs; submitit sends it as it is."""

    step: Step

    def __call__(self) -> None:
        mark = Mark.of(self.step)
        try:
            if self.step.done():
                return
            command, log = open_log(self.step)
            with log.open("a", encoding="utf-8") as stream:
                code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream).returncode
            if code or not self.step.done():
                raise RuntimeError(f"{self.step.title}: exit code {code}: {last_line(log)} (log: {log})")
        except Exception:
            mark.remove()
            raise
        mark.remove()

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Called by submitit when the machine is taken away or time is up: the same again, which goes on with --c."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def check_cluster() -> None:
    """Refuse where no job can be submitted.

    Raises
    ------
    ValueError, ImportError
    """
    if shutil.which("sbatch") is None:
        raise InputError(
            "--executor slurm: there is no command sbatch on this machine; run it on a login node of the cluster, or "
            "use --executor local"
        )
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise DependencyError("--executor slurm needs submitit: pip install 'nnunetv2_mstkd[cluster]'") from error


def submit_steps(
    steps: Sequence[Step],
    options: Mapping[str, Any],
    report: Callable[[str], None] = print,
) -> dict[str, str]:
    """Submit what is not done yet.

    Parameters
    ----------
    steps:
        each after those that it needs.
    options:
        of sbatch, by name; they come after our own and so win.
    report:
        takes a line for each job.

    Returns
    -------
    Job numbers by key.

    Raises
    ------
    ValueError
        if sbatch refuses a job; what it took stays in the queue.
    RunningStepError
        before anything is submitted, if another call or an earlier job runs one of the steps.
    """
    import submitit
    from submitit.core.utils import FailedJobError

    waiting = [step for step in steps if not step.done()]
    marks = {step.key: Mark.of(step) for step in waiting}
    taken: list[Mark] = []
    jobs: dict[str, str] = {}
    try:
        for mark in marks.values():
            mark.take()
            taken.append(mark)
        for step in waiting:
            executor = submitit.AutoExecutor(
                step.model.logs / "slurm", cluster="slurm", slurm_max_num_timeout=MOST_TIMEOUTS
            )
            executor.update_parameters(**_parameters(step, options, [jobs[key] for key in step.needs if key in jobs]))
            try:
                job = executor.submit(StepJob(step))
            except FailedJobError as error:
                before = f"; {len(jobs)} jobs are in the queue already" if jobs else ""
                answer = " ".join(str(error).split())
                raise InputError(f"sbatch refuses the job to {step.title}: {answer}{before}") from error
            jobs[step.key] = job.job_id
            marks[step.key].hand_to(job=job.job_id)
            report(f"job {job.job_id}  {step.title}")
    except BaseException:
        for key, mark in marks.items():
            if mark in taken and key not in jobs:
                mark.remove()
        raise
    return jobs


def _parameters(step: Step, options: Mapping[str, Any], after: Sequence[str]) -> dict[str, Any]:
    """For submitit: our own options of sbatch for the step, then the user's."""
    given = {key.replace("-", "_"): value for key, value in options.items()}
    minutes = minutes_of(given.pop("time", JOB_MINUTES))
    more: dict[str, Any] = {"kill_on_invalid_dep": "yes"}
    if after:
        more["dependency"] = f"afterok:{':'.join(after)}"
    if step.gpus and not {"gres", "gpus", "gpus_per_node", "gpus_per_task"} & set(given):
        more["gpus_per_node"] = step.gpus
    # submitit must know the time itself: it asks for a new place in the queue when it is up
    return {"slurm_time": minutes, "slurm_job_name": step.key, "slurm_additional_parameters": {**more, **given}}


def minutes_of(time: str | int) -> int:
    """A time limit in minutes, at least 1, from sbatch's way to write it.

    Parameters
    ----------
    time:
        ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, ``days-hours``, ``days-hours:minutes`` or
        ``days-hours:minutes:seconds``.

    Raises
    ------
    ValueError
        if it is something else.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(time))
    if match is None:
        raise InputError(f"--slurm-time {time}: expected MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS")
    days, *rest = match.groups()
    first, second, third = (int(text or 0) for text in rest)
    if days is not None or rest[2] is not None:  # the first of the rest are hours
        seconds = ((int(days or 0) * 24 + first) * 60 + second) * 60 + third
    else:
        seconds = first * 60 + second
    return max(1, -(-seconds // 60))
