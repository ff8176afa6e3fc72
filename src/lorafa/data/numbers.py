r"""The number an answer ends in, read by one written grammar.

::

    number    = [sign] [currency] magnitude
    magnitude = [digits] fraction  |  written [exponent]  |  power
    fraction  = digits "/" digits  |  "\frac{" written "}{" written "}"
    exponent  = "e" [sign] digits  |  ("*" | "x" | "\times") power
    power     = "10^" [sign] digits
    written   = digits, in groups of three or in one, with or without decimals

Groups of three are parted by commas, spaces, apostrophes or LaTeX's ``{,}``, decimals by a point; the first group of
several does not begin with a zero. The other habit, points between groups and a comma before the decimals, is read
where the first cannot be meant: ``3,5`` is 3.5 and ``1.234,56`` is 1234.56. Where both could be meant, ``1,234`` and
``1.234``, it is the first, in which the benchmarks are written; ``0,125`` is neither for certain, and no number.

A number is read whole or not at all, since a part of it would be another one: ``1,23,4`` and ``12:30`` are none. The
same holds for a number that is a part of something larger: an operand of a product, a quotient or a power (``5x10``,
``2^3``, ``x/2``), an argument (``\sqrt{16}``, ``f(2)``), a factor of a constant (``2\pi``), one place of a pair, a
figure with an index or a factorial behind it. A wrong number is worse than none. Terms of a sum are numbers, each by
itself, and letters behind a number are its unit.

A minus that touches its number is a sign, unless something that can be subtracted from touches the minus (``10-3``);
one that stands apart (``- 42``) is a sign where nothing of that sort is before it. It holds for a number in brackets as
well, ``-(3)``. Percent signs and currencies do not count. Of LaTeX, words that say how a thing looks (``\boxed``,
``\text``, ``\left``) are read through; any other is something larger.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from fractions import Fraction

_LARGEST_EXPONENT = 1000
"""A larger one is no answer, and takes the memory of a number with as many digits."""
_NEAR = 100
"""Characters before a number that are looked at, at most."""

_OPAQUE = "\0"
"""Stands for what does something to the number beside it: a function, a constant, a root."""
_LOOKS = frozenset({
    "boxed", "fbox", "mbox", "text", "textbf", "textit", "textrm", "textsf", "texttt", "mathrm", "mathbf",
    "mathit", "mathsf", "mathtt", "mathnormal", "bf", "rm", "left", "right", "big", "Big", "bigl", "bigr", "Bigl",
    "Bigr", "displaystyle", "textstyle", "quad", "qquad", "underline",
})  # fmt: skip
"""LaTeX's words that say how a thing looks."""
_RELATIONS = frozenset({
    "approx", "simeq", "sim", "cong", "equiv", "Rightarrow", "Longrightarrow", "rightarrow", "to", "implies",
    "iff", "Leftrightarrow", "le", "leq", "ge", "geq", "lt", "gt", "ne", "neq", "therefore", "because",
})  # fmt: skip
"""LaTeX's words with which something else begins, as with an equals sign."""

_PLAIN = str.maketrans(
    dict.fromkeys("\N{MINUS SIGN}\N{EN DASH}\N{EM DASH}\N{NON-BREAKING HYPHEN}", "-")
    | dict.fromkeys("\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}\t", " ")
    | dict.fromkeys("\N{MULTIPLICATION SIGN}\N{DOT OPERATOR}\N{MIDDLE DOT}", "*")
    | dict.fromkeys("\N{FRACTION SLASH}\N{DIVISION SLASH}", "/")
    | dict.fromkeys("\N{SQUARE ROOT}\N{CUBE ROOT}\N{FOURTH ROOT}\N{PLUS-MINUS SIGN}\N{MINUS-OR-PLUS SIGN}", _OPAQUE)
    | dict.fromkeys("\N{DIVISION SIGN}\N{INFINITY}\N{GREEK SMALL LETTER PI}", _OPAQUE)
    | {"\N{RIGHT SINGLE QUOTATION MARK}": "'", "\N{HORIZONTAL ELLIPSIS}": "...", _OPAQUE: " "}
)


def _word(match: re.Match[str]) -> str:
    return " " if match[1] in _LOOKS else "=" if match[1] in _RELATIONS else _OPAQUE


def _decomposed(match: re.Match[str]) -> str:
    """``²`` is ``^2``, and ``½`` is ``1/2``."""
    text = unicodedata.normalize("NFKC", match[0]).translate(_PLAIN).strip()
    if "/" not in text:
        return f"^{text}"
    mixed = match.string[match.start() - 1 : match.start()].isdigit()
    return f" {text}" if mixed else text


_LENGTH = r"(?<![^\W\d_])(?:[kcdm]m|ft|in|yd|mi|units?|inches|feet|met(?:er|re)s?)|(?<=[ {])m"
"""Units whose squares and cubes are units too; a metre does not touch the figures, as ``5m^2`` may be algebra."""
_REPLACED: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r" ?[\u00bc-\u00be\u2150-\u215e](?!\d)|[\u00b9\u00b2\u00b3\u2070\u2074-\u207b]+"), _decomposed),
    (re.compile(r"\{,\}|(?<=\d)\\[,!;: ](?=\d{3}(?!\d))"), ","),
    (re.compile(r"\\([$%()\[\]{}])"), r"\1"),
    (re.compile(r"\\[,!;: ]"), " "),
    (re.compile(r"\^ *\{? *\\circ(?![a-zA-Z])(?: *\})?|\\(?:degree|circ)(?![a-zA-Z])"), "\N{DEGREE SIGN}"),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\[dt]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:times|cdot)(?![a-zA-Z])"), "*"),
    (re.compile(r"\\(?!frac(?![a-zA-Z]))([a-zA-Z]+)"), _word),
    (re.compile(r"\^\s*\{\s*([-+]?\s*\d+)\s*\}(?!\d)"), r"^\1"),
    (re.compile(rf"((?:{_LENGTH})\}}?) ?\^[23](?!\d)"), r"\1"),
)
"""What is written in another way, and the way in which it is read."""

_ENGLISH = r"(?:[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+|(?:'\d{3})+)|\d+)(?:\.\d+)?|\.\d+"
_OTHER = (
    r"(?:[1-9]\d{0,2}(?:(?:\.\d{3})+|(?: \d{3})+)|0(?!,\d{3}(?!\d))|[1-9]\d*),\d+"
    r"|[1-9]\d{0,2}(?:\.\d{3}){2,}"
)
_POWER = r"10 ?\^ ?([-+]? ?\d+)"
_CANDIDATE = re.compile(
    r"(?<![\w\\])(?:\d+ ?)?\\frac *\{[^{}]*\} *\{[^{}]*\}"
    r"|(?<!\w)(?:\.\d|\d)"
    r"(?:[\d.,:/^]|(?<=\d)'(?=\d)|(?<=\d)(?<!\d{4}) (?=\d{3}(?!\d))|(?<=\d) (?=\d+/\d)|(?<=\d) ?/ ?(?=\d)"
    r"|(?<=\d)[eE][-+]?(?=\d)|(?<=\d) ?[*x] ?(?=10 ?\^)|(?<=\d) (?=\^)|(?<=\^) ?[-+]? ?(?=\d))*"
)
"""All that may belong to one number, up to where it certainly ends."""
_SIGN = re.compile(r"([-+])([ ({]*)(?:[$€£¥] ?)?$")
_SUBTRACTED_FROM = re.compile(r"[\w)\]}%]$")

_PART_OF = re.compile(
    r"(?:"
    rf"{_OPAQUE}[ (\[{{]*"  # what is done to it
    r"|[\^_][ ({]*"  # an exponent, an index
    r"|/ ?[({]*"  # what is divided by
    r"|[\d)\]}%](?:\*\*?| \* |x| x )[({]*"  # a factor
    r"|[\]}] ?\{"  # the second argument
    r"|\w\("  # that of a function, or a factor
    r"|[(\[{][-+\d.,/ ]*\d ?, ?"  # the second place of a pair
    r"|\|(?=[-+])|[-+][ ({]*(?=[-+])"  # a sign that is taken away
    r"|\\"
    r")(?:[-+] ?)?(?:[$€£¥] ?)?$"
)
"""What stands before a number that is a part of something larger."""
_GOES_ON = re.compile(rf"\d|!(?!=)| ?\^|_[\w{{(]|'\d|[^\W\d_]+\d|/ ?[-+({{\[{_OPAQUE}]| ?[({{]*{_OPAQUE}")
"""What stands behind such a number."""
_OPENED, _CLOSED = re.compile(r"[(\[{] ?[-+]? ?$"), re.compile(r" ?[)\]}]")
_BESIDE = re.compile(r"""(?:[^\W\d_]{2,}(?:[-/'][^\W\d_]+)*|[\s.,:;?%$€£¥°"'`\u2018\u201c\u201d()\[\]{}=~≈*-])*""")
"""What may stand before and behind a gold answer: words and signs, no operator, and no letter alone, which stands for
a number."""


def last_number(text: str) -> Fraction | None:
    """The last number in ``text``, exactly; None without one, or where the last figures are no number."""
    found = [number for _, number in _numbers(_plain(text))]
    return found[-1] if found else None


def only_number(text: str) -> Fraction | None:
    """The number that is all of ``text`` but for words and signs beside it; None where there is none, more than one,
    figures that are no number, or anything else that is reckoned with."""
    text = _plain(text)
    found = list(_numbers(text))
    if len(found) != 1:
        return None
    (begin, end), number = found[0]
    alone = _BESIDE.fullmatch(text[:begin].rstrip("+")) and _BESIDE.fullmatch(text[end:])
    return number if alone else None


def _plain(text: str) -> str:
    text = text.translate(_PLAIN)
    for pattern, plain in _REPLACED:
        text = pattern.sub(plain, text)
    return text


def _numbers(text: str) -> Iterator[tuple[tuple[int, int], Fraction | None]]:
    """Each number with where it stands, from left to right; None for figures that are none."""
    for match in _CANDIDATE.finditer(text):
        figures = match[0].rstrip(".,:/ ")
        begin, end = match.start(), match.start() + len(figures)
        before, behind = text[max(0, begin - _NEAR) : begin], text[end : end + _NEAR]
        whole = not (_PART_OF.search(before) or _goes_on(figures, behind) or _is_pair(before, figures, behind))
        magnitude = _magnitude(figures) if whole else None
        yield (begin, end), None if magnitude is None else _sign(before) * magnitude


def _goes_on(figures: str, behind: str) -> bool:
    """Whether a number goes on behind its figures: with an operator, another figure, or decimals without an end."""
    return bool(
        _GOES_ON.match(behind) or behind[:1].isnumeric() or (behind.startswith("..") and re.search(r"\.\d", figures))
    )


def _is_pair(before: str, figures: str, behind: str) -> bool:
    """``(1,2)``, which could be a number, were it not in brackets."""
    enclosed = _OPENED.search(before) and _CLOSED.match(behind)
    return bool(enclosed) and "," in figures and not re.fullmatch(_ENGLISH, figures)


def _sign(before: str) -> int:
    match = _SIGN.search(before)
    if match is None or match[1] == "+":
        return 1
    left = before[: match.start()]
    apart = match[2].startswith(" ")
    return 1 if _SUBTRACTED_FROM.search(left.rstrip() if apart else left) else -1


def _magnitude(text: str) -> Fraction | None:
    for pattern, read in _READINGS:
        if match := re.fullmatch(pattern, text):
            return read(*match.groups())
    return None


def _english(text: str) -> Fraction:
    return Fraction(re.sub("[, ']", "", text))


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
