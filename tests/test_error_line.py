from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_mstkd import errors as error_line

ROOT = Path(__file__).parents[1]
REFUSAL = "raise ValueError('found 3,\\n  expected 4')"


@pytest.fixture
def passed_on(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """The exceptions that the hook passes on to the one before it."""
    seen: list[BaseException] = []
    monkeypatch.delenv("MSTKD_DEBUG", raising=False)
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: seen.append(error))
    error_line.install()
    return seen


def fail(code: str, file: str | None = None) -> None:
    """Run ``code`` as if it stood in ``file`` of the package, and give its exception to the hook."""
    if file is None:
        file = os.path.join(error_line.PACKAGE, "trainers", "base.py")
    try:
        exec(compile(code, file, "exec"), {})
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)


@pytest.mark.parametrize("kind", [error.__name__ for error in error_line.USER_ERRORS])
def test_a_refusal_of_the_package_is_one_line_and_exit_code_2(passed_on, capsys, kind):
    with pytest.raises(SystemExit) as stop:
        fail(f"def check():\n    raise {kind}('found 3,\\n  expected 4')\ncheck()")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "nnunetv2_mstkd: found 3, expected 4\n"
    assert passed_on == []


def test_a_refusal_with_a_cause_is_one_line(passed_on, capsys):
    with pytest.raises(SystemExit):
        fail("try:\n    int('x')\nexcept ValueError as error:\n    raise ValueError('not a number') from error")
    assert capsys.readouterr().err == "nnunetv2_mstkd: not a number\n"


@pytest.mark.parametrize(
    "code",
    [
        "int('x')",
        "list(zip([1], [], strict=True))",
        "import json\njson.loads('{')",
        "raise KeyError('a defect')",
        "raise RuntimeError('a defect')",
        "raise NotImplementedError",
    ],
)
def test_a_defect_keeps_its_traceback(passed_on, code):
    fail(code)
    assert len(passed_on) == 1


@pytest.mark.parametrize("folder", [error_line.PACKAGE + "_other", os.path.dirname(error_line.PACKAGE), ""])
def test_errors_of_others_keep_their_traceback(passed_on, folder):
    fail(REFUSAL, os.path.join(folder, "module.py"))
    assert len(passed_on) == 1


def test_debugging_keeps_the_traceback(passed_on, monkeypatch):
    monkeypatch.setenv("MSTKD_DEBUG", "1")
    fail(REFUSAL)
    assert len(passed_on) == 1


def test_an_interpreter_that_a_person_types_into_does_not_end(passed_on, monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    fail(REFUSAL)
    assert len(passed_on) == 1


def test_installing_twice_changes_nothing(passed_on):
    hook = sys.excepthook
    error_line.install()
    assert sys.excepthook is hook


def test_the_process_ends_with_code_2_when_nnunet_has_imported_the_trainers():
    shim = ROOT / "nnunetv2_mstkd" / "nnunet" / "_trainer_path" / "mstkd_trainers.py"
    code = (
        f"import runpy\nprint('MSTKDTrainer' in runpy.run_path({str(shim)!r}))\n"
        "from nnunetv2_mstkd.modalities import parse_subset\nparse_subset('T9', ['T1', 'T2'])"
    )
    variables = {key: value for key, value in os.environ.items() if key != "MSTKD_DEBUG"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=variables)
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1] == "True"
    assert done.stderr.splitlines()[-1] == "nnunetv2_mstkd: unknown modality 'T9' in subset 'T9'; known are T1, T2"
    assert "Traceback" not in done.stderr
