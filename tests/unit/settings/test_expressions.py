"""Regular expressions of configs: with the meaning they have in ``re``, and in bounded time."""

from __future__ import annotations

import re
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafa.errors import ConfigError
from lorafa.settings.expressions import CALLED, COUNTED, END, INSIDE, LENGTH, REPLACED, WHOLE, Expressions, Form, fits

NAMES = ["a", "b", "a.b", "b.a", "a.b.c", "a.c.b", "axb", "a_b", "model.layers.1.q_proj", "model.layers.11.q_proj"]
PATTERNS = [
    "a", "a.b", r"a\.b", "a|b", r"^a\.b", "^b", "a$", "^a$", ".*", r".*\.b", r"(a|b)\.(?:b|c)",
    r"model\.layers\.\d+\..*",
    r".*layers\.(1|2)\.q_proj", "(?!a).*", r"(?=.*b).*", r"a\|b", "a|^b", r".*[^\W\d]", r"\w+", "a_b", r"a\_b", "a.?b",
    r"a\\.b",
    r"(.)\.?\1*", r"a{1,2}.b", r"model.layers.1.q_proj", r"[ab]\.b", "a|", "(?:a)", r"a\-b",
]  # fmt: skip


def plainly(pattern: str, name: str, form: Form) -> bool:
    text = form.pattern.replace("{}", pattern)
    return (re.fullmatch(text, name) if form.full else re.match(text, name)) is not None


@pytest.mark.parametrize("form", [WHOLE, END, CALLED, INSIDE], ids=["whole", "end", "called", "inside"])
def test_expressions_mean_what_they_mean_in_re(form: Form) -> None:
    for pattern in PATTERNS:
        for name in NAMES:
            assert fits("x", pattern, name, form) is plainly(pattern, name, form), (pattern, name)


@given(
    st.lists(st.text(r"ab.\|^$_*?+()", min_size=1, max_size=6), min_size=1, max_size=4),
    st.lists(st.text("ab._", min_size=1, max_size=6), min_size=1, max_size=4),
    st.sampled_from([WHOLE, END, CALLED, INSIDE]),
)
@settings(max_examples=300, deadline=None)
def test_the_first_of_several_is_that_of_re(patterns: list[str], names: list[str], form: Form) -> None:
    try:
        for pattern in patterns:
            re.compile(pattern), re.compile(form.pattern.replace("{}", pattern))
    except re.error:
        with pytest.raises(ConfigError, match="regular expression"):
            Expressions("x", patterns, form)
        return
    made = Expressions("x", patterns, form)
    for name in names:
        expected = next((i for i, pattern in enumerate(patterns) if plainly(pattern, name, form)), None)
        assert made.first(name) == expected, (patterns, name)


SLOW = [
    r"(([a-z_.0-9])+)+[XY]", "(a|a|[a-z_.0-9]|.)" * 40 + "[XY]", r"((.*?)*?)*?[XY]",
    r"(?P<a>.*)(?P<b>.*)(?P<c>.*)(.*)(?P=a)(?P=b)(?P=c)[XY]",
    r"((((((.{0,50}){0,50}){0,50}){0,50}){0,50}){0,50})[XY]", r"(?!((.|.)+)+[XY])(?!((.|.)+)+[XY])((.|.)+)+[XY]",
]  # fmt: skip


@pytest.mark.parametrize("pattern", SLOW)
@pytest.mark.parametrize("form", [WHOLE, END, INSIDE], ids=["whole", "end", "inside"])
def test_no_expression_takes_long(pattern: str, form: Form) -> None:
    start, made = time.thread_time(), Expressions("target_modules", [pattern], form)
    with suppress(ConfigError):
        for number in range(100):
            made.first(f"base_model.model.model.layers.{number}.self_attn.q_proj" * 3)
    assert time.thread_time() - start < 1.5


def test_what_takes_too_long_is_said_with_the_field() -> None:
    with pytest.raises(ConfigError, match="target_modules has regular expressions that take too long on the names"):
        Expressions("target_modules", [r"((.*?)*?)*?[XY]"], WHOLE).first("layers.1." * 20)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", "no regular expression: missing"),
        ("a{99999999999}", "repeats more than 10000"),
        ("a{4000000000}", "repeats more than 10000"),
        ("((a{100}){100}){100}", "repeats more than 10000"),
        ("(" * 5000 + ")" * 5000, "no regular expression: maximum recursion"),
        ("", "empty text"),
        ("[a-z]+" * LENGTH, "more than 32768 characters"),
        ("a{e<=3}", "Escape them"),
        ("[[:alpha:]]+", "Escape them"),
    ],
)
def test_what_cannot_be_tried_is_refused_with_the_field(pattern: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Expressions("rank_pattern", [pattern], END)
    assert said in str(caught.value)
    assert str(caught.value).startswith("rank_pattern ")


def test_thirty_thousand_names_are_looked_up_and_as_many_expressions_refused() -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(30_000)]
    escaped = [re.escape(name) for name in names]
    start = time.thread_time()
    made = Expressions("rank_pattern", [f"^{name}" for name in escaped], END)
    assert [made.first(name) for name in names[::100]] == list(range(0, 30_000, 100))
    whole = Expressions("target_modules", ["|".join(escaped)], WHOLE)
    assert whole.first(names[-1]) == 0
    assert whole.first("q_proj") is None
    with pytest.raises(ConfigError, match="more than 32768 characters"):
        Expressions("rank_pattern", [rf".*layers\.{i}\..*q_proj" for i in range(30_000)], END)
    assert time.thread_time() - start < 2


def test_the_number_of_a_layer_is_found_behind_its_list_whatever_groups_the_pattern_has() -> None:
    made = Expressions("layers_pattern", ["(blocks|layers)"], COUNTED)
    assert made.index_after("model.layers.12.q_proj") == 12
    assert made.index_after("model.heads.12.q_proj") is None
    assert Expressions("layers_pattern", ["a|layers"], COUNTED).index_after("a.1.x") is None


# ---- replacing


def replaced_by_re(name: str, mapping: dict[str, str]) -> str | None:
    found = (re.subn(pattern, new, name) for pattern, new in mapping.items())
    return next((new for new, count in found if count), None)


@given(
    st.dictionaries(
        st.sampled_from([*PATTERNS, "b", "^", r"layers\.(\d+)"]), st.sampled_from(["", "x", "a.b"]), max_size=4
    ),
    st.text("ab._1", max_size=8),
)
@settings(max_examples=300, deadline=None)
def test_what_is_replaced_is_what_re_replaces(mapping: dict[str, str], name: str) -> None:
    made = Expressions("x", list(mapping), REPLACED)
    assert made.replace(name, list(mapping.values())) == replaced_by_re(name, mapping)


@pytest.mark.parametrize("text", [r"\1.\2", r"\g<2>-\g<1>", r"\\", r"\g<name>"])
def test_groups_stand_for_what_they_have_found(text: str) -> None:
    pattern = r"(?P<name>\w+)\.(\w+)"
    assert Expressions("x", [pattern], REPLACED).replace("a.b.c", [text]) == re.sub(pattern, text, "a.b.c")


@pytest.mark.parametrize("text", [r"\3", r"\g<other>", r"\g<1"])
def test_a_group_that_is_not_there_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"x has .* which is no replacement for '\(a\)\(b\)'.*Name groups that it"):
        Expressions("x", ["(a)(b)"], REPLACED).replace("ab", [text])
