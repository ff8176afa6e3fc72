"""The words of a published command -> the value of every key: that of the option chosen, or the one that is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from lorafa.conf.compose import OF_HYDRA, is_readable, of_a_sweep, read_value
from lorafa.errors import ConfigError, did_you_mean
from lorafa.scripts.published import DEFAULT_CHOICES, FOLDER, GROUPS, OURS, PUBLISHED_KEYS, options

TEXTS = ("dataset_name", "model.name", "wandb.name")
"""Keys whose text is taken as it stands where the grammar cannot read it: paths and names."""
PAGE = "docs/published-commands.md"


@dataclass(frozen=True)
class Asked:
    """What a command asks for."""

    values: Mapping[str, Any]
    """Each key with its value; one that no option has and nobody names is missing."""
    given: frozenset[str]
    """The keys that the command names."""
    ours: tuple[str, ...] = ()
    """Settings of `lorafa train` beside them."""
    choices: Mapping[str, str] = field(default_factory=dict)
    """Group -> option."""

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; ``default`` too where it is null."""
        found = self.values.get(key)
        return default if found is None else found


def read(words: Sequence[str]) -> Asked:
    """What the words of a command ask for; of several values of a key the last one counts.

    Raises:
        ConfigError: an unknown key or option, or a value that cannot be read.
    """
    choices, values, ours = dict(DEFAULT_CHOICES), dict[str, Any](), list[str]()
    for word in words:
        key, equals, value = word.lstrip("+").partition("=")
        if not equals or word.startswith("~"):
            raise ConfigError(f"{word!r} is not a setting. Write key=value, for example ++peft.lora_r=8.")
        if key in GROUPS:
            choices[key] = _option(key, value)
        elif key in PUBLISHED_KEYS:
            values[key] = _value(word, key, value)
        elif key.startswith(OF_HYDRA):
            raise of_a_sweep(word)
        elif key.partition(".")[0] in OURS and key not in ("data", *GROUPS):
            ours.append(word)
        else:
            raise ConfigError(_unknown(key))
    if "peft" not in choices:
        raise ConfigError(f"Nothing says what is adapted. Add +peft=<option>: {', '.join(options('peft'))}.")
    chosen = {f"{group}.{key}": value for group, option in choices.items() for key, value in _of(group, option).items()}
    return Asked(chosen | values, frozenset(values), tuple(ours), choices)


def _of(group: str, option: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / group / f"{option}.yaml").read_text(encoding="utf-8"))
    return found


def _option(group: str, option: str) -> str:
    known = options(group)
    if option not in known:
        more = " Another model is given as ++model.name=<folder or Hub id>." if group == "model" else ""
        raise ConfigError(
            f"{group} has no option {option!r}.{did_you_mean(option, known)} Known: {', '.join(known)}.{more}"
        )
    return option


def _value(word: str, key: str, value: str) -> Any:
    if not value.strip():
        raise ConfigError(f"{key}= is followed by nothing. Was a variable of the shell not set?")
    if key in TEXTS and not is_readable(f"{key}={value}"):
        return value
    found = read_value(word, key, value)
    return value if key in TEXTS and found is not None and not isinstance(found, str) else found  # 2e-4 is a name here


def _unknown(key: str) -> str:
    ours = {name: one.ours.rstrip("=").split("=")[0].split(", ") for name, one in PUBLISHED_KEYS.items() if one.ours}
    theirs = [name for name, settings in ours.items() if key in settings]
    leaf = [name for name in PUBLISHED_KEYS if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = did_you_mean(key, [*PUBLISHED_KEYS, *GROUPS])
    hint = f" Did you mean {(theirs or leaf)[0]!r}?" if theirs or leaf else near
    return (
        f"run_exp.py has no key {key!r}.{hint} {PAGE} lists them; settings of `lorafa train` are taken in "
        f"{', '.join(OURS)}."
    )
