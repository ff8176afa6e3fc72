"""Hidden names of what is being written: held by their writer, and removed where nobody holds them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorafa.storage import leavings
from lorafa.storage.leavings import hidden, is_temporary, own_file, own_folder, remove_left_over

POSIX = pytest.mark.skipif(os.name == "nt", reason="there are no such locks")


def test_hidden_names_are_known_and_others_are_not() -> None:
    assert is_temporary(hidden(Path("a"), "file.json"))
    assert is_temporary(hidden(Path("a")))
    for name in ("file.json", ".hidden", ".file.tmp", f"{'0' * 32}.tmp", f".file.{'0' * 31}.tmp", f".f.{'0' * 32}.old"):
        assert not is_temporary(Path(name)), name


@POSIX
def test_what_is_left_over_is_removed_by_its_name_alone(tmp_path: Path) -> None:
    file, other, odd, several = (hidden(tmp_path, name) for name in ("a.json", "b.json", "a*", ""))
    for path in (file, other, odd, several):
        path.write_text("half")
    hidden(tmp_path, "a.json").mkdir()
    (tmp_path / ".a.json.tmp").write_text("of another program")
    remove_left_over(tmp_path, "a.json")
    assert {path.name for path in tmp_path.iterdir()} == {other.name, odd.name, several.name, ".a.json.tmp"}
    remove_left_over(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {other.name, odd.name, ".a.json.tmp"}
    remove_left_over(tmp_path, "*")
    assert [path.name for path in tmp_path.iterdir()] == [".a.json.tmp"]
    remove_left_over(tmp_path / "nowhere")


@POSIX
@pytest.mark.parametrize("own", [own_file, own_folder])
def test_what_is_held_stays_until_it_is_let_go(own: object, tmp_path: Path) -> None:
    with own(tmp_path, "a") as path:  # type: ignore[operator]
        remove_left_over(tmp_path, "a")
        assert path.exists()
    assert not path.exists()
    with own(tmp_path, "a") as path:  # type: ignore[operator]
        path.rename(tmp_path / "done")
    assert [one.name for one in tmp_path.iterdir()] == ["done"]


@POSIX
@pytest.mark.parametrize("own", [own_file, own_folder])
def test_who_is_taken_for_left_over_before_he_holds_it_begins_again(
    own: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = leavings.locked, list[Path]()

    def meanwhile(descriptor: int) -> bool | None:
        if not taken:
            monkeypatch.setattr(leavings, "locked", lock)
            taken.extend(tmp_path.iterdir())
            remove_left_over(tmp_path, "a")
        return lock(descriptor)

    monkeypatch.setattr(leavings, "locked", meanwhile)
    with own(tmp_path, "a") as path:  # type: ignore[operator]
        assert [path] == list(tmp_path.iterdir())
        assert taken
        assert taken[0] != path


@POSIX
def test_where_there_are_no_locks_nothing_is_taken_for_left_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leavings, "locked", lambda descriptor: None)
    left = hidden(tmp_path, "a")
    left.write_text("half")
    remove_left_over(tmp_path, "a")
    assert left.exists()
    with own_file(tmp_path, "a") as path:
        assert path.exists()


@POSIX
def test_a_link_to_elsewhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    hidden(tmp_path, "a").symlink_to(tmp_path / "precious")
    remove_left_over(tmp_path, "a")
    assert (tmp_path / "precious").is_dir()
