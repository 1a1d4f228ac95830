"""benchmarks/gpu_check.py: its order, its table, and that a failure of one part does not stop the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu_check
from gpu_check import Check


@pytest.fixture(autouse=True)
def own_variables(monkeypatch):
    """The check sets variables for its commands."""
    monkeypatch.setattr(os, "environ", dict(os.environ))


def check(folder: Path, *options: str) -> tuple[int, dict[str, dict]]:
    code = gpu_check.main(["--out", str(folder), "--device", "cpu", *options])
    content = json.loads((folder / "gpu_check.json").read_text())
    return code, {row["part"]: row for row in content["rows"]}


def outcomes(monkeypatch, **found) -> None:
    """What parts do instead of working."""
    usual = {"prepare": None, "train": None, "resume": None, "predict": None, "evaluate": None}
    for name, outcome in {**usual, **found}.items():

        def part(self: Check, outcome=outcome):
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(Check, name, part)


def test_a_failure_does_not_stop_the_other_parts(tmp_path, monkeypatch, capsys):
    outcomes(monkeypatch, resume=ValueError("no such file"), predict=["0 of 9 decisions differ"])
    code, rows = check(tmp_path / "out")
    assert code == 1
    assert rows["resume after a kill"]["outcome"] == "FAILED: no such file"
    predicted = rows["mstkd predict, as on the CPU"]
    assert (predicted["outcome"], predicted["details"]) == ("ok", "0 of 9 decisions differ")
    assert rows["step_cost, eager"]["details"] == "needs CUDA"
    assert "| resume after a kill " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        check(tmp_path / "out")
    assert "out exists" in capsys.readouterr().err


def test_all_is_well(tmp_path, monkeypatch):
    outcomes(monkeypatch)
    code, rows = check(tmp_path / "out", "--trainers", "KDTrainer")
    assert code == 0 and rows["mstkd predict, as on the CPU"]["details"] == "ModalityDropoutTrainer was not asked for"


def test_parts_after_the_last_minute_and_without_plans_are_named(tmp_path, monkeypatch):
    outcomes(monkeypatch)
    code, rows = check(tmp_path / "late", "--minutes", "0")
    assert code == 1 and "minutes were over" in rows["phantom, plans, configurations"]["outcome"]
    outcomes(monkeypatch, prepare=ValueError("disk full"))
    code, rows = check(tmp_path / "full")
    assert code == 1 and rows["resume after a kill"]["outcome"] == "not reached: there are no plans"


def test_commands_need_no_installation(tmp_path):
    gpu_check.write_commands(tmp_path / "bin")
    assert sorted(file.name for file in (tmp_path / "bin").iterdir()) == sorted(gpu_check.COMMANDS)
    run = subprocess.run([tmp_path / "bin" / "mstkd", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.strip()
