"""Where A and B start: the values of ``init_lora_weights`` and what they mean."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafa.errors import ConfigError, did_you_mean
from lorafa.registry import Registry

if TYPE_CHECKING:
    from lorafa.initializers.base import Initializer

INITIALIZERS: Registry[Initializer] = Registry(
    "initializer",
    {
        "kaiming": "lorafa.initializers.kaiming:kaiming",
        "random": "lorafa.initializers.random:random",
        "gaussian": "lorafa.initializers.gaussian:gaussian",
        "orthogonal": "lorafa.initializers.orthogonal:orthogonal",
        "lora_ga": "lorafa.initializers.lora_ga:lora_ga",
        "lora_ga_peft": "lorafa.initializers.lora_ga:lora_ga_peft",
        "lora_sb": "lorafa.initializers.lora_sb:lora_sb",
        "lora_one": "lorafa.initializers.lora_one:lora_one",
        "functional": "lorafa.initializers.lora_one:functional",
        "gora": "lorafa.initializers.gora:gora",
        "eva": "lorafa.initializers.eva:eva",
        "corda": "lorafa.initializers.corda:corda",
        "lora_null": "lorafa.initializers.lora_null:lora_null",
        "pissa": "lorafa.initializers.pissa:pissa",
        "kasa": "lorafa.initializers.kasa:kasa",
        "goat": "lorafa.initializers.goat:goat",
        "loftq": "lorafa.initializers.loftq:loftq",
        "mica": "lorafa.initializers.mica:mica",
        "milora": "lorafa.initializers.milora:milora",
        "olora": "lorafa.initializers.olora:olora",
    },
)


@dataclass(frozen=True)
class Start:
    """What a value of ``init_lora_weights`` means."""

    name: str
    """Its line in INITIALIZERS."""
    value: bool | str
    """The value in its one form: lower case, or True or False where that means the same."""
    number: int | None = None
    """The number in the value: 4 for "pissa_niter_4"."""

    @property
    def initializer(self) -> Initializer:
        return INITIALIZERS.get(self.name)


def find_start(value: object) -> Start | None:
    """The start that a value of ``init_lora_weights`` means, written in any case of letters; None if there is none."""
    if not isinstance(value, (bool, str)):
        return None
    for spelling, name in _spellings():
        fits, number = _match(value, spelling)
        if fits:
            found = Start(name, value.lower() if isinstance(value, str) else value, number)
            switches = (also for also in found.initializer.also if isinstance(also, bool))
            return next((Start(name, switch) for switch in switches), found)
    return None


def known_start(value: object) -> Start:
    """The start that a value of ``init_lora_weights`` means.

    Raises:
        ConfigError: there is no such start.
    """
    start = find_start(value)
    if start is None:
        known = start_values()
        raise ConfigError(
            f"init_lora_weights has no value {value!r}.{did_you_mean(str(value), map(str, known))} Pass "
            f"{', '.join(map(repr, known))}; where there is an N put a number."
        )
    return start


def start_values() -> list[bool | str]:
    """Every value ``init_lora_weights`` can have, True and False first."""
    values = {spelling for spelling, _ in _spellings()}
    return sorted(values, key=lambda value: (isinstance(value, str), value is False, str(value)))


def _spellings() -> Iterator[tuple[bool | str, str]]:
    """(value, line in the table); names before what initializers declare, so that a name is found without an import."""
    for name in INITIALIZERS.names():
        yield name, name
    for name in INITIALIZERS.names():
        yield from ((value, name) for value in INITIALIZERS.get(name).also)


def _match(value: bool | str, spelling: bool | str) -> tuple[bool, int | None]:
    """Whether the value is meant by the spelling, and the number it has in place of a final N."""
    if isinstance(value, bool) or isinstance(spelling, bool):
        return value is spelling, None
    if not spelling.endswith("_N"):
        return value.lower() == spelling.lower(), None
    match = re.fullmatch(re.escape(spelling[:-1]) + r"(\d+)", value, flags=re.IGNORECASE)
    return match is not None, int(match[1]) if match else None
