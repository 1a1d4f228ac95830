"""Jobs of a cross-validation on a SLURM of one node, whose daemons these tests start and stop themselves."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_crossval import Script

from nnunetv2_mstkd.crossval.locks import RunningStepError, job_state
from nnunetv2_mstkd.crossval.overview import state_of
from nnunetv2_mstkd.crossval.steps import Training

DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={top}/munge.socket
StateSaveLocation={top}/state
SlurmdSpoolDir={top}/spool
SlurmctldPidFile={top}/slurmctld.pid
SlurmdPidFile={top}/slurmd.pid
SlurmctldLogFile={top}/slurmctld.log
SlurmdLogFile={top}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0
MpiDefault=none
ReturnToService=2
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=1 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def find_daemon(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


def why_not() -> str | None:
    """Why these tests cannot run here."""
    missing = [name for name in (*DAEMONS, "sbatch") if find_daemon(name) is None]
    if missing:
        return f"{missing[0]} is not installed (Debian: munge slurm-wlm)"
    if os.geteuid() != 0:
        return "slurmd starts jobs of other users, so it wants to be started by root"
    try:
        import submitit  # noqa: F401
    except ImportError:
        return "submitit is not installed (extra cluster)"
    return None


REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A SLURM that takes jobs; its logs and state lie in the folder."""
    top = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (top / name).mkdir()
    key = top / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    host = socket.gethostname().split(".")[0]
    configuration = top / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(host=host, ports=free_ports(2), top=top, user=getpass.getuser()), encoding="utf-8"
    )
    variables = {**os.environ, "SLURM_CONF": str(configuration)}
    commands = [
        ["munged", "--foreground", "--force", f"--socket={top}/munge.socket", f"--key-file={key}",
         f"--pid-file={top}/munged.pid", f"--seed-file={top}/munged.seed", f"--log-file={top}/munged.log"],
        ["slurmctld", "-D", "-f", str(configuration)],
        ["slurmd", "-D", "-f", str(configuration), "-N", host],
    ]  # fmt: skip
    daemons = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(configuration))
        try:
            for command in commands:
                log = (top / f"{command[0]}.out").open("w")
                path = find_daemon(command[0])
                daemons.append(subprocess.Popen([path, *command[1:]], env=variables, stdout=log, stderr=log))
                time.sleep(1)
            state = ""
            for _ in range(120):
                answer = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True)
                state = answer.stdout.strip()
                if state == "idle":
                    break
                time.sleep(0.5)
            logs = "\n".join(file.read_text(errors="replace")[-1500:] for file in sorted(top.glob("*.log")))
            assert state == "idle", f"{state} {answer.stderr}\n{logs}"
            yield top
        finally:
            subprocess.run(["scancel", f"--user={getpass.getuser()}"], capture_output=True)
            for daemon in reversed(daemons):
                daemon.terminate()
            for daemon in reversed(daemons):
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            end_all_of(configuration)


def end_all_of(configuration: Path) -> None:
    """Kill what jobs leave behind when their daemons are gone: all that have this SLURM in their environment."""
    mark = f"SLURM_CONF={configuration}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if int(folder.name) != os.getpid() and mark in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)


@pytest.fixture
def submit(slurm: Path, monkeypatch: pytest.MonkeyPatch):
    # the job unpickles the step, so it must find this module
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    from nnunetv2_mstkd.crossval.cluster import submit_steps

    def call(*steps: Script, **options: str) -> dict[str, str]:
        return submit_steps(list(steps), options, report=lambda line: None)

    return call


def wait(condition, seconds: float = 90) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.3)
    return False


@pytest.fixture
def model(tmp_path: Path) -> Training:
    return Training(tmp_path, "1", "3d_fullres", "Any", device="cpu")


def test_jobs_wait_for_dependencies(submit, model):
    check = "assert os.path.exists(os.path.join(os.path.dirname(output), 'first')); open(output, 'w')"
    first = Script(model, name="first", code="time.sleep(2); open(output, 'w')")
    second = Script(model, ("first",), name="second", code=check)
    jobs = submit(first, second)
    assert set(jobs) == {"first", "second"}
    assert state_of(second)[0] == "queued"
    assert f"SLURM job {jobs['second']}" in state_of(second)[1]
    with pytest.raises(RunningStepError, match=f"first is run by SLURM job {jobs['first']}"):
        submit(first)
    assert wait(second.done), (model.logs / "second.log").read_text() if second.log.is_file() else state_of(second)
    assert wait(lambda: job_state(jobs["second"]) is None)
    assert not list(model.logs.glob("*.running"))
    assert submit(first, second) == {}


def test_failed_job_cancels_dependent_ones(submit, model):
    bad = Script(model, name="bad", code="print('no space left', flush=True); sys.exit(3)")
    after = Script(model, ("bad",), name="after")
    jobs = submit(bad, after)
    assert wait(lambda: job_state(jobs["after"]) is None)
    assert state_of(bad) == ("stopped", f"last line of {bad.log}: no space left")
    assert not after.done()
    assert after.lock.owner() is None  # its job was cancelled, so nobody holds it and it may be submitted again
    again = submit(Script(model, name="bad"), after)
    assert wait(after.done), again


def test_requeued_job_resumes(submit, model):
    once = f"{model.results / 'begun'}"
    code = (
        f"again = os.path.exists({once!r}); open({once!r}, 'w'); "
        "again or time.sleep(600); open(output, 'w').write('went on')"
    )
    step = Script(model, name="long", code=code)
    jobs = submit(step)
    assert wait(lambda: (model.results / "begun").is_file()), state_of(step)
    assert subprocess.run(["scontrol", "requeue", jobs["long"]], capture_output=True, text=True).returncode == 0
    # SLURM lets a job rest for two minutes before it starts again
    assert wait(lambda: job_state(jobs["long"]) == "PENDING")
    subprocess.run(["scontrol", "update", f"JobId={jobs['long']}", "StartTime=now"], check=True)
    assert wait(step.done, 240), state_of(step)
    assert step.output.read_text() == "went on"
    assert step.log.read_text().count("$ ") == 2


def test_refused_options_lock_nothing(submit, model):
    step = Script(model, name="step")
    with pytest.raises(ValueError, match=r"sbatch refuses the job to the step: .*invalid partition"):
        submit(step, partition="nowhere")
    assert not step.lock.file.exists()
    assert state_of(step) == ("waiting", "")
