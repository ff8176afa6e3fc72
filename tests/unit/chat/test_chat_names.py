"""What adapters are called: as they are told, or by their folders, and no two alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafa.chat.names import distinct, name_of, named
from lorafa.errors import ConfigError


def test_a_word_may_begin_with_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    assert named("german=runs/a") == ("german", "runs/a")
    assert named("german=runs/lr=1e-3") == ("german", "runs/lr=1e-3")
    assert named("runs/lr=1e-3") == (None, "runs/lr=1e-3")
    assert named("lr=1") == (None, "lr=1")
    assert named("owner/name") == (None, "owner/name")


@pytest.mark.parametrize("word", ["german=", "=runs/a", "two words=runs/a", "a\x1b=runs/a"])
def test_a_word_that_is_no_name_and_place_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="is to be name=path"):
        named(word)


def test_without_a_name_the_folder_has_one(tmp_path: Path) -> None:
    run = tmp_path / "first-run"
    for folder in (run / "adapter", tmp_path / "a b\x1b" / "adapter"):
        folder.mkdir(parents=True)
    (run / "config.yaml").touch()
    assert name_of(str(run)) == name_of(str(run / "adapter")) == "first-run"
    assert name_of(str(tmp_path / "a b\x1b")) == "a-b"
    assert name_of(str(tmp_path / "a b\x1b" / "adapter")) == "adapter"
    assert name_of("owner/my-lora") == "my-lora"


def test_names_that_are_made_get_a_number_and_names_that_are_given_stay(tmp_path: Path) -> None:
    given = [(None, "x/a"), ("a", "y"), (None, "z/a"), (None, "b")]
    assert distinct(given) == ["a-2", "a", "a-3", "b"]
    assert distinct([(None, "x/a")], ["a", "a-2"]) == ["a-3"]
    for twice in ([("a", "x"), ("a", "y")], [("b", "x")]):
        with pytest.raises(ConfigError, match="is given twice"):
            distinct(twice, ["b"])
