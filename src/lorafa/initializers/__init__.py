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
        "both_random": "lorafa.initializers.both_random:both_random",
        "orthogonal": "lorafa.initializers.orthogonal:orthogonal",
        "lora_ga": "lorafa.initializers.lora_ga:lora_ga",
        "lora_ga_clipped": "lorafa.initializers.lora_ga_clipped:lora_ga_clipped",
        "lora_ga_peft": "lorafa.initializers.lora_ga:lora_ga_peft",
        "lora_sb": "lorafa.initializers.lora_sb:lora_sb",
        "lora_one": "lorafa.initializers.lora_one:lora_one",
        "functional": "lorafa.initializers.lora_one:functional",
        "lora_da": "lorafa.initializers.lora_da:lora_da",
        "from_teacher": "lorafa.initializers.from_teacher:from_teacher",
        "loram": "lorafa.initializers.loram:loram",
        "loram_subtracted": "lorafa.initializers.loram:loram_subtracted",
        "gora": "lorafa.initializers.gora:gora",
        "eva": "lorafa.initializers.eva:eva",
        "corda": "lorafa.initializers.corda:corda",
        "lora_null": "lorafa.initializers.lora_null:lora_null",
        "pissa": "lorafa.initializers.pissa:pissa",
        "svd_of_weight": "lorafa.initializers.svd_of_weight:svd_of_weight",
        "kasa": "lorafa.initializers.kasa:kasa",
        "goat": "lorafa.initializers.goat:goat",
        "loftq": "lorafa.initializers.loftq:loftq",
        "mica": "lorafa.initializers.mica:mica",
        "milora": "lorafa.initializers.milora:milora",
        "olora": "lorafa.initializers.olora:olora",
    },
)

SWITCHES = {True: "kaiming", False: "random"}
"""The starts that True and False mean."""


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
    if isinstance(value, bool):
        return Start(SWITCHES[value], value)
    if not isinstance(value, str):
        return None
    for spelling, name in _spellings():
        fits, number = _match(value, spelling)
        if fits:
            switch = next((switch for switch, meant in SWITCHES.items() if meant == name), None)
            return Start(name, value.lower() if switch is None else switch, number)
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
    values: set[bool | str] = {*SWITCHES, *(spelling for spelling, _ in _spellings())}
    return sorted(values, key=lambda value: (isinstance(value, str), value is False, str(value)))


def _spellings() -> Iterator[tuple[str, str]]:
    """(value, line in the table); names before what initializers declare, so that a name is found without an import."""
    for name in INITIALIZERS.names():
        yield name, name
    for name in INITIALIZERS.names():
        yield from ((value, name) for value in INITIALIZERS.get(name).also)


def _match(value: str, spelling: str) -> tuple[bool, int | None]:
    """Whether the value is meant by the spelling, and the number it has in place of a final N."""
    if not spelling.endswith("_N"):
        return value.lower() == spelling.lower(), None
    match = re.fullmatch(re.escape(spelling[:-1]) + r"(\d+)", value, flags=re.IGNORECASE)
    return match is not None, int(match[1]) if match else None
