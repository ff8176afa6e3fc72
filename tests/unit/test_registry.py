"""A table of names: nothing is imported before it is asked for, and what was added can be taken out."""

from __future__ import annotations

import pytest

from lorafa.errors import ConfigError
from lorafa.registry import Registry


def table() -> Registry[object]:
    return Registry("thing", {"fraction": "fractions:Fraction", "missing": "no_such_module:it"})


def test_an_entry_is_imported_when_it_is_asked_for() -> None:
    from fractions import Fraction

    things = table()
    assert things.place("fraction") == "fractions:Fraction"
    assert things.get("fraction") is Fraction
    assert things.place("fraction") is None
    with pytest.raises(ModuleNotFoundError):
        things.get("missing")


def test_an_entry_of_ones_own_is_there_until_it_is_removed() -> None:
    things = table()
    things.add("own", 3)
    assert (things.get("own"), things.place("own")) == (3, None)
    things.remove("own")
    assert things.names() == ["fraction", "missing"]


def test_an_entry_for_a_while_is_gone_after_an_error_too() -> None:
    things = table()
    with things.added("own", 3) as own:
        assert things.get("own") is own

    def fail() -> None:
        with things.added("own", 4):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert "own" not in things


def test_wrong_names_are_answered() -> None:
    things = table()
    with pytest.raises(ConfigError, match=r"thing 'fraction' is already registered\. Choose another name"):
        things.add("fraction", 1)
    for ask in (things.get, things.remove, things.place):
        with pytest.raises(
            ConfigError, match=r"Unknown thing 'fracton'\. Did you mean 'fraction'\? Known: fraction, missing\."
        ):
            ask("fracton")
