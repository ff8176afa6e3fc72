r"""The number an answer ends in, read by one written grammar.

::

    number    = [sign] [currency] magnitude
    magnitude = [digits] fraction  |  written [exponent]  |  power
    fraction  = digits "/" digits  |  "\frac{" written "}{" written "}"
    exponent  = "e" [sign] digits  |  ("*" | "x" | "\times") power
    power     = "10^" [sign] digits
    written   = digits, in groups of three or in one, with or without decimals

Groups of three are parted by commas, spaces or LaTeX's ``{,}``, decimals by a point. The other habit, points between
groups and a comma before the decimals, is read where the first cannot be meant: ``3,5`` is 3.5 and ``1.234,56`` is
1234.56. Where both could be meant, ``1,234`` and ``1.234``, it is the first, in which the benchmarks are written. What
neither reads, ``1,23,4`` or ``12:30``, is no number: a part of it would be another one.

A minus that touches its number is a sign, unless something that can be subtracted from touches the minus (``10-3``);
one that stands apart (``- 42``) is a sign where nothing of that sort is before it. Percent signs and currencies do not
count; of LaTeX, ``\boxed``, ``\text``, ``\left`` and the like are read through.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction

_LARGEST_EXPONENT = 1000
"""A larger one is no answer, and takes the memory of a number with as many digits."""

_PLAIN = str.maketrans(
    dict.fromkeys("\N{MINUS SIGN}\N{EN DASH}\N{EM DASH}\N{NON-BREAKING HYPHEN}", "-")
    | dict.fromkeys("\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}\t", " ")
    | dict.fromkeys("\N{MULTIPLICATION SIGN}\N{DOT OPERATOR}\N{MIDDLE DOT}", "*")
)
_LATEX = (
    (re.compile(r"\{,\}|(?<=\d)\\[,!;: ](?=\d{3}(?!\d))"), ","),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\[dt]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:times|cdot)(?![a-zA-Z])"), "*"),
    (re.compile(r"\\(?!frac)[a-zA-Z]+"), " "),
    (re.compile(r"\^\s*\{\s*([-+]?\s*\d+)\s*\}"), r"^\1"),
)

_ENGLISH = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d+)?|\.\d+"
_OTHER = r"(?:\d{1,3}(?:\.\d{3})+|\d{1,3}(?: \d{3})+|\d+),\d+|\d{1,3}(?:\.\d{3}){2,}"
_POWER = r"10 ?\^ ?([-+]? ?\d+)"
_CANDIDATE = re.compile(
    r"(?<![\w\\])(?:\d+ ?)?\\frac *\{[^{}]*\} *\{[^{}]*\}"
    r"|(?<!\w)(?:\.\d|\d)"
    r"(?:[\d.,:/^]|(?<=\d)(?<!\d{4}) (?=\d{3}(?!\d))|(?<=\d) (?=\d+/\d)|(?<=\d) ?/ ?(?=\d)"
    r"|(?<=\d)[eE][-+]?(?=\d)|(?<=\d) ?[*x] ?(?=10 ?\^)|(?<=\d) (?=\^)|(?<=\^) ?[-+]? ?(?=\d))*"
)
"""All that may belong to one number, up to where it certainly ends."""
_SIGN = re.compile(r"([-+])( ?)(?:[$€£¥] ?)?$")
_SUBTRACTED_FROM = re.compile(r"[\w)\]}%]$")


def last_number(text: str) -> Fraction | None:
    """The last number in ``text``, exactly; None without one, or where the last figures are no number."""
    found = list(_numbers(text))
    return found[-1] if found else None


def only_number(text: str) -> Fraction | None:
    """The one number in ``text``; None where there is none, more than one, or figures that are no number."""
    found = list(_numbers(text))
    return found[0] if len(found) == 1 else None


def _numbers(text: str) -> Iterator[Fraction | None]:
    """Each number, from left to right; None for figures that are none."""
    text = text.translate(_PLAIN)
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    for match in _CANDIDATE.finditer(text):
        magnitude = _magnitude(match[0].rstrip(".,:/^ "))
        yield None if magnitude is None else _sign(text[: match.start()]) * magnitude


def _sign(before: str) -> int:
    match = _SIGN.search(before)
    if match is None or match[1] == "+":
        return 1
    left = before[: match.start()]
    return 1 if _SUBTRACTED_FROM.search(left.rstrip() if match[2] else left) else -1


def _magnitude(text: str) -> Fraction | None:
    for pattern, read in _READINGS:
        if match := re.fullmatch(pattern, text):
            return read(*match.groups())
    return None


def _english(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", ""))


def _other(text: str) -> Fraction:
    return _english(text.replace(".", "").replace(",", "."))


def _written(text: str) -> Fraction | None:
    for pattern, read in ((_ENGLISH, _english), (_OTHER, _other)):
        if re.fullmatch(pattern, text):
            return read(text)
    return None


def _ten_to(exponent: str) -> Fraction | None:
    power = int(exponent.replace(" ", ""))
    return Fraction(10) ** power if abs(power) <= _LARGEST_EXPONENT else None


def _scaled(text: str, exponent: str) -> Fraction | None:
    number, power = _written(text), _ten_to(exponent)
    return None if number is None or power is None else number * power


def _parts(whole: str | None, above: str, below: str) -> Fraction | None:
    negative, over, under = above.strip().startswith("-"), _written(above.strip(" -+")), _written(below.strip())
    if over is None or not under:
        return None
    part = -over / under if negative else over / under
    return part + int(whole or 0)


_READINGS: tuple[tuple[str, Callable[..., Fraction | None]], ...] = (
    (rf"({_ENGLISH}|{_OTHER})", _written),
    (r"(?:(\d+) ?)?\\frac *\{([^{}]*)\} *\{([^{}]*)\}", _parts),
    (r"(?:(\d+) )?(\d+) ?/ ?(\d+)", _parts),
    (rf"({_ENGLISH}|{_OTHER})[eE]([-+]?\d+)", _scaled),
    (rf"({_ENGLISH}|{_OTHER}) ?[*x] ?{_POWER}", _scaled),
    (_POWER, _ten_to),
)
"""How a candidate is read: the first pattern that is all of it."""
