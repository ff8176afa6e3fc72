"""Versions are ordered as those who publish them order them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from lorafa.diagnosis.releases import is_older, release

NUMBERS = st.lists(st.integers(0, 30), min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))
ENDS = st.sampled_from(["", "", "+cpu", "+cu126", "rc1", ".dev3", "a0", "b2", "a0+git1234", ".post1"])
VERSIONS = st.builds(lambda numbers, end: numbers + end, NUMBERS, ENDS)


@given(VERSIONS, NUMBERS)
def test_a_version_is_older_than_a_release_as_the_standard_has_it(version: str, than: str) -> None:
    assert is_older(version, than) == (Version(version) < Version(than))


@given(st.text(max_size=12))
def test_what_is_no_version_is_older_than_nothing(text: str) -> None:
    assert not (is_older(text, "1.0") and release(text) is None)
    assert not is_older("1.0", text) or release(text) is not None


def test_numbers_are_numbers() -> None:
    assert is_older("2.9.1", "2.13")
    assert not is_older("2.13.0+cpu", "2.13")
    assert is_older("2.6.0a0+git5a3c", "2.6")
    assert release("unknown") is None
