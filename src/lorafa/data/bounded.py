"""Chat templates of others within bounds: of steps, of time, of what they write and of each value on the way.

A template is a program that comes with a model. The sandbox of jinja keeps it from the machine, and this one from its
time and memory besides: loops and calls are counted, and whatever can make a value larger looks first at how large that
would be. Else a template is what transformers takes it for: the same settings, filters and functions, of which those
that write text at random or for a page (``lipsum``, ``pprint``, ``urlize``) are left out.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

STEPS, SECONDS = 1_000_000, 2.0
"""Rounds of loops, calls and pieces of text of one conversation, and the CPU seconds they may take."""
SIZE, ELEMENT = 2**23, 32
"""Characters of the text, and of any value, in which each element of a list counts for as many as it takes bytes."""
MADE = 2**26
"""Bytes of all values that are made on the way."""
NUMBER, BITS = 2**20, 2**16
"""The largest whole number that a function takes, and the bits of the largest one that is calculated."""


class TooMuchError(TemplateRuntimeError):
    """A template goes on for too long, or makes too much."""


class _Budget(threading.local):
    """What is left to one conversation; each thread has its own."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._steps, self._written, self._made = 0, 0, 0
        self._until = time.thread_time() + SECONDS

    def step(self) -> None:
        self._steps += 1
        if self._steps > STEPS:
            raise TooMuchError(f"it takes more than {STEPS:,} steps")
        if self._steps % 32 == 0:
            self._look_at_the_clock()

    def _look_at_the_clock(self) -> None:
        if time.thread_time() > self._until:
            raise TooMuchError(f"it takes more than {SECONDS:g} seconds")

    def write(self, text: str) -> str:
        self.step()
        self._written += len(text)
        require_size(self._written)
        return text

    def made(self, value: Any) -> Any:
        """The value, if it is not too large in itself and with all that was made before."""
        container = _is_container(value)
        if container or isinstance(value, (str, bytes)):
            self._made += ELEMENT * len(value) if container else sys.getsizeof(value)
            if self._made > MADE:
                raise TooMuchError(f"it makes more than {MADE:,} bytes")
            if container and len(value) > 1000:
                self._look_at_the_clock()
            require_size(size_of(value))
        return value


def require_size(size: int) -> None:
    """Raises TooMuchError for a text or a list of that many characters."""
    if size > SIZE:
        raise TooMuchError(f"it makes a text or a list of more than {SIZE:,} characters")


_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_CONTAINERS: tuple[type, ...] = (list, tuple, dict, set, frozenset, *_VIEWS)


def _is_container(value: Any) -> bool:
    return isinstance(value, _CONTAINERS)


def size_of(value: Any) -> int:
    """How long a value is as a text, about; what stands in it twice counts twice. Stops where it is too much."""
    size, waiting = 0, [value]
    while waiting and size <= SIZE:
        one: Any = waiting.pop()
        if isinstance(one, (str, bytes)):
            size += len(one)
        elif _is_container(one):
            size += ELEMENT * (1 + len(one))
            waiting.extend(one)
            waiting.extend(one.values() if isinstance(one, dict) else ())
    return size


def _require_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > NUMBER:
            raise TooMuchError(f"it gives a function a number of more than {NUMBER:,}")


def _digits(text: str) -> int:
    """The numbers in a format, added up: widths and precisions."""
    return sum(int(number[:9]) for number in re.findall(r"\d+", text))


def _numbers_in(values: Any) -> int:
    """The largest whole number among values and in them, for a width that is taken from there."""
    inside = values.values() if isinstance(values, Mapping) else values if _is_container(values) else (values,)
    return max((abs(one) for one in inside if isinstance(one, int)), default=0)


def require_format(text: str, given: Any, mark: str) -> None:
    """Raises TooMuchError for a format whose fields are too wide or too many."""
    fields = text.count(mark)
    wide = _numbers_in(given) if "*" in text or "{" in text.partition(mark)[2] else 0
    require_size(len(text) + _digits(text) + fields * (size_of(given) + wide))


# ---- what can make a value larger ------------------------------------------------------------------------------------


def _times(left: Any, right: Any) -> None:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, int) and (isinstance(other, (str, bytes)) or _is_container(other)):
            require_size(max(0, one) * max(1, size_of(other)))
    if isinstance(left, int) and isinstance(right, int):
        _require_bits(left.bit_length() + right.bit_length())


def _power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _require_bits(left.bit_length() * max(0, right))


def _percent(left: Any, right: Any) -> None:
    if isinstance(left, str):
        require_format(left, right, "%")


def _require_bits(bits: int) -> None:
    if bits > BITS:
        raise TooMuchError(f"it calculates a number of more than {BITS:,} bits")


_OPERATIONS: Mapping[str, Callable[[Any, Any], None]] = {
    "*": _times, "**": _power, "%": _percent, "+": lambda left, right: None,
}  # fmt: skip


def _replaced(text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    require_size(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _joined(between: Any, values: Any) -> None:
    require_size(size_of(values) + len(str(between)) * len(values))


def _translated(text: str, table: Any = None, *_: Any) -> None:
    require_size(len(text) * max(1, size_of(table)))


def _indented(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    require_size((str(text).count("\n") + 1) * (len(width) if isinstance(width, str) else int(width)) + len(str(text)))


def _wrapped(text: Any, *given: Any, **named: Any) -> None:
    between = max((len(one) for one in (*given, *named.values()) if isinstance(one, str)), default=1)
    require_size(len(str(text)) * (1 + between))


def _as_json(value: Any, *given: Any, **named: Any) -> None:
    between = max((size_of(one) for one in (*given, *named.values()) if not isinstance(one, int)), default=0)
    width = max((int(one) for one in (*given, *named.values()) if isinstance(one, int)), default=0)
    require_size(size_of(value) * (1 + between + width))


_METHODS: Mapping[str, Callable[..., None]] = {
    "replace": _replaced, "join": _joined, "translate": _translated,
    "expandtabs": lambda text, width=8: require_size(len(text) + text.count("\t") * width),
}  # fmt: skip
_FILTERS: Mapping[str, Callable[..., None]] = {
    "replace": lambda context, *given, **named: _replaced(*given, **named),
    "join": lambda context, values, between="", *_, **__: _joined(between, values),
    "indent": _indented, "wordwrap": lambda environment, *given, **named: _wrapped(*given, **named),
    "tojson": _as_json, "format": lambda text, *given, **named: require_format(str(text), named or given, "%"),
}  # fmt: skip
_LEFT_OUT = ("pprint", "urlize")
_EACH, _CONCAT, _VALUE = "each_of", "all_of", "value_of"
"""Filters that stand around loops, parts of a text and lists."""


# ---- the environment -------------------------------------------------------------------------------------------------


class _Counted(NodeTransformer):
    """Puts a filter around what loops go over, what ``~`` puts together and what brackets hold; all text is written as
    a value is."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _EACH)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), _CONCAT)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return node if all(isinstance(item, nodes.Const) for item in node.items) else _filtered(node, _VALUE)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return node if node.ctx != "load" else _filtered(node, _VALUE)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _VALUE)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno)


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """``{% generation %}``: what the assistant says, for those who train on it by this mark."""

    tags = {"generation"}  # noqa: RUF012 - declared by jinja as it is

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Callable[[], str]) -> str:
        return caller()


class _Names(Namespace):
    """``namespace()``, whose names do not begin with an underscore, and which shows nothing of what it holds."""

    def __init__(*args: Any, **named: Any) -> None:  # so that a name may be "self"
        values = dict(*args[1:], **named)
        for name in values:
            _require_plain(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_plain(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _require_plain(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name with an underscore in front, found {name!r}")


class _Dict:
    """``dict(...)``, and nothing else of it."""

    def __call__(self, *given: Any, **named: Any) -> dict[Any, Any]:
        return dict(*given, **named)

    def fromkeys(self, *given: Any) -> dict[Any, Any]:
        return dict.fromkeys(*given)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of chat templates."""

    intercepted_binops = frozenset(_OPERATIONS)

    def __init__(self) -> None:
        self.budget = budget = _Budget()

        @pass_context  # which also keeps it from being called before there is a conversation
        def written(context: Context, value: Any) -> str:
            return budget.write(value if isinstance(value, str) else str(budget.made(value)))

        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=written
        )
        filters = {name: filter for name, filter in self.filters.items() if name not in _LEFT_OUT}
        self.filters = {name: self._bounded(name, each) for name, each in (filters | {"tojson": _to_json}).items()}
        self.filters |= {_EACH: self._each, _CONCAT: self._concat, _VALUE: budget.made}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form), "dict": _Dict(),
            "namespace": _Names,
        }  # fmt: skip

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Counted().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree  # type: ignore[no-any-return]

    def _each(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.budget.step()
            yield value

    def _concat(self, values: Sequence[Any]) -> Any:
        require_size(size_of(values))
        return self.budget.made("".join(map(str, values)))

    def _bounded(self, name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
        look = _FILTERS.get(name)

        @wraps(filter)  # with the mark that says whether it is given the context
        def bounded(*given: Any, **named: Any) -> Any:
            self.budget.step()
            _require_numbers((*given[1:], *named.values()))
            if name == "join" and not _is_container(given[1]) and not isinstance(given[1], str):
                given = (given[0], list(given[1]), *given[2:])  # whose length is asked for
            if look is not None:
                look(*given, **named)
            return self.budget.made(filter(*given, **named))

        return bounded

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.step()
        _OPERATIONS[operator](left, right)
        return self.budget.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *given: Any, **named: Any) -> Any:
        __self.budget.step()
        _require_numbers((*given, *named.values()))
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, (str, bytes)) and name in _METHODS:
            if name == "join" and given and not _is_container(given[0]) and not isinstance(given[0], str):
                given = (list(given[0]), *given[1:])
            _METHODS[name](owner, *given, **named)
        return __self.budget.made(super().call(__context, __obj, *given, **named))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        inner = super().wrap_str_format(value)
        if inner is None:
            return None

        @wraps(inner)
        def bounded(*given: Any, **named: Any) -> str:
            for each in (given[0] if value.__name__ == "format_map" and given else (), given, named):
                require_format(value.__self__, each, "{")
            return inner(*given, **named)

        return bounded


@lru_cache(maxsize=64)
def _compiled(text: str) -> tuple[BoundedEnvironment, Any]:
    environment = BoundedEnvironment()
    return environment, environment.from_string(text)


def render_within_bounds(text: str, values: Mapping[str, Any]) -> str:
    """What a template writes.

    Raises:
        TemplateError: it is none, raises it itself, or takes or makes too much.
        Exception: what Python raises for what it does: types, values, names, numbers, depth.
    """
    environment, template = _compiled(text)
    environment.budget.begin()
    written: str = template.render(values)
    return written
