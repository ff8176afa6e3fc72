"""Files that take their places together: in their order, synced, with names of the old ones to come back by."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lorafa.errors import CheckpointError, ConfigError
from lorafa.storage import renames
from lorafa.storage.renames import exchange
from lorafa.storage.together import left_in, written_together
from toys.faults import Disk, files_in

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the harness looks descriptors up there")


def save(folder: Path, text: str, config: str = "") -> None:
    with written_together() as together:
        stage = together.stage(folder, last="config")
        (stage / "weights").write_text(text)
        (stage / "config").write_text(config or text)
        assert together.stage(folder) == stage


def steps_of(folder: Path, text: str, config: str = "") -> list[str]:
    """What happens in the folder, without hidden names."""
    disk = Disk(folder)
    with disk.watched():
        save(folder, text, config)
    return [step for step in disk.steps if not step.split()[1].startswith(".") or step == "fsync ."]


def test_the_last_file_goes_first_and_comes_last_and_each_order_is_on_the_disk(tmp_path: Path) -> None:
    save(tmp_path, "old")
    assert steps_of(tmp_path, "new") == [
        "unlink config", "replace weights", "fsync .", "replace config", "fsync .",
    ]  # fmt: skip


def test_a_last_file_that_stays_the_same_is_never_away(tmp_path: Path) -> None:
    save(tmp_path, "old", "same")
    assert steps_of(tmp_path, "new", "same") == ["replace weights", "fsync ."]


def test_new_bytes_and_names_are_synced_before_they_take_their_places(tmp_path: Path) -> None:
    save(tmp_path, "old")
    disk = Disk(tmp_path)
    with disk.watched():
        save(tmp_path, "new")
    kinds = [(step.split()[0], Path(step.split()[1]).name) for step in disk.steps]
    away = kinds.index(("unlink", "config"))
    for name in ("weights", "config", "old"):
        assert kinds.index(("fsync", name)) < away
    synced = [step for step in disk.steps[:away] if step.startswith("fsync .") and step.endswith(".tmp")]
    assert len(synced) == 1


def test_a_new_folder_is_itself_on_the_disk(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    with disk.watched():
        save(tmp_path / "a" / "b", "new")
    assert {"fsync .", "fsync a", "fsync a/b"} <= set(disk.steps)
    assert max(i for i, step in enumerate(disk.steps) if step == "fsync a/b") > disk.steps.index("replace a/b/config")


def test_folders_that_were_made_for_a_save_that_fails_are_gone(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        assert folder.is_dir()
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"), written_together() as together:
        fail(together.stage(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


def test_errors_name_the_place_and_not_the_hidden_folder(tmp_path: Path) -> None:
    def fail(stage: Path, kind: str) -> None:
        if kind == "ours":
            raise CheckpointError(f"{stage / 'weights'} was not written.")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(stage / "weights"))

    for kind, text in {
        "ours": f"{tmp_path}/weights was not written.",
        "the system's": f"{tmp_path}/weights could not be written: No space left on device. ",
    }.items():
        with pytest.raises(CheckpointError) as raised, written_together() as together:
            fail(together.stage(tmp_path), kind)
        assert str(raised.value).startswith(text)
        assert ".tmp" not in str(raised.value)


def test_where_files_have_no_second_names_they_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    save(tmp_path, "old")
    before, replace = files_in(tmp_path), os.replace

    def fails(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "config" and Path(source).parent.name != "old":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(CheckpointError, match=r"config could not be written: Input/output error.*Nothing was changed"):
        save(tmp_path, "new")
    assert files_in(tmp_path, leavings=True) == before


def test_what_cannot_be_put_back_is_kept_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "old")
    replace, broken = os.replace, False

    def fails(source: Path, target: Path) -> None:
        nonlocal broken
        broken |= Path(target) == tmp_path / "config"
        if broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(CheckpointError, match=r"What was there could not be put back either: it is in .*\.tmp\."):
        save(tmp_path, "new")
    assert (tmp_path / "weights").read_text() == "new"
    left = {(path.read_text(), is_old) for path, is_old in left_in(tmp_path, "config")}
    assert left == {("new", False), ("old", True)}
    monkeypatch.undo()
    save(tmp_path, "third")
    assert files_in(tmp_path, leavings=True) == {"weights": b"third", "config": b"third"}


@pytest.mark.skipif(renames._renameat2() is None, reason="the system cannot")
def test_two_folders_or_files_exchange_their_names(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").touch()
    (tmp_path / "b").write_text("file")
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").read_text() == "file"
    assert (tmp_path / "b" / "one").exists()
    assert not exchange(tmp_path / "a", tmp_path / "nothing")
