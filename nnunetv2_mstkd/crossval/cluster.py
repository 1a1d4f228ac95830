"""Submit the steps of a plan to SLURM, through submitit: each step is a job that waits for those that it needs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnunetv2_mstkd.crossval.local import last_line, open_log
from nnunetv2_mstkd.crossval.steps import Step
from nnunetv2_mstkd.errors import DependencyError, InputError

JOB_MINUTES = 24 * 60
"""Default time limit of a job; a job that reaches it is queued again and continues."""

MOST_TIMEOUTS = 1000
"""A training of many days reaches its time limit often, and gets farther each time."""


@dataclass
class StepJob:
    """What a job runs; submitit pickles it."""

    step: Step

    def __call__(self) -> None:
        # the process that submitted this job may have ended before it could name the job in the lock
        if job := os.environ.get("SLURM_JOB_ID"):
            self.step.lock.take(job)
        try:
            if not self.step.done():
                self._run()
        except Exception:  # not SystemExit, by which submitit ends a job that keeps its lock in the queue
            self.step.lock.release()
            raise
        self.step.lock.release()

    def _run(self) -> None:
        command, log = open_log(self.step)
        variables = {**os.environ, **self.step.variables()}
        with log.open("a", encoding="utf-8") as stream:
            ended = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=variables)
        if ended.returncode or not self.step.done():
            raise RuntimeError(f"{self.step.title}: exit code {ended.returncode}: {last_line(log)} (log: {log})")

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Called by submitit when the job is preempted or out of time: the same step again, which resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def check_cluster() -> None:
    """Refuse if no job can be submitted from this machine."""
    if shutil.which("sbatch") is None:
        raise InputError(
            "--executor slurm: there is no command sbatch on this machine; run it on a login node of the cluster, or "
            "use --executor local"
        )
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise DependencyError("--executor slurm needs submitit: pip install 'nnunetv2_mstkd[cluster]'") from error


def sbatch_options(named: Mapping[str, str | None], others: Sequence[str]) -> dict[str, Any]:
    """Options of sbatch from the command line: `named` ones, None if not given, and `others` as ``KEY[=VALUE]``.

    Without a value the option is True: ``exclusive``.
    """
    options: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    for text in others:
        key, equals, value = text.partition("=")
        key = key.strip().lstrip("-")
        if not key or (not equals and key in ("dependency", "time")):
            raise InputError(f"--slurm-option {text}: expected KEY=VALUE, or KEY alone for an option without a value")
        options[key] = value if equals else True
    if "time" in options:
        minutes_of(options["time"])
    if "?" in str(options.get("dependency", "")):
        raise InputError(
            f"--slurm-option dependency={options['dependency']}: steps also depend on each other, and SLURM "
            "cannot join that to alternatives (?); use conditions that must all hold (,)"
        )
    return options


def submit_steps(
    steps: Sequence[Step], options: Mapping[str, Any], report: Callable[[str], None] = print
) -> dict[str, str]:
    """Submit the steps that are not done, each of which stands after those that it needs; return their job numbers.

    Parameters
    ----------
    options
        Options of sbatch; they override ours, but a ``dependency`` is added to that on other steps.
    report
        Called with a line for each job.

    Raises
    ------
    InputError
        If sbatch refuses a job; those that it has accepted stay in the queue.
    RunningStepError
        Before anything is submitted, if another call or an earlier job runs one of the steps.
    """
    import submitit
    from submitit.core.utils import FailedJobError

    waiting = [step for step in steps if not step.done()]
    locked: list[Step] = []
    jobs: dict[str, str] = {}
    try:
        for step in waiting:
            step.lock.acquire()
            locked.append(step)
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
            try:
                step.lock.pass_to(job=job.job_id)
            except BaseException:
                job.cancel(check=False)
                raise
            jobs[step.key] = job.job_id
            report(f"job {job.job_id}  {step.title}")
    finally:
        for step in locked:
            if step.key not in jobs:
                step.lock.release()
    return jobs


def _parameters(step: Step, options: Mapping[str, Any], after: Sequence[str]) -> dict[str, Any]:
    """Parameters for submitit: our own options of sbatch for the step, overridden by the user's.

    A dependency of the user's is added to that on other steps.
    """
    given = {key.replace("-", "_"): value for key, value in options.items()}
    minutes = minutes_of(given.pop("time", JOB_MINUTES))
    more: dict[str, Any] = {"kill_on_invalid_dep": "yes"}
    conditions = [f"afterok:{':'.join(after)}"] if after else []
    if "dependency" in given:
        conditions.append(given.pop("dependency"))
    if conditions:
        more["dependency"] = ",".join(conditions)
    if step.gpus and not {"gres", "gpus", "gpus_per_node", "gpus_per_task"} & set(given):
        more["gpus_per_node"] = step.gpus
    # submitit must know the time limit itself: it queues the job again when the time is up
    return {"slurm_time": minutes, "slurm_job_name": step.key, "slurm_additional_parameters": {**more, **given}}


def minutes_of(time: str | int) -> int:
    """A time limit in whole minutes from sbatch's notation; InputError for 0, which means none to sbatch.

    That is ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, ``days-hours``, ``days-hours:minutes`` or
    ``days-hours:minutes:seconds``.
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
    if not seconds:
        raise InputError(f"--slurm-time {time}: a step needs a limit, at which its job is queued again and continues")
    return -(-seconds // 60)
