"""Folders that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from lorafa.errors import CheckpointError, ConfigError
from lorafa.storage import renames
from lorafa.storage.folders import folder_written_whole

FULL = OSError(errno.ENOSPC, "No space left on device")


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def a_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("old")
    return folder


def test_a_folder_takes_its_place_when_the_block_ends(tmp_path: Path) -> None:
    with folder_written_whole(tmp_path / "new" / "out") as folder:
        (folder / "a").write_text("1")
        assert listed(tmp_path / "new") == [folder.name]
    assert listed(tmp_path / "new") == ["out"]
    assert (tmp_path / "new" / "out" / "a").read_text() == "1"


def write_and_raise(folder: Path, error: BaseException) -> None:
    (folder / "a").write_text("1")
    raise error


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), CheckpointError("x"), ValueError("x")], ids=repr)
@pytest.mark.parametrize("before", [None, "empty", "model"])
def test_after_an_error_nothing_is_left_and_what_was_there_is_there(
    before: str | None, error: BaseException, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if before is not None:
        a_model(out)
    if before == "empty":
        (out / "config.json").unlink()
    kind = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(kind), folder_written_whole(out, overwrite=True) as folder:
        write_and_raise(folder, error)
    assert listed(tmp_path) == ([] if before is None else ["out"])
    assert before is None or listed(out) == (["config.json"] if before == "model" else [])


def test_a_full_disk_is_said_with_the_room_that_is_left(tmp_path: Path) -> None:
    text = r"out could not be written: No space left on device. \d+ MiB are free there. Nothing was changed"
    with pytest.raises(CheckpointError, match=text), folder_written_whole(tmp_path / "out"):
        raise FULL


def test_a_folder_that_is_there_is_replaced_only_if_asked(tmp_path: Path) -> None:
    out = a_model(tmp_path / "out")
    with pytest.raises(ConfigError, match="exists and is not empty"), folder_written_whole(out):
        raise AssertionError
    with folder_written_whole(out, overwrite=True) as folder:
        (folder / "a").write_text("1")
        assert listed(out) == ["config.json"]
    assert listed(tmp_path) == ["out"]
    assert listed(out) == ["a"]


def test_what_is_no_model_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home" / "letters").mkdir(parents=True)
    with (
        pytest.raises(ConfigError, match="not the folder of a model"),
        folder_written_whole(tmp_path / "home", overwrite=True),
    ):
        raise AssertionError
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is no folder"), folder_written_whole(tmp_path / "file", overwrite=True):
        raise AssertionError
    assert (tmp_path / "home" / "letters").is_dir()


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, renamed = a_model(tmp_path / "out"), os.rename

    def rename(source: Path, target: Path) -> None:
        if Path(target) == out and Path(source).suffix == ".tmp":
            raise OSError(errno.EIO, "Input/output error")
        renamed(source, target)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(renames, "exchange", lambda one, other: False)  # as on file systems that cannot
    with pytest.raises(CheckpointError, match="Input/output error"), folder_written_whole(out, overwrite=True):
        pass
    assert listed(tmp_path) == ["out"]
    assert (out / "config.json").read_text() == "old"


KILLED = """
import os, sys, signal
from lorafa.storage.folders import folder_written_whole
with folder_written_whole(sys.argv[1]) as folder:
    (folder / "a").write_text("1")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def write_both(mine: Path, second: Path) -> None:
    (mine / "a").write_text("1")  # it is there: the process that writes it lives
    (second / "b").write_text("2")


@pytest.mark.skipif(os.name == "nt", reason="there are no such locks")
def test_what_a_killed_process_has_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False)
    assert len(listed(tmp_path)) == 1
    other = tmp_path / f".other.{uuid.uuid4().hex}.tmp"
    other.mkdir()
    with (
        pytest.raises(ConfigError, match="exists and is not empty"),
        folder_written_whole(out) as mine,
        folder_written_whole(out) as second,
    ):
        write_both(mine, second)
    assert listed(tmp_path) == sorted([other.name, "out"])
    assert listed(out) == ["b"]  # who comes second does not replace it
