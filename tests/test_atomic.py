from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest

from nnunetv2_mstkd.errors import InputError, MissingFileError, WriteError
from nnunetv2_mstkd.images.atomic import atomic_folder, atomic_write, locked, scratch_folder, write_json


def test_file_appears_when_the_block_ends(tmp_path: Path):
    target = tmp_path / "file.json"
    target.write_text("old")
    with atomic_write(target) as scratch:
        scratch.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_old_file_survives_an_error(tmp_path: Path):
    target = tmp_path / "file.json"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(target) as scratch:
        scratch.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_names_the_file_and_keeps_the_old_one(tmp_path: Path):
    target = tmp_path / "file.json"
    target.write_text("old")
    with pytest.raises(WriteError, match=r"file\.json could not be written \(No space left on device\)"):  # noqa: SIM117
        with atomic_write(target) as scratch:
            scratch.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="Not a directory"):
        write_json(tmp_path / "file" / "a.json", {})


def test_users_errors_pass_through(tmp_path: Path):
    with pytest.raises(MissingFileError, match="no image"), atomic_write(tmp_path / "a"):
        raise MissingFileError("no image")


def test_json_that_cannot_be_written_keeps_the_old_file(tmp_path: Path):
    write_json(tmp_path / "a.json", {"ä": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ä": 1}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_appears_when_the_block_ends(tmp_path: Path, exists):
    target = tmp_path / "new" / "folder"
    if exists:
        target.mkdir(parents=True)
    with atomic_folder(target) as scratch:
        (scratch / "a").touch()
        assert not (target / "a").exists()
    assert os.listdir(target) == ["a"] and os.listdir(target.parent) == ["folder"]
    with pytest.raises(FileExistsError, match="is not empty"), atomic_folder(target):
        pass


def test_after_an_error_there_is_no_folder(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "folder") as scratch:
        (scratch / "a").touch()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_an_empty_folder_is_filled_and_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It may be a mount point, a link to a folder elsewhere, or the working directory."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    before = (tmp_path / "folder").stat().st_ino
    monkeypatch.chdir(tmp_path / "folder")
    for target in (Path("."), tmp_path / "link"):
        (tmp_path / "folder" / ".unfinished.part").mkdir()  # of a killed process
        with atomic_folder(target) as scratch:
            (scratch / "a").touch()
            assert not (tmp_path / "folder" / "a").exists()
        assert os.listdir(tmp_path / "folder") == ["a"]
        (tmp_path / "folder" / "a").unlink()
    assert (tmp_path / "folder").stat().st_ino == before and (tmp_path / "link").is_symlink()


def test_processes_of_equal_number_do_not_share_a_scratch_file(tmp_path: Path):
    """As the first processes of two containers."""
    with atomic_write(tmp_path / "a") as one, atomic_write(tmp_path / "a") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one" and os.listdir(tmp_path) == ["a"]


def test_a_scratch_folder_begins_empty_and_is_removed(tmp_path: Path):
    leftover = tmp_path / ".case.part"
    leftover.mkdir()
    (leftover / "half").touch()
    with scratch_folder(tmp_path / "case") as scratch:
        assert scratch == leftover and os.listdir(scratch) == []
    assert os.listdir(tmp_path) == []


def test_a_lock_that_is_held_is_refused_or_waited_for(tmp_path):
    file = tmp_path / "a.json"
    order = []

    def wait() -> None:
        with locked(file):
            order.append("second")

    with locked(file):
        with pytest.raises(InputError, match=r"^is busy$"), locked(file, "is busy"):
            pass
        other = threading.Thread(target=wait)
        other.start()
        time.sleep(0.2)
        order.append("first")
    other.join()
    assert order == ["first", "second"] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(errno.EOPNOTSUPP, "not supported"), NotImplementedError()])
def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch, error):
    def refuse(self, *arguments, **options):
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with locked(tmp_path / "a.json", "is busy"):
        write_json(tmp_path / "a.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
