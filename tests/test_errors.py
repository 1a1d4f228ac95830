from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_mstkd import errors

ROOT = Path(__file__).parents[1]
KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.UserError)]
ERROR = errors.InputError("found 3,\n  expected 4")


@pytest.fixture
def passed_on(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Exceptions that our hook leaves to the previous one."""
    seen: list[BaseException] = []
    monkeypatch.delenv("MSTKD_DEBUG", raising=False)
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: seen.append(error))
    errors.install_excepthook()
    return seen


def end_with(error: BaseException) -> None:
    sys.excepthook(type(error), error, None)


@pytest.mark.parametrize("kind", KINDS)
def test_user_error_is_one_line_and_exit_code_2(passed_on, capsys, kind):
    with pytest.raises(SystemExit) as stop:
        end_with(kind("found 3,\n  expected 4"))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "nnunetv2_mstkd: found 3, expected 4\n"
    assert passed_on == []


def test_user_errors_are_builtin_errors_too():
    builtin = (ValueError, OSError, NotImplementedError, ImportError, ArithmeticError)
    assert all(issubclass(kind, builtin) for kind in KINDS if kind is not errors.UserError)


@pytest.mark.parametrize("error", [ValueError("a"), KeyError("a"), OSError("a"), errors.InputError("")])
def test_other_errors_keep_their_traceback(passed_on, error):
    end_with(error)
    assert passed_on == [error]


def test_did_you_mean_hints_at_close_words_only():
    assert errors.did_you_mean("epoch", ["seed", "epochs"]) == " (did you mean 'epochs'?)"
    assert errors.did_you_mean("epoch", ["seed"]) == ""


def test_debugging_keeps_the_traceback(passed_on, monkeypatch):
    monkeypatch.setenv("MSTKD_DEBUG", "1")
    end_with(ERROR)
    assert passed_on == [ERROR]


def test_interactive_interpreter_does_not_exit(passed_on, monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    end_with(ERROR)
    assert passed_on == [ERROR]


def test_installing_twice_changes_nothing(passed_on):
    hook = sys.excepthook
    errors.install_excepthook()
    assert sys.excepthook is hook


def test_nnunet_process_exits_with_2():
    shim = ROOT / "nnunetv2_mstkd" / "nnunet" / "_trainer_path" / "mstkd_trainers.py"
    code = (
        f"import runpy\nprint('MSTKDTrainer' in runpy.run_path({str(shim)!r}))\n"
        "from nnunetv2_mstkd.modalities import parse_subset\nparse_subset('T9', ['T1', 'T2'])"
    )
    variables = {key: value for key, value in os.environ.items() if key != "MSTKD_DEBUG"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=variables)
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1] == "True"
    assert done.stderr.splitlines()[-1].startswith("nnunetv2_mstkd: unknown modality 'T9'")
    assert "Traceback" not in done.stderr
