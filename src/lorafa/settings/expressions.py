"""Regular expressions for names, as they stand in configs: tried in bounded time, whoever wrote them.

A config may come from anybody, and Python's ``re`` can take for ever on a short expression, or on many. So

* expressions that are texts ("layers.0.q_proj", "a|b", "^model\\.head$"; a dot stands for any character) are looked up,
  however many there are: nothing is compiled;
* others are limited in length and in what they repeat, and are tried by the package ``regex``, which reads them as
  ``re`` does and stops in time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lorafa.errors import ConfigError

LENGTH = 32_768
"""Characters of all expressions of one field together, those that are looked up apart."""
REPEATS = 10_000
"""The largest number of repeats, and the largest product of the least ones ("{3}"): the compiler writes them out."""
SECONDS, A_NAME = 0.5, 0.003
"""CPU seconds that the expressions of a field may take in all, and besides for each name."""
_DOT = "\0"  # in a text that is looked up: any character; no name holds it


@dataclass(frozen=True)
class Form:
    """How an expression is compared with a full name."""

    pattern: str
    """The whole expression, as PEFT writes it, with ``{}`` in the place of the given one."""
    full: bool
    """Whether it must reach to the end of the name."""
    parts: Callable[[str], Iterator[str]]
    """What of a name an expression that is a text must equal."""
    bars: bool
    """Whether alternatives ("a|b") are those of the given expression alone."""

    def text(self, expression: str) -> str:
        return self.pattern.replace("{}", expression, 1)


def _whole(name: str) -> Iterator[str]:
    yield name


def _ends(name: str) -> Iterator[str]:
    yield name
    for at, letter in enumerate(name):
        if letter == ".":
            yield name[at + 1 :]


def _inner(name: str) -> Iterator[str]:
    for end in _ends(name):
        yield end
        for at, letter in enumerate(end):
            if letter == ".":
                yield end[:at]


WHOLE = Form("{}", full=True, parts=_whole, bars=True)
"""``target_modules``: the whole name."""
END = Form(r"(.*\.)?({})$", full=False, parts=_ends, bars=True)
"""``rank_pattern``: the whole name, or its end after a dot."""
CALLED = Form(r"(.*\.)?{}", full=True, parts=_ends, bars=False)
"""``modules_to_save``: the same, for an expression in no brackets."""
INSIDE = Form(r"(^|.*\.){}($|\..*)", full=False, parts=_inner, bars=False)
"""``modules_to_save``: what lies in a module of that name."""
COUNTED = Form(r"(?:^|.*?\.){}\.(?P<index_of_layer>\d+)\.", full=False, parts=_whole, bars=False)
"""``layers_pattern``: the number after the name of a list."""
REPLACED = Form("{}", full=False, parts=_whole, bars=False)
"""``key_mapping``: what occurs anywhere in a name."""
_NEVER_TEXTS = (COUNTED, REPLACED)


class Expressions:
    """Expressions in their order, each compared in the same form."""

    def __init__(self, where: str, expressions: Sequence[str], form: Form) -> None:
        """Compile what has to be.

        Args:
            where: the field they stand in, for errors.

        Raises:
            ConfigError: one is no regular expression, or they are longer or repeat more than is tried.
        """
        self.where, self.form = where, form
        self._texts = _Texts()
        self._spent, self._seen = 0.0, 0
        self._found: dict[str, int | None] = {}
        others = [
            (index, expression)
            for index, expression in enumerate(expressions)
            if form in _NEVER_TEXTS or not self._texts.take(expression, index, form)
        ]
        # what is replaced is said by who calls, and by no file
        if form is not REPLACED and sum(len(expression) for _, expression in others) > LENGTH:
            raise ConfigError(
                f"{where} has regular expressions of more than {LENGTH} characters. Write names out "
                r"('model\.layers\.0\.q_proj', with | between them), which are looked up, or fewer expressions."
            )
        self._compiled = [(index, _compiled(where, expression, form)) for index, expression in others]

    def first(self, name: str) -> int | None:
        """Which expression is the first that fits a name; None where none does.

        Raises:
            ConfigError: they take too long.
        """
        if name not in self._found:
            self._seen += 1
            start = time.thread_time()
            try:
                self._found[name] = self._first(name, start)
            finally:
                self._spent += time.thread_time() - start
        return self._found[name]

    def _first(self, name: str, start: float) -> int | None:
        found = self._texts.first(self.form.parts(name), name, lambda: self._left(start))
        for index, compiled in self._compiled:
            if found is not None and index > found:
                break
            if self.match(compiled, name, self._left(start)) is not None:
                return index
        return found

    def index_after(self, name: str) -> int | None:
        """The number that stands after what fits first, in the form :data:`COUNTED`."""
        self._seen += 1
        start = time.thread_time()
        try:
            for _, compiled in self._compiled:
                if match := self.match(compiled, name, self._left(start)):
                    number = match["index_of_layer"]
                    return None if number is None else int(number)
        finally:
            self._spent += time.thread_time() - start
        return None

    def replace(self, name: str, replacements: Sequence[str]) -> str | None:
        """A name in which the first expression that occurs is replaced by its own text, wherever it does, in the form
        :data:`REPLACED`; None where none occurs.

        Raises:
            ConfigError: they take too long, or a text names a group that its expression has not.
        """
        import regex

        self._seen += 1
        start = time.thread_time()
        try:
            for index, compiled in self._compiled:
                try:
                    new, count = compiled.subn(replacements[index], name, timeout=self._left(start))
                except (regex.error, IndexError) as error:
                    raise ConfigError(
                        f"{self.where} has {replacements[index]!r:.200}, which is no replacement for "
                        f"{compiled.pattern!r:.200}: {error}. Name groups that it has, or escape the backslash."
                    ) from error
                except (TimeoutError, MemoryError) as error:
                    raise self._slow() from error
                if count:
                    return str(new)
        finally:
            self._spent += time.thread_time() - start
        return None

    def match(self, compiled: Any, name: str, seconds: float) -> Any:
        try:
            return (compiled.fullmatch if self.form.full else compiled.match)(name, timeout=seconds)
        except (TimeoutError, MemoryError) as error:
            raise self._slow() from error

    def _left(self, start: float) -> float:
        left = SECONDS + A_NAME * self._seen - self._spent - (time.thread_time() - start)
        if left <= 0:
            raise self._slow()
        return left

    def _slow(self) -> ConfigError:
        return ConfigError(
            f"{self.where} has regular expressions that take too long on the names of modules: more than {SECONDS} s "
            "and 3 ms for each name. Name the modules, or write simpler expressions: without repeats inside of repeats."
        )


class _Texts:
    """Expressions that are texts, with dots for any character: equal texts are found by a table."""

    def __init__(self) -> None:
        self._by_length: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}

    def take(self, expression: str, index: int, form: Form) -> bool:
        """Enter an expression; False if it is more than texts, and nothing was entered."""
        options = _texts_of(expression)
        if options is None or (not form.bars and any(mark in expression for mark in "|^$")):
            return False
        for text, whole in options:
            dots = tuple(at for at, letter in enumerate(text) if letter == _DOT)
            table = self._by_length.setdefault(len(text), {}).setdefault(dots, {})
            table.setdefault("^" + text if whole else text, index)
        return True

    def first(self, parts: Iterator[str], name: str, look: Callable[[], float]) -> int | None:
        """The least index of an expression that is one of the parts of a name.

        Args:
            look: raises where it has taken too long.
        """
        found: list[int] = []
        for part in parts:
            for count, (dots, table) in enumerate(self._by_length.get(len(part), {}).items()):
                text = part
                for at in dots:
                    text = text[:at] + _DOT + text[at + 1 :]
                keys = (text, "^" + text) if part is name or part == name else (text,)
                found += [table[key] for key in keys if key in table]
                if count % 100 == 99:
                    look()
        return min(found, default=None)


_TEXT = re.compile(r"(?:[\w.-]+|\\[^\w\s]|\\_)+")
_ESCAPED, _BARE_DOT = re.compile(r"\\(.)"), re.compile(r"(?<!\\)\.")


def _texts_of(expression: str) -> list[tuple[str, bool]] | None:
    r"""The alternatives of an expression that is texts alone, and whether each stands for a whole name ("^a"); else
    None. An escaped character is itself; a dot becomes one that stands for any."""
    options = []
    for option in re.split(r"(?<!\\)\|", expression) if "\\|" not in expression else [expression]:
        whole = option.startswith("^")
        text = option[1:] if whole else option
        text = text[:-1] if text.endswith("$") and not text.endswith("\\$") else text
        if not _TEXT.fullmatch(text):
            return None
        text = _DOT.join(_ESCAPED.sub(r"\1", part) for part in _BARE_DOT.split(text)) if "\\" in text else (
            text.replace(".", _DOT)
        )
        options.append((text, whole))
    return options


_REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")


def _compiled(where: str, expression: str, form: Form) -> Any:
    if not expression:
        raise ConfigError(f"{where} holds an empty text, which names no module. Name one, or pass None.")
    shown = expression if len(expression) < 200 else f"{expression[:200]}..."
    least = 1
    for repeat in _REPEAT.finditer(expression):
        counts = [int(count[:9] if len(count) < 9 else "9" * 9) for count in repeat.groups() if count]
        least *= max(min(counts, default=1), 1)
        if max(counts, default=0) > REPEATS or least > REPEATS:
            raise ConfigError(f"{where} has {shown!r}, which repeats more than {REPEATS} times. No name is as long.")
    if "[:" in expression or re.search(r"\{[^\d,}]", expression):
        raise ConfigError(f"{where} has {shown!r}, with '[:' or '{{' for what they are. Escape them by a backslash.")
    for text in dict.fromkeys((expression, form.text(expression))):
        try:
            re.compile(text)
        except (re.error, OverflowError, RecursionError, MemoryError) as error:
            raise ConfigError(
                f"{where} has {shown!r}, which is no regular expression: {error}. Close its brackets, or escape them."
            ) from error
    import regex

    try:
        return regex.compile(form.text(expression), regex.VERSION0)
    except (regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise ConfigError(
            f"{where} has {shown!r}, which the package regex does not take: {error}. Write it otherwise."
        ) from error


@lru_cache(maxsize=64)
def expressions(where: str, given: tuple[str, ...], form: Form) -> Expressions:
    """The expressions of a field, compiled once; raises ConfigError as :class:`Expressions`."""
    return Expressions(where, given, form)


def fits(where: str, expression: str, name: str, form: Form = WHOLE) -> bool:
    """Whether an expression fits a name.

    Raises:
        ConfigError: it is none, or takes too long.
    """
    return expressions(where, (expression,), form).first(name) is not None
