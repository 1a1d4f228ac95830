from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import warnings
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


def test_command_gets_arguments_and_gives_exit_code(command):
    command(lambda args: args.number)
    assert cli.main(["fake", "--number", "7"]) == 7


def test_command_that_returns_none_succeeds(command):
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


def test_error_without_text_is_named(command, capsys):
    command(raising(errors.UnsupportedError()))
    assert cli.main(["fake"]) == 2
    assert capsys.readouterr().err == "mstkd fake: UnsupportedError\n"


@pytest.mark.parametrize("error", [KeyError("spacing"), ValueError("spacing"), NotImplementedError("spacing")])
def test_internal_error_has_traceback_and_code_3(command, capsys, error):
    command(raising(error))
    assert cli.main(["fake"]) == errors.EXIT_INTERNAL_ERROR == 3
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "spacing" in err and "mstkd fake: internal error" in err


def test_gpu_out_of_memory_is_one_line(command, capsys):
    command(raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")))
    assert cli.main(["fake"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mstkd fake: CUDA out of memory") and err.count("\n") == 1 and "-device cpu" in err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 49.3 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    ],
    ids=["numpy", "torch"],
)
def test_lack_of_memory_is_one_line(command, capsys, error):
    command(raising(error))
    assert cli.main(["fake"]) == 2
    assert capsys.readouterr().err == f"mstkd fake: not enough memory ({error})\n"


def test_a_closed_pipe_is_no_error(tmp_path):
    code = "from nnunetv2_mstkd import errors; import sys; "
    code += "sys.exit(errors.run_and_report('fake', lambda args: [print('x' * 1000) for _ in range(1000)], None))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (141, b"")


def test_a_closed_pipe_that_is_not_the_output_is_an_error(command, capsys):
    command(raising(BrokenPipeError("of a worker")))
    assert cli.main(["fake"]) == 2 and "of a worker" in capsys.readouterr().err


def test_interrupt_exits_with_130(command, capsys):
    command(raising(KeyboardInterrupt()))
    assert cli.main(["fake"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--debug", "fake"], ["fake", "--debug"]], ids=["before", "after"])
def test_debug_shows_traceback(command, capsys, monkeypatch, arguments):
    monkeypatch.delenv("MSTKD_DEBUG", raising=False)
    command(raising(errors.InputError("found 3")))
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith("mstkd fake: found 3\n")


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_environment_shows_traceback(command, capsys, monkeypatch, value, shown):
    monkeypatch.setenv("MSTKD_DEBUG", value)
    command(raising(errors.InputError("found 3")))
    cli.main(["fake"])
    assert ("Traceback" in capsys.readouterr().err) is shown


def refused(capsys, *arguments: str) -> str:
    """The one line with which the parser refuses these arguments."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    return err


def test_unknown_command_lists_known_ones(capsys):
    line = refused(capsys, "predikt")
    assert "unknown command 'predikt' (did you mean 'predict'?)" in line
    assert all(name in line for name in cli.COMMANDS)


def test_missing_command_is_refused(capsys):
    assert "COMMAND" in refused(capsys, "--debug")


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        ("predict -i a -o b -d 1 --tru", "unknown option --tru (did you mean '--trust'?)"),
        ("predict -i a -o b -d 1 -dev cpu", "unknown option -dev (did you mean '-device'?)"),
        ("predict -i a -o b -d 1 -devcie=cpu", "unknown option -devcie (did you mean '-device'?)"),
        ("predict --input a", "unknown option --input (did you mean '-i'?)"),
        ("predict --xyz", "unknown option --xyz; see"),
        ("predict -i a -o b -d 1 --skip-bad T1", "unexpected argument 'T1'"),
        ("predict -i a -o b -d 1 -device gpu", "unknown value 'gpu'; known are cuda, cpu, mps"),
        ("predict -i a -o b -d 1 -m c", "-m: not allowed with argument -d"),
        ("predict -i a -d 1", "required: -o"),
        ("predict -i", "-i: expected one argument"),
        ("demo --epochs many", "--epochs: invalid int value: 'many'"),
        ("crossval 901 demo", "the following arguments are required: -d, -c"),
        ("--verzion", "mstkd: unknown option --verzion (did you mean '--version'?)"),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, phrase):
    line = refused(capsys, *arguments.split())
    command = " ".join(["mstkd", *arguments.split()[:1]]) if arguments[0] != "-" else "mstkd"
    assert phrase in line and line.startswith(f"{command}: ") and line.endswith(f"see {command} --help\n")


def test_bad_release_is_refused_by_the_sub_command(capsys):
    line = refused(capsys, "convert", "brats2012", "source")
    assert line.startswith("mstkd convert: unknown release 'brats2012' (did you mean 'brats2021'?)")


@pytest.mark.parametrize("option", ["-step_size", "--step_size", "--step-size", "-step-size", "-step_size=0.25"])
def test_dash_style_of_options_does_not_matter(option):
    parser = cli.Parser(prog="mstkd")
    parser.add_argument("-step_size", type=float)
    parser.add_argument("--dry-run", action="store_true")
    value = [] if "=" in option else ["0.25"]
    parsed = parser.parse_args([option, *value, "-dry_run"])
    assert (parsed.step_size, parsed.dry_run) == (0.25, True)
    assert "--step" not in parser.format_help() and "--dry_run" not in parser.format_help()


def test_values_that_begin_with_a_dash():
    parser = cli.Parser(prog="mstkd")
    parser.add_argument("-d", "--dataset-id", type=int)
    parser.add_argument("rest", nargs="*")
    assert parser.parse_args(["-d901", "-2.5", "--", "-dev"]).rest == ["-2.5", "-dev"]
    assert parser.parse_args(["-d", "-1"]).dataset_id == -1


def test_only_the_jit_warning_is_silenced(command, recwarn):
    def warn(_) -> None:
        warnings.warn("`torch.jit.interface` is deprecated. Please use `torch.compile`.", FutureWarning, stacklevel=2)
        warnings.warn("another one", FutureWarning, stacklevel=2)

    command(warn)
    assert cli.main(["fake"]) == 0
    assert [str(warning.message) for warning in recwarn] == ["another one"]


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


def test_command_table_matches_modules():
    spec = importlib.util.find_spec("nnunetv2_mstkd.commands")
    files = {path.stem: path.read_text() for path in Path(spec.origin).parent.glob("*.py")}
    commands = {name.replace("_", "-") for name, text in files.items() if re.search(r"\b(def|import) run\b", text)}
    assert commands == set(cli.COMMANDS)


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: mstkd {name}")


def test_without_a_command_the_help_is_shown(capsys):
    assert cli.main([]) == 2
    told = capsys.readouterr().err
    assert told.startswith("usage: mstkd") and all(name in told for name in cli.COMMANDS)


def test_path_prints_trainer_folder(capsys):
    assert cli.main(["path"]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{TRAINER_PATH}\n"
    assert [file.name for file in Path(printed.strip()).glob("*.py")] == ["mstkd_trainers.py"]


def loaded(code: str) -> set[str]:
    """The slow packages that a new interpreter has imported after running `code`."""
    slow = {"torch", "nnunetv2", "numpy", "pandas", "SimpleITK"}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys\nfrom nnunetv2_mstkd import cli\n{code}\nprint(*{slow} & set(sys.modules))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(("given", "seen"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_idle_openmp_threads_sleep(given, seen):
    """The variable is there when a command's module is imported, so before torch; the user's own value stays."""
    code = (
        "import os, sys, importlib\nfrom nnunetv2_mstkd import cli\nreal = importlib.import_module\n"
        "def show(name):\n    print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)\n    return real(name)\n"
        "importlib.import_module = show\ncli.main(['evaluate', '--help'])"
    )
    variables = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    variables |= {} if given is None else {"OMP_WAIT_POLICY": given}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=variables)
    assert done.stdout.splitlines()[0] == f"{seen} False"


def test_garbage_is_collected_rarely_and_not_at_exit():
    code = (
        "import atexit, gc\nfrom nnunetv2_mstkd import cli\n"
        "atexit.register(lambda: print(gc.get_threshold()[0], gc.get_freeze_count() > 1000))\ncli.main(['path'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{cli.GC_THRESHOLD} True"


def test_path_imports_nothing_slow():
    assert loaded("cli.main(['path'])") == set()


@pytest.mark.parametrize("command", ["predict -i images -o out", "evaluate"])
def test_a_model_that_is_not_there_is_told_at_once(command):
    words = [*command.split(), "-m", "no/model"]
    assert loaded(f"assert cli.main({words}) == 2") == set()


def test_help_does_not_import_torch():
    code = (
        "for name in cli.COMMANDS:\n"
        "    try: cli.main([name, '--help'])\n"
        "    except SystemExit as stop: assert stop.code == 0"
    )
    assert not loaded(code) & {"torch", "nnunetv2"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_forked_child_has_default_sigterm():
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_forked_child_never_misses_sigterm():
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
