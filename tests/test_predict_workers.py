from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest

from nnunetv2_mstkd.commands.evaluate import IN_BACKGROUND
from nnunetv2_mstkd.evaluation.cases import prepare
from nnunetv2_mstkd.evaluation.scoring import score_prediction
from nnunetv2_mstkd.inference import workers as module
from nnunetv2_mstkd.inference.workers import ahead, workers


class Lazy(Executor):
    """Runs a call when its result is asked for, and keeps count."""

    def __init__(self) -> None:
        self.submitted: list[int] = []

    def submit(self, function, /, *arguments):
        self.submitted.append(*arguments)
        future: Future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.mark.parametrize("limit", [0, 1, 3, 99])
def test_results_are_in_order_and_limited(limit):
    pool = Lazy()
    for number, result in enumerate(ahead(pool, lambda value: value**2, ((value,) for value in range(6)), limit)):
        assert result == number**2
        assert pool.submitted == list(range(min(6, number + 1 + limit)))
    assert number == 5


def test_without_processes_a_call_runs_at_once_and_here():
    with workers(0, 5) as pool:
        assert pool.submit(os.getpid).result() == os.getpid()
        with pytest.raises(ZeroDivisionError):
            pool.submit(divmod, 1, 0)


def test_process_returns_results_and_errors():
    with workers(1, 5) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()
        with pytest.raises(ZeroDivisionError):
            pool.submit(divmod, 1, 0).result()


def test_a_process_that_dies_is_explained():
    with pytest.raises(ChildProcessError, match=r"lack of memory; use fewer \(-npp 1 -nps 1\)"), workers(2, 1) as pool:
        pool.submit(os._exit, 1).result()


def test_what_an_evaluation_runs_in_the_background_is_imported_ahead():
    assert set(IN_BACKGROUND) == {prepare.__module__, score_prediction.__module__}


def variables() -> dict[str, str]:
    """Those of a process that finds the package."""
    root = str(Path(module.__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


def test_a_script_that_its_own_processes_run_again_is_explained(tmp_path):
    script = tmp_path / "plain.py"
    script.write_text(
        "import os\n"
        "from nnunetv2_mstkd.inference.workers import workers\n"
        "with workers(1, 1) as pool:\n"
        "    pool.submit(os.getpid).result()\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=variables(), timeout=120)
    assert done.returncode and "if __name__ == '__main__':" in done.stderr
    assert "its own message, if it had one, is above" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_a_process_does_not_outlive_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\n"
        "from nnunetv2_mstkd.inference.workers import workers\n"
        "if __name__ == '__main__':\n"
        "    with workers(1, 1) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=variables()) as parent:
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.send_signal(signal.SIGKILL)
    for _ in range(600):
        if not alive(child):
            break
        time.sleep(0.1)
    assert not alive(child)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")  # an orphan that nobody waits for is a zombie
    return not (state.is_file() and state.read_text().rsplit(")", 1)[1].split()[0] == "Z")
