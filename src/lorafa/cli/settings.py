"""All settings for `lorafa train --help`: names and texts come from the schema, values from the yaml files.

Entries of open groups are listed from their source: torch is not loaded to print help.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from textwrap import fill
from typing import Any

from omegaconf import OmegaConf

from lorafa.conf.compose import CUSTOM, OPEN_GROUPS, composed, groups, takes_any_name
from lorafa.report.values import written
from lorafa.settings.typed import Key, keys
from lorafa.train.settings.run import RunConfig

WIDTH = 110


def settings_help() -> str:
    """Groups with their options, then every key with its default and its meaning, then what single options have."""
    defaults = OmegaConf.to_container(composed(), resolve=True)
    lines = ["groups (group=option takes a file of settings, or what has this name):"]
    for group, options in groups().items():
        any_name = takes_any_name(group)
        free = f", or {any_name}" if any_name else ""
        lines.append(f"  {group}={'|'.join(option for option in options if option != CUSTOM)}{free}")
    lines += ["", "settings (key=value; lists as [a,b], nothing as null):"]
    for key in keys(RunConfig):
        lines += _shown(key.name, _at(defaults, key), key.doc)
    lines += ["", "settings that belong to one option of a group:"]
    for group in OPEN_GROUPS:
        lines += _own(group)
    return "\n".join(lines)


def _own(group: str) -> Iterator[str]:
    """The own settings of the group's options; those that have the same ones stand together."""
    config_class = OPEN_GROUPS[group]
    for field in config_class.opens:
        together: dict[tuple[tuple[str, str, str], ...], list[str]] = {}
        for words, own in config_class.own_keys(field).items():
            shown = tuple((f"{group}.{key.name}", _written(key.default), key.doc) for key in own)
            together.setdefault(shown, []).append(words)
        for settings, options in together.items():
            if settings:
                yield fill(", ".join(options), WIDTH, initial_indent="  ", subsequent_indent="  ")
                for name, value, doc in settings:
                    yield from _shown(name, value, doc, indent=4)


def _shown(name: str, value: str, doc: str, indent: int = 2) -> list[str]:
    text, margin = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", doc), " " * (indent + 6)
    return [f"{' ' * indent}{name}={value}", fill(text, WIDTH, initial_indent=margin, subsequent_indent=margin)]


def _at(values: Any, key: Key) -> str:
    """The value of a setting in the default run: of the yaml files, or else of its class."""
    for part in key.name.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return _written(key.default)
        values = values[part]
    return _written(values)


def _written(value: Any) -> str:
    return written(value, form="")
