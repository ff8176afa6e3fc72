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
        ("1'234", 1234), ("1\N{RIGHT SINGLE QUOTATION MARK}234'567.5", "1234567.5"), ("'5'", 5), ("0,5", "0.5"),
        ("(1,234)", 1234), ("3,5", "3.5"), ("1.234,56", "1234.56"),
        ("1.234.567", 1234567), ("1 234,5", "1234.5"), ("1.234", "1.234"),
        (".5", "0.5"), ("0.50", "0.5"), ("12.", 12), ("in 2020 234 people", 234), ("3 4", 4),
        # signs
        ("-5", -5), ("- 42", -42), ("\N{EN DASH}5", -5), ("\N{MINUS SIGN}5", -5), ("+5", 5), ("= -5", -5),
        ("= - 5", -5),
        ("-$5.25", "-5.25"), ("$-5", -5), ("- $5", -5), ("is -5", -5), ("10-3", 3), ("10 - 3", 3), ("x - 3", 3),
        ("(2)-3", 3), ("10 -3", -3), ("5\N{EN DASH}10", 10), ("20% - 5", 5), ("**-7**", -7), ("(-7)", -7),
        # exponents
        ("1e3", 1000), ("1.5E-2", "0.015"), ("2e+2", 200), ("10^3", 1000), ("2 * 10^3", 2000), ("2x10^3", 2000),
        (r"1.5 \times 10^{-2}", "0.015"), ("10\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT THREE}", "1/1000"),
        ("3\N{MULTIPLICATION SIGN}10^2", 300), ("-1e3", -1000),
        # fractions
        ("1/2", "1/2"), ("3 / 4", "3/4"), ("2 1/2", "5/2"), (r"\frac{1}{2}", "1/2"), (r"\dfrac{3}{4}", "3/4"),
        (r"\frac12", "1/2"), (r"2\frac{1}{2}", "5/2"), (r"-\frac{1}{2}", "-1/2"), (r"\frac{-1}{2}", "-1/2"),
        (r"\frac{1,000}{3}", "1000/3"), ("3\N{VULGAR FRACTION ONE HALF}", "7/2"),
        ("-\N{VULGAR FRACTION ONE QUARTER}", "-1/4"),
        ("1\N{FRACTION SLASH}2", "1/2"), ("48/2 = 24", 24), ("-1/2", "-1/2"),
        # what does not count
        ("50%", 50), (r"50\%", 50), ("$1,000", 1000), (r"\$18", 18), ("€5", 5), (r"\boxed{42}", 42), ("72.", 72),
        ("25 m\N{SUPERSCRIPT TWO}", 25), (r"25\text{ cm}^2", 25), ("12 ft^3", 12), (r"90^\circ", 90), ("$12/hour", 12),
        (r"\( 42 \)", 42), (r"x \approx 2.5", "2.5"), ("Total (in dollars) **7**", 7), ("x\N{SUPERSCRIPT TWO} = 9", 9),
        ("6 \N{DIVISION SIGN} 2 = 3", 3), ("x != 3", 3),
        (r"\boxed{\text{42 apples}}", 42), ("5kg", 5), ("**7**", 7), ("3 * 4 = 12", 12), ("x2 and 7", 7),
    ],
)  # fmt: skip
def test_a_number_is_read_as_what_it_says(text: str, number: str | int) -> None:
    assert last_number(text) == Fraction(number)


@pytest.mark.parametrize(
    "text",
    ["", "none", "1,23,4", "1,2345,678", "12:30", "1/2/3", "2^3", "1/0", "1e99999", "1.2.3", "x2", r"\frac{1}{x}",
     "5 then 1,23,4", "1.234.5",
     # groups that no habit writes
     "0,125", "0,005", "01,234", "0,125,000", "0 125", "0.125.000", "5'10", "5_000",
     # a part of something larger
     "5\N{SUPERSCRIPT TWO}", "x^2", "x^{2}", "2^x", "2^(3)", "25x^2", "5x10", "5 x 10", "3*4", "3 * 4", "2(3)", "2**3",
     "6\N{DIVISION SIGN}2", "x/2", "10/-x2", "4!", "1011_2", "1011_{2}", "0x1F", "\N{VULGAR FRACTION ONE HALF}5",
     r"\sqrt{16}", r"\sqrt16", r"\sqrt[3]{8}", "\N{SQUARE ROOT}16", "sqrt(16)", "f(2)", r"2\pi",
     "2\N{GREEK SMALL LETTER PI}",
     r"2 \pi", r"\log 2", r"\log -2", r"\frac{\sqrt3}{2}", r"\frac{\sqrt{3}}{2}", r"\frac{1}{2}\pi", r"0.\overline{3}",
     "0.333...", "\N{PLUS-MINUS SIGN}5", "|-5|", "-(-3)", "so -- 5", "5\N{CJK UNIFIED IDEOGRAPH-5343}",
     # pairs
     "(1,2)", "(1, 2)", "(1, -2)", "(-1,2)", "[1,2]", r"\{1, 2\}", r"\left(1,2\right)", "(1/2, 3)"],
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


@given(st.text(alphabet="0123456789.,:/^eE+- x*$%\\{}frac()'!_\u00b2\u00bd\u03c0", max_size=24))
def test_no_text_is_too_odd_to_be_read(text: str) -> None:
    found = last_number(text)
    assert found is None or isinstance(found, Fraction)


def test_a_gold_answer_is_one_number_and_nothing_else_in_figures() -> None:
    assert only_number("70,000 dollars") == 70000
    assert only_number("\\boxed{-\\frac{1}{2}}") == Fraction(-1, 2)
    assert only_number("**5** km/h") == 5
    assert only_number("+5") == 5
    assert only_number("3 of 4") is None
    assert only_number("1,23,4") is None
    assert only_number("four") is None


@pytest.mark.parametrize(
    "text",
    ["(1,2)", "5x10", "1011_2", "2x", "x = 5", "x2 and 5", "5 + rate", "> 5", "3 - x", "H2O 5", r"2\pi",
     "5\N{SUPERSCRIPT TWO}", r"0.\overline{3}", "5 or x^2", "10 - 3", "4!", "12:30 5"],
)  # fmt: skip
def test_a_gold_answer_has_nothing_beside_it_that_is_reckoned_with(text: str) -> None:
    assert only_number(text) is None


NUMBERS = st.one_of(
    st.integers(0, 10**9).map(str),
    st.integers(1000, 10**9).map(lambda number: f"{number:,}"),
    st.decimals(0, 10**6, allow_nan=False, places=2).map(lambda number: f"{number:f}"),
)


@given(NUMBERS, st.sampled_from(["{}!", "7{}^2", "{}_2", "{}\\pi", "\\sqrt{{{}}}", "x^{}", "x/{}", "f({})",
                                 "({}, {})", "3*{}", "\\ln {}", "7{}\u00b2", "\u221a{}", "\u00b1{}", "{}:{}",
                                 "3({})"]))  # fmt: skip
def test_no_number_is_read_out_of_something_larger(number: str, larger: str) -> None:
    assert last_number(larger.format(number, number)) is None
    assert only_number(larger.format(number, number)) is None


@given(
    NUMBERS,
    st.sampled_from(["{}", "-{}", "${}", "\\boxed{{{}}}", "**{}**", "{}%", "{} apples", "it is {}.", "= {}", "({})"]),
)
def test_a_number_alone_is_the_last_and_the_only_one(number: str, around: str) -> None:
    found = last_number(around.format(number))
    assert found is not None
    assert abs(found) == Fraction(number.replace(",", ""))
    assert only_number(around.format(number)) == found
