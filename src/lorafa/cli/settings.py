"""All settings for `lorafa train --help`: names and texts come from the schema, values from the yaml files."""

from __future__ import annotations

from textwrap import fill
from typing import Any

from lorafa.conf.compose import KEYS, OPEN_GROUPS, defaults, groups

WIDTH = 110


def settings_help() -> str:
    """Groups with their options, then every key with its default and its meaning."""
    values, options = defaults(), groups()
    lines = ["groups (group=option takes another file of settings):"]
    for group in options:
        free = ", or any name, path or Hub id" if group in OPEN_GROUPS else ""
        lines.append(f"  {group}={'|'.join(option for option in options[group] if option != 'custom')}{free}")
    lines += ["", "settings (key=value; lists as [a,b], nothing as null):"]
    for key in KEYS.values():
        lines.append(f"  {key.name}={_written(values[key.name])}")
        lines.append(fill(key.doc, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8))
    return "\n".join(lines)


def _written(value: Any) -> str:
    """A value as it is typed on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_written, value)) + "]"
    return str(value)
