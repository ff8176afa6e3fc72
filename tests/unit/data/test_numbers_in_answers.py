"""The grammar of numbers in answers: what is read, as what, and what is no number."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafa.data.numbers import last_number, only_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        # separators
        ("1234", 1234), ("1,234", 1234), ("1,234,567.5", "1234567.5"), ("1 234", 1234), ("1 234 567", 1234567),
        ("1\N{NO-BREAK SPACE}234", 1234), ("1{,}234", 1234), (r"1\,234", 1234), ("12 000", 12000), ("5 000", 5000),
        ("3,5", "3.5"), ("1.234,56", "1234.56"), ("1.234.567", 1234567), ("1 234,5", "1234.5"), ("1.234", "1.234"),
        (".5", "0.5"), ("0.50", "0.5"), ("12.", 12), ("in 2020 234 people", 234), ("3 4", 4),
        # signs
        ("-5", -5), ("- 42", -42), ("\N{EN DASH}5", -5), ("\N{MINUS SIGN}5", -5), ("+5", 5), ("= -5", -5),
        ("= - 5", -5),
        ("-$5.25", "-5.25"), ("$-5", -5), ("- $5", -5), ("is -5", -5), ("10-3", 3), ("10 - 3", 3), ("x - 3", 3),
        ("(2)-3", 3), ("10 -3", -3), ("5\N{EN DASH}10", 10), ("20% - 5", 5), ("**-7**", -7), ("(-7)", -7),
        # exponents
        ("1e3", 1000), ("1.5E-2", "0.015"), ("2e+2", 200), ("10^3", 1000), ("2 * 10^3", 2000), ("2x10^3", 2000),
        (r"1.5 \times 10^{-2}", "0.015"), ("3\N{MULTIPLICATION SIGN}10^2", 300), ("-1e3", -1000),
        # fractions
        ("1/2", "1/2"), ("3 / 4", "3/4"), ("2 1/2", "5/2"), (r"\frac{1}{2}", "1/2"), (r"\dfrac{3}{4}", "3/4"),
        (r"\frac12", "1/2"), (r"2\frac{1}{2}", "5/2"), (r"-\frac{1}{2}", "-1/2"), (r"\frac{-1}{2}", "-1/2"),
        (r"\frac{1,000}{3}", "1000/3"), ("48/2 = 24", 24), ("-1/2", "-1/2"),
        # what does not count
        ("50%", 50), (r"50\%", 50), ("$1,000", 1000), (r"\$18", 18), ("€5", 5), (r"\boxed{42}", 42), ("72.", 72),
        (r"\boxed{\text{42 apples}}", 42), ("5kg", 5), ("**7**", 7), ("3 * 4 = 12", 12), ("x2 and 7", 7),
    ],
)  # fmt: skip
def test_a_number_is_read_as_what_it_says(text: str, number: str | int) -> None:
    assert last_number(text) == Fraction(number)


@pytest.mark.parametrize(
    "text",
    ["", "none", "1,23,4", "1,2345,678", "12:30", "1/2/3", "2^3", "1/0", "1e99999", "1.2.3", "x2", r"\frac{1}{x}",
     "5 then 1,23,4", "1.234.5"],
)  # fmt: skip
def test_figures_that_are_no_number_are_not_read_in_part(text: str) -> None:
    assert last_number(text) is None


@given(st.integers(-(10**12), 10**12))
def test_an_integer_is_itself_in_every_grouping(number: int) -> None:
    grouped = f"{number:,}"
    for written in (str(number), grouped, grouped.replace(",", " "), grouped.replace(",", "{,}"), f"${grouped}"):
        assert last_number(f"so it is {written}.") == number


@given(st.decimals(-(10**9), 10**9, allow_nan=False, places=3))
def test_decimals_are_exact(number: object) -> None:
    assert last_number(str(number)) == Fraction(str(number))


@given(st.text(alphabet="0123456789.,:/^eE+- x*$%\\{}frac", max_size=24))
def test_no_text_is_too_odd_to_be_read(text: str) -> None:
    found = last_number(text)
    assert found is None or isinstance(found, Fraction)


def test_a_gold_answer_is_one_number_and_nothing_else_in_figures() -> None:
    assert only_number("70,000 dollars") == 70000
    assert only_number("3 of 4") is None
    assert only_number("1,23,4") is None
    assert only_number("four") is None
