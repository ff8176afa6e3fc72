"""Overrides in Hydra's grammar -> one checked :class:`~lorafa.train.schema.RunConfig`.

``peft.r=32`` sets a value, ``peft=dora`` takes another file of a group. The schema is closed, so a leading ``+`` or
``++`` adds nothing: it is accepted and means the same. ``model=`` and ``data=`` also take a path or a Hub id.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorafa.conf.typed import Key, build, keys
from lorafa.errors import ConfigError, did_you_mean, first_line
from lorafa.train.schema import RunConfig

FOLDER = Path(__file__).parent
KEYS: Mapping[str, Key] = {key.name: key for key in keys(RunConfig)}
ALIASES: Mapping[str, str] = {"peft.lora_r": "peft.r", "dataset_name": "data.name", "model.epochs": "train.epochs"}
"""Names that published commands use -> the name here."""
OPEN_GROUPS = ("model", "data")
"""Groups whose value may be any name: it becomes ``<group>.name``."""


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """The default run with the overrides applied, later ones winning.

    Raises:
        ConfigError: an unknown group, option or key (with the nearest known one), a value of the wrong type or range.
    """
    values = OmegaConf.to_container(composed(overrides), resolve=True)
    assert isinstance(values, dict)
    return build(RunConfig, {str(key): value for key, value in values.items()})


def composed(overrides: Sequence[str] = ()) -> DictConfig:
    """What the yaml files and the overrides say together, not yet checked for types."""
    translated = [line for text in overrides for line in translate(text)]
    try:
        with hydra.initialize_config_dir(config_dir=str(FOLDER.resolve()), version_base="1.3"):
            config = hydra.compose("train", overrides=translated)
            for missing in sorted(OmegaConf.missing_keys(config)):
                raise ConfigError(f"{missing} has no value. Add {missing}=<value>.")
            return config
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"The settings {' '.join(overrides)!r} do not fit together: {first_line(error)}.") from error


def groups() -> dict[str, list[str]]:
    """Group -> its options, by the files in this folder."""
    folders = sorted(path for path in FOLDER.iterdir() if path.is_dir() and any(path.glob("*.yaml")))
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def translate(text: str) -> list[str]:
    """One override as Hydra takes it for a closed schema: ``group=option`` or ``++key=value``."""
    key, equals, value = text.partition("=")
    if not equals or key.startswith("~"):
        raise ConfigError(f"{text!r} is not a setting. Write key=value, for example peft.r=16.")
    key = key.lstrip("+")
    key = ALIASES.get(key, key)
    if key in groups():
        return _chosen(key, value)
    if key not in KEYS:
        raise ConfigError(f"There is no setting {key!r}.{_nearest(key)} `lorafa train --help` lists all of them.")
    _check_grammar(text, f"{key}={value}")
    return [f"++{key}={value}"]


def _chosen(group: str, option: str) -> list[str]:
    options = groups()[group]
    if option in options:
        return [f"{group}={option}"]
    if group in OPEN_GROUPS and option:
        return [f"{group}=custom", f"++{group}.name={_quoted(option)}"]
    raise ConfigError(f"{group} has no option {option!r}.{did_you_mean(option, options)} Known: {', '.join(options)}.")


def _nearest(key: str) -> str:
    """The same last name in another group, or else the nearest name of all."""
    same_leaf = [known for known in KEYS if known.rpartition(".")[2] == key.rpartition(".")[2]]
    return f" Did you mean {same_leaf[0]!r}?" if same_leaf else did_you_mean(key, [*KEYS, *groups()])


def _check_grammar(text: str, override: str) -> None:
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise ConfigError(
            f"The value of {text!r} cannot be read: {first_line(error)}. Put quotes inside the quotes: key=\"'value'\"."
        ) from error
    if parsed.is_sweep_override():
        raise ConfigError(f"{text!r} names several values, but a run has one. Write a list as [a,b], a text in quotes.")


def _quoted(text: str) -> str:
    """A text in Hydra's single quotes, where a backslash is special only in front of a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"
