from __future__ import annotations

from pathlib import Path

import pytest

from nnunetv2_mstkd.images.atomic import scratch_file


def test_the_target_appears_when_the_block_ends_and_nothing_else_stays(tmp_path: Path):
    target = tmp_path / "file.json"
    target.write_text("old")
    with scratch_file(target) as scratch:
        scratch.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_after_an_error_the_old_file_stays_and_nothing_else(tmp_path: Path):
    target = tmp_path / "file.json"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), scratch_file(target) as scratch:
        scratch.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
