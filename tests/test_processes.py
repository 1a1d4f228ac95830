"""How many cores a process may use."""

from __future__ import annotations

import os

import pytest

from nnunetv2_mstkd import processes


@pytest.mark.parametrize(
    ("content", "expected"),
    [("max 100000", 6), ("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1), ("9900000 100000", 6)],
)
def test_a_container_may_limit_the_cores(monkeypatch, tmp_path, content, expected):
    file = tmp_path / "cpu.max"
    file.write_text(content + "\n")
    monkeypatch.setattr(processes, "CPU_QUOTA", file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    assert processes.usable_cores() == expected


@pytest.mark.parametrize("content", [None, "", "a b", "1 2 3"])
def test_without_a_limit_a_scheduler_decides(monkeypatch, tmp_path, content):
    file = tmp_path / "cpu.max"
    if content is not None:
        file.write_text(content)
    monkeypatch.setattr(processes, "CPU_QUOTA", file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 5, 7}, raising=False)
    assert processes.usable_cores() == 3
