"""Overrides in Hydra's grammar -> one checked :class:`~lorafa.train.schema.RunConfig`.

``peft.r=32`` sets a value, ``peft=dora`` takes another file of a group. The schema is closed, so a leading ``+`` or
``++`` adds nothing: it is accepted and means the same. ``model=`` and ``data=`` also take a path or a Hub id.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorafa.conf.typed import Key, build, keys, read
from lorafa.errors import ConfigError, did_you_mean, first_line
from lorafa.train.schema import RunConfig

FOLDER = Path(__file__).parent
KEYS: Mapping[str, Key] = {key.name: key for key in keys(RunConfig)}
ALIASES: Mapping[str, str] = {
    "peft.lora_r": "peft.r",
    "dataset_name": "data.name",
    "model.epochs": "train.epochs",
    "init.weight": "init.scale",
}
"""Names that published commands use -> the name here."""
OPEN_GROUPS = ("model", "data")
"""Groups whose value may be any name: it becomes ``<group>.name``."""
_KINDS = {"model": "folder, a Hub id or smollm2-135m", "data": "file, a Hub id or word_problems"}
PATHS = ("run_dir", "train.resume", "model.cache_dir", "data.cache_dir")
"""Settings that are paths: what the grammar cannot read (``~/runs``) is taken as it stands."""


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """The default run with the overrides applied, later ones winning.

    Raises:
        ConfigError: an unknown group, option or key (with the nearest known one), a value of the wrong type or range.
    """
    values = OmegaConf.to_container(composed(overrides), resolve=True)
    assert isinstance(values, dict)
    return build(RunConfig, {str(key): value for key, value in values.items()})


def defaults() -> dict[str, Any]:
    """Dotted name of every setting -> its value in the default run, read but not checked: for lists of settings."""
    chosen = OmegaConf.to_container(composed(), resolve=True)
    return {key.name: read(_at(chosen, key.name.split("."), key.default), key) for key in KEYS.values()}


def composed(overrides: Sequence[str] = ()) -> DictConfig:
    """What the yaml files and the overrides say together, not yet checked for types."""
    translated = [line for lines in _last_choices(overrides) for line in lines]
    try:
        with hydra.initialize_config_dir(config_dir=str(FOLDER.resolve()), version_base="1.3"):
            config = hydra.compose("train", overrides=translated)
            for missing in sorted(OmegaConf.missing_keys(config)):
                raise ConfigError(f"{missing} has no value. Add {missing}=<value>.")
            return config
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"The settings {' '.join(overrides)!r} do not fit together: {first_line(error)}.") from error


def _at(values: Any, names: Sequence[str], otherwise: Any) -> Any:
    """The value under these names, one inside the other."""
    for name in names:
        if name not in values:
            return otherwise
        values = values[name]
    return values


def groups() -> dict[str, list[str]]:
    """Group -> its options, by the files in this folder."""
    folders = sorted(path for path in FOLDER.iterdir() if path.is_dir() and any(path.glob("*.yaml")))
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def _last_choices(overrides: Sequence[str]) -> list[list[str]]:
    """All overrides translated; of several choices of one group the last, or an earlier one's name would stay."""
    translated = [translate(text) for text in overrides]
    names = [text.partition("=")[0].lstrip("+") for text in overrides]
    last = {name: place for place, name in enumerate(names) if name in groups()}
    return [lines for place, lines in enumerate(translated) if last.get(names[place], place) == place]


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
    if key in PATHS and not _is_readable(f"{key}={value}"):
        return [f"++{key}={_quoted(value)}"]
    _check_grammar(text, key, value)
    return [f"++{key}={value}"]


def _chosen(group: str, option: str) -> list[str]:
    options = groups()[group]
    if option in options:
        return [f"{group}={option}"]
    if group in OPEN_GROUPS:
        if not option.strip():
            raise ConfigError(f"{group}= is followed by nothing. Name a {_KINDS[group]}.")
        return [f"{group}=custom", f"++{group}.name={_quoted(option)}"]
    raise ConfigError(f"{group} has no option {option!r}.{did_you_mean(option, options)} Known: {', '.join(options)}.")


def _nearest(key: str) -> str:
    """The same last name in another group, or else the nearest name of all."""
    same_leaf = [known for known in KEYS if known.rpartition(".")[2] == key.rpartition(".")[2]]
    return f" Did you mean {same_leaf[0]!r}?" if same_leaf else did_you_mean(key, [*KEYS, *groups()])


def _is_readable(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def _check_grammar(text: str, key: str, value: str) -> None:
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException as error:
        raise ConfigError(
            f"The value of {text!r} cannot be read: {first_line(error).partition(' expecting ')[0]}. Close its "
            f'brackets, or if it is a text, put quotes inside the quotes: "{key}={_quoted(value)}".'
        ) from error
    if parsed.is_sweep_override():
        raise ConfigError(f"{text!r} names several values, but a run has one. Write a list as [a,b], a text in quotes.")


def _quoted(text: str) -> str:
    """A text in Hydra's single quotes, where a backslash is special only in front of a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"
