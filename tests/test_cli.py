from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nnunetv2_mstkd
from nnunetv2_mstkd import cli, errors
from nnunetv2_mstkd.nnunet.registration import TRAINER_PATH


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    """Give a function that makes ``mstkd fake --number N`` call a function."""

    def install(run: Callable[[argparse.Namespace], int | None]) -> None:
        module = SimpleNamespace(run=run, add_arguments=lambda parser: parser.add_argument("--number", type=int))
        monkeypatch.setitem(cli.COMMANDS, "fake", "only for this test")
        monkeypatch.setitem(sys.modules, "nnunetv2_mstkd.commands.fake", module)

    return install


def raising(error: BaseException) -> Callable[[argparse.Namespace], None]:
    def run(args: argparse.Namespace) -> None:
        raise error

    return run


def test_a_command_gets_its_arguments_and_gives_the_exit_code(command):
    command(lambda args: args.number)
    assert cli.main(["fake", "--number", "7"]) == 7


def test_a_command_that_returns_nothing_succeeds(command):
    command(lambda args: None)
    assert cli.main(["fake"]) == 0


@pytest.mark.parametrize(
    "error",
    [
        errors.InputError("found 3, expected 4"),
        errors.MissingFileError("no folder x"),
        errors.UnsupportedError("no cascade"),
        PermissionError("x is not yours"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_user_error_is_one_line_and_exit_code_2(command, capsys, monkeypatch, error):
    monkeypatch.delenv("MSTKD_DEBUG", raising=False)
    command(raising(error))
    assert cli.main(["fake"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"mstkd fake: {error}\n")


def test_an_error_without_text_is_named(command, capsys):
    command(raising(errors.UnsupportedError()))
    assert cli.main(["fake"]) == 2
    assert capsys.readouterr().err == "mstkd fake: UnsupportedError\n"


@pytest.mark.parametrize("error", [KeyError("spacing"), ValueError("spacing"), NotImplementedError("spacing")])
def test_internal_error_keeps_its_traceback_and_exits_with_3(command, capsys, error):
    command(raising(error))
    assert cli.main(["fake"]) == errors.EXIT_INTERNAL_ERROR == 3
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "spacing" in err and "mstkd fake: internal error" in err


def test_gpu_out_of_memory_is_one_line(command, capsys):
    command(raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")))
    assert cli.main(["fake"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mstkd fake: CUDA out of memory") and err.count("\n") == 1 and "-device cpu" in err


def test_an_interrupt_gives_130(command, capsys):
    command(raising(KeyboardInterrupt()))
    assert cli.main(["fake"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--debug", "fake"], ["fake", "--debug"]], ids=["before", "after"])
def test_debug_shows_the_traceback_too(command, capsys, monkeypatch, arguments):
    monkeypatch.delenv("MSTKD_DEBUG", raising=False)
    command(raising(errors.InputError("found 3")))
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith("mstkd fake: found 3\n")


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_the_environment_can_ask_for_the_traceback(command, capsys, monkeypatch, value, shown):
    monkeypatch.setenv("MSTKD_DEBUG", value)
    command(raising(errors.InputError("found 3")))
    cli.main(["fake"])
    assert ("Traceback" in capsys.readouterr().err) is shown


def test_an_unknown_command_is_answered_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "invalid choice: 'trian'" in err
    assert all(f"'{name}'" in err for name in cli.COMMANDS)


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2


def test_version_is_the_package_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"mstkd {nnunetv2_mstkd.__version__}\n"


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"\n    {name} " in out or f"\n    {name}\n" in out for name in cli.COMMANDS)


def test_the_table_and_the_modules_agree():
    spec = importlib.util.find_spec("nnunetv2_mstkd.commands")
    modules = {path.stem for path in Path(spec.origin).parent.glob("*.py")} - {"__init__"}
    assert modules == {name.replace("-", "_") for name in cli.COMMANDS}


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: mstkd {name}")


def test_path_prints_the_folder_of_the_shim(capsys):
    assert cli.main(["path"]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{TRAINER_PATH}\n"
    assert [file.name for file in Path(printed.strip()).glob("*.py")] == ["mstkd_trainers.py"]


def test_path_imports_neither_torch_nor_numpy():
    code = (
        "import sys; from nnunetv2_mstkd.cli import main; main(['path']); "
        "print(sorted({'torch', 'numpy', 'nnunetv2', 'SimpleITK'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_ends_on_the_spot_and_this_process_does_not():
    """A pool ends its processes by SIGTERM, and one that waits would never get to a handler written in Python."""
    found = {}

    def fork(_) -> None:
        found["here"] = signal.getsignal(signal.SIGTERM)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            found["child"] = pool.apply(signal.getsignal, (signal.SIGTERM,))

    assert errors.run_and_report("mstkd", fork, argparse.Namespace()) == 0
    assert callable(found["here"])
    assert found["child"] == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_that_is_ended_before_it_runs_does_not_miss_it():
    """Python clears what signals it has noted in a new child, and a pool may end a process that has not yet run."""

    def fork_and_end(_) -> None:
        for _ in range(100):
            child = os.fork()
            if child == 0:
                signal.sigtimedwait([], 5)
                os._exit(3)
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])

    assert errors.run_and_report("mstkd", fork_and_end, argparse.Namespace()) == 0
