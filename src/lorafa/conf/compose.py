"""Overrides in Hydra's grammar -> one checked :class:`~lorafa.train.settings.run.RunConfig`.

``peft.r=32`` sets a value, ``peft=dora`` takes another file of a group, ``optim=lora_fa`` another line of a registry,
which brings its own settings. For each choice the schema is closed, so a leading ``+`` or ``++`` adds nothing: it is
accepted and means the same. ``model=`` and ``data=`` also take a path or a Hub id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, get_type_hints

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorafa.conf.automatic import with_numbers
from lorafa.conf.continued import with_settings_of_file
from lorafa.errors import ConfigError, did_you_mean, first_line
from lorafa.settings.groups import OpenGroup
from lorafa.settings.typed import Key, build, keys
from lorafa.train.settings.run import RunConfig

FOLDER = Path(__file__).parent
KEYS: Mapping[str, Key] = {key.name: key for key in keys(RunConfig)}
ALIASES: Mapping[str, str] = {"peft.lora_r": "peft.r"}
"""Names that other documents use -> the name here; those of published scripts are in :mod:`lorafa.scripts`."""
EITHER = (
    {"train.steps": "null", "train.epochs": "null"},
    {"train.checkpoint_every": "0", "train.checkpoint_epochs": "null"},
    {"train.eval_every": "0", "train.eval_epochs": "null"},
    {"data.eval_size": "null", "data.eval_file": "null"},
)
"""Settings that exclude each other, with the value of each that says nothing."""
OPEN_GROUPS: Mapping[str, type[OpenGroup]] = {
    name: group
    for name, group in get_type_hints(RunConfig).items()
    if isinstance(group, type) and issubclass(group, OpenGroup)
}
"""Groups that name a line of a registry."""
PATHS = ("train.resume", "peft.adapter", "data.file", "data.template", "align.teacher")
"""Settings that are paths, or names that may be paths, and are not called so."""
OF_HYDRA = ("hydra.", "hydra/")
"""How settings begin that say how a sweep is launched."""
CUSTOM = "custom"
"""The file of a group whose value may be any name: it becomes ``<group>.name``."""


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """The default run with the overrides applied, later ones winning.

    Raises:
        ConfigError: an unknown group, option or key (with the nearest known one), a value of the wrong type or range.
        SourceError: a setting is ``auto``, and the model's config cannot be had.
    """
    values = OmegaConf.to_container(composed(overrides), resolve=True)
    assert isinstance(values, dict)
    plain = {str(key): value for key, value in values.items()}
    config = build(RunConfig, with_numbers(plain, lambda settled: build(RunConfig, settled)))
    return config if config.peft.adapter is None else with_settings_of_file(config, _given_of_peft(overrides))


def key_of(override: str) -> str:
    """The key a text sets, by the name it has here: ``peft.r`` of ``+peft.lora_r=8``."""
    key = override.lstrip("+").partition("=")[0]
    return ALIASES.get(key, key)


def refuse_others(overrides: Sequence[str], groups_read: Sequence[str], command: str, why: str) -> None:
    """Raises ConfigError for a setting of a group that a command does not read.

    Args:
        why: what such a setting does there, in words: "changes nothing that is counted".
    """
    for text in overrides:
        if key_of(text).partition(".")[0] not in groups_read:
            raise ConfigError(
                f"{command} reads the settings of {', '.join(groups_read)}, found {text!r}, which {why}. Leave it out."
            )


def composed(overrides: Sequence[str] = ()) -> DictConfig:
    """What the yaml files and the overrides say together, not yet checked for types."""
    translated = [line for lines in _last_choices(overrides) for line in lines] + _instead(overrides)
    try:
        with _apart(), hydra.initialize_config_dir(config_dir=str(FOLDER.resolve()), version_base="1.3"):
            config = hydra.compose("train", overrides=translated)
            for missing in sorted(OmegaConf.missing_keys(config)):
                raise ConfigError(f"{missing} has no value. Add {missing}=<value>.")
            return config
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, *_NUMBERS) as error:
        raise ConfigError(f"The settings {' '.join(overrides)!r} do not fit together: {first_line(error)}.") from error


_NUMBERS = (ValueError, RecursionError)
"""What Hydra lets through: a number of thousands of digits, brackets without end."""
_ONE_AT_A_TIME = Lock()


@contextmanager
def _apart() -> Iterator[None]:
    """Hydra keeps what it composes for in one place of the process: it is this call's alone, and is put back as it was
    for a script that is inside ``hydra.main`` itself."""
    with _ONE_AT_A_TIME:
        here = GlobalHydra.instance()
        before = here.hydra
        here.clear()
        try:
            yield
        finally:
            here.hydra = before


def _given_of_peft(overrides: Sequence[str]) -> list[str]:
    """The settings of `peft` that the overrides name.

    Raises:
        ConfigError: they choose an option of it.
    """
    named = [text.lstrip("+").partition("=")[0] for text in overrides]
    chosen = [text for text, name in zip(overrides, named, strict=True) if name == "peft"]
    if chosen:
        raise ConfigError(
            f"{chosen[-1]} describes a new adapter, and peft.adapter goes on with one. Drop one of the two."
        )
    keys_named = [ALIASES.get(name, name).split(".") for name in named]
    return [parts[1] for parts in keys_named if parts[0] == "peft" and len(parts) > 1]


def groups() -> dict[str, list[str]]:
    """Group -> its options: files in this folder, and lines of the registry it names."""
    found = {group: _files(group) for group in sorted({*OPEN_GROUPS, *_folders()})}
    for group, config_class in OPEN_GROUPS.items():
        found[group] = sorted({*found[group], *config_class.entries(chooser(group))})
    return found


def options(group: str) -> list[str]:
    """The options of a group; none for what is no group."""
    return groups().get(group, [])


def chooser(group: str) -> str:
    """The setting of an open group that names its entry: ``name``, ``mode``."""
    return next(iter(OPEN_GROUPS[group].opens))


def takes_any_name(group: str) -> str | None:
    """What may stand after ``group=`` beside its options, in words; None: nothing else."""
    return getattr(OPEN_GROUPS.get(group), "any_name", None)


def _folders() -> list[str]:
    return [path.name for path in FOLDER.iterdir() if path.is_dir() and any(path.glob("*.yaml"))]


def _files(group: str) -> list[str]:
    return sorted(file.stem for file in (FOLDER / group).glob("*.yaml"))


def _last_choices(overrides: Sequence[str]) -> list[list[str]]:
    """All overrides translated; of several choices of one group the last, or an earlier one's name would stay."""
    translated = [_for_hydra(text) for text in overrides]
    names = [text.partition("=")[0].lstrip("+") for text in overrides]
    names = [ALIASES.get(name, name) for name in names]
    known = groups()
    last = {name: place for place, name in enumerate(names) if name in known}
    return [lines for place, lines in enumerate(translated) if last.get(names[place], place) == place]


def _instead(overrides: Sequence[str]) -> list[str]:
    """One of two settings that exclude each other takes back the other, which a file may have set."""
    given = {}
    for text in overrides:
        key, _, value = text.lstrip("+").partition("=")
        given[ALIASES.get(key, key)] = value.strip()
    return [
        f"++{other}={nothing}"
        for pair in EITHER
        for other, nothing in pair.items()
        if other not in given and any(given.get(one, pair[one]) != pair[one] for one in pair if one != other)
    ]


def _for_hydra(text: str) -> list[str]:
    """One override as Hydra takes it for a closed schema: ``group=option`` or ``++key=value``."""
    key, equals, value = text.partition("=")
    if not equals or key.startswith("~"):
        raise ConfigError(f"{text!r} is not a setting. Write key=value, for example peft.r=16.")
    key = key.lstrip("+")
    if key.startswith(OF_HYDRA):
        raise of_a_sweep(text)
    key = ALIASES.get(key, key)
    if key in groups():
        return _chosen(key, value)
    if key not in KEYS and not _may_be_own(key):
        raise ConfigError(f"There is no setting {key!r}.{_nearest(key)} `lorafa train --help` lists all of them.")
    if _is_path(key) and value.strip() not in ("", "null"):
        return [f"++{key}={as_it_stands(_unquoted(key, value))}"]
    read_value(text, key, value)
    return [f"++{key}={value}"]


def of_a_sweep(text: str) -> ConfigError:
    """The error for a setting of Hydra's own where there is no sweep."""
    return ConfigError(f"{text!r} says how a sweep is launched, and this is one run. Add -m, or leave it out.")


def _chosen(group: str, option: str) -> list[str]:
    if option in _files(group):
        return [f"{group}={option}"]
    known, any_name = groups()[group], takes_any_name(group)
    if any_name is None and option not in known:
        raise ConfigError(
            f"{group} has no option {option!r}.{did_you_mean(option, known)} Known: {', '.join(known)}."
        )
    if not option.strip():
        names = ", ".join(name for name in known if name != CUSTOM)
        raise ConfigError(f"{group}= is followed by nothing. Name {any_name}, or one of: {names}.")
    base = [f"{group}={CUSTOM}"] if CUSTOM in _files(group) else []
    a_list = getattr(OPEN_GROUPS.get(group), "several", False) and option.startswith("[") and option.endswith("]")
    named = _names(group, option) if a_list else as_it_stands(option)
    return [*base, f"++{group}.{chooser(group)}={named}"]


def _names(group: str, option: str) -> str:
    """A list of names, each in quotes."""
    try:
        names = OverridesParser.create().parse_override(f"{group}={option}").value()
    except (HydraException, *_NUMBERS) as error:
        raise ConfigError(
            f"{group}={option} cannot be read as a list: {first_line(error).partition(' expecting ')[0]}. Put a name "
            f"with blanks, brackets or a ~ into quotes: \"{group}=[a.jsonl,'b (1).jsonl']\"."
        ) from error
    return f"[{','.join(as_it_stands(str(name)) for name in names)}]"


def _may_be_own(key: str) -> bool:
    """Whether a key may be a setting of what an open group names: that is known once all is put together."""
    group, dot, name = key.partition(".")
    return bool(dot) and group in OPEN_GROUPS and name.isidentifier()


def _is_path(key: str) -> bool:
    """Settings that are paths, most of which are called so, are taken as they stand: ``123``, ``a,b``, ``~/${x}``."""
    return key.endswith(("_dir", "_file")) or key in PATHS


def _unquoted(key: str, value: str) -> str:
    """A text without the quotes of Hydra's grammar, where it stands in such."""
    if value[:1] in ("'", '"') and is_readable(f"{key}={value}"):
        parsed = OverridesParser.create().parse_override(f"{key}={value}")
        if not parsed.is_sweep_override():  # as 'a','b' is
            return str(parsed.value())
    return value


def _nearest(key: str) -> str:
    """The same last name in another group, or else the nearest name of all."""
    same_leaf = [known for known in KEYS if known.rpartition(".")[2] == key.rpartition(".")[2]]
    return f" Did you mean {same_leaf[0]!r}?" if same_leaf else did_you_mean(key, [*KEYS, *groups()])


def is_readable(override: str) -> bool:
    """Whether Hydra's grammar can read an override."""
    try:
        OverridesParser.create().parse_override(override)
    except (HydraException, *_NUMBERS):
        return False
    return True


def read_value(text: str, key: str, value: str) -> Any:
    """The value that an override, whose text is for errors, gives its key.

    Raises:
        ConfigError: it cannot be read, or is several values.
    """
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={value}")
    except (HydraException, *_NUMBERS) as error:
        raise ConfigError(
            f"The value of {text!r} cannot be read: {first_line(error).partition(' expecting ')[0]}. Close its "
            f'brackets, or if it is a text, put quotes inside the quotes: "{key}={quoted(value)}".'
        ) from error
    if parsed.is_sweep_override():
        raise ConfigError(
            f"{text!r} names several values, but a run has one. Add -m for a run of each; write a list as [a,b], a "
            "text in quotes."
        )
    return parsed.value()


def as_it_stands(text: str) -> str:
    """A text in quotes, in which nothing is put in the place of ``${...}``."""
    return quoted(re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", text))


def quoted(text: str) -> str:
    """A text in Hydra's single quotes, where a backslash is special only in front of a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"
