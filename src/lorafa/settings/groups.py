"""Groups of settings that are open: what they name brings settings of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any, ClassVar

from lorafa.errors import ConfigError, did_you_mean
from lorafa.registry import Registry
from lorafa.settings.checks import check_choice, found
from lorafa.settings.declared import declared
from lorafa.settings.typed import Key, build, hints_of, settable, typed_value


class OpenGroup:
    """A group of settings that names an entry of a registry, and takes the entry's own settings beside its common ones.

    A subclass is a frozen dataclass with the common fields, one of which names the entry, and a field that holds the
    entry's own settings: an object of the class the entry declares, or a mapping to make one of, or None for its
    defaults. As plain values all of them stand side by side: ``{"name": "lora_fa", "lr": 1e-3, "algorithm": "fold"}``.
    """

    group: ClassVar[str]
    opens: ClassVar[Mapping[str, str]]
    """Field that names an entry -> the field with that entry's own settings. The first one is what stands after
    ``group=``."""
    lines: ClassVar[Mapping[str, Registry[Any]]]
    """Field that names an entry -> the registry it is a line of."""

    @classmethod
    def settings_of(cls, field: str, chosen: Any) -> type[Any] | None:
        """The class of the own settings of the entry that ``field`` names; None where it has none.

        Raises:
            ConfigError: there is no such entry.
        """
        check_choice(f"{cls.group}.{field}", chosen, cls.entries(field))
        kind: type[Any] | None = getattr(cls.lines[field].get(chosen), "settings", None)
        return kind

    @classmethod
    def entries(cls, field: str) -> list[str]:
        """All entries that ``field`` can name."""
        return cls.lines[field].names()

    @classmethod
    def own_keys(cls, field: str) -> dict[str, list[Key]]:
        """How each entry is chosen -> its own settings, for help; nothing is imported for it."""
        registry = cls.lines[field]
        return {cls.words(field, name): declared(registry, name).settings for name in registry.names()}

    @classmethod
    def words(cls, field: str, chosen: object) -> str:
        """What is written to choose an entry: ``optim=lora_fa``, ``init.ranks=energy``."""
        return f"{cls.group}{'' if field == next(iter(cls.opens)) else f'.{field}'}={chosen}"

    @classmethod
    def having(cls, setting: str) -> list[str]:
        """The entries that have a setting of their own by this name, as they are chosen."""
        return [
            words
            for field in cls.opens
            for words, keys in cls.own_keys(field).items()
            if setting in [key.name for key in keys]
        ]

    @classmethod
    def own_names(cls, values: Mapping[str, Any]) -> set[str]:
        """The settings that the entries named in plain values have of their own, read from source where it can be."""
        found: set[str] = set()
        for field, entry in cls._chosen(values).items():
            listed = cls.own_keys(field).get(cls.words(field, entry))
            found.update(_names(cls._own_class(field, entry)) if listed is None else [key.name for key in listed])
        return found

    @classmethod
    def sorted_out(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Plain values with those that are an entry's own put together, under the field that holds them.

        Raises:
            ConfigError: a setting that neither all entries have nor the one chosen.
        """
        common, chosen = {field.name for field in _common(cls)}, cls._chosen(values)
        kinds = {holder: cls._own_class(field, chosen[field]) for field, holder in cls.opens.items()}
        own: dict[str, dict[str, Any]] = {holder: {} for holder, kind in kinds.items() if kind is not None}
        for key, value in values.items():
            takers = [holder for holder, kind in kinds.items() if key in _names(kind)]
            if key not in common and not takers:
                raise ConfigError(cls._no_such(key, value, chosen))
            for holder in takers:
                own[holder][key] = value
        return {key: value for key, value in values.items() if key in common} | own

    def __post_init__(self) -> None:
        """Bring the own settings to their class."""
        said: dict[str, Any] = {}
        for field, holder in self.opens.items():
            own = self._made(field, getattr(self, field), getattr(self, holder))
            object.__setattr__(self, holder, own)
            for name in _names(None if own is None else type(own)):
                value = getattr(own, name)
                if said.setdefault(name, value) != value:
                    raise ConfigError(
                        f"{self.group}.{name} is one setting, found {said[name]!r} and {value!r}. Give it once, or the "
                        "same twice."
                    )

    @classmethod
    def _chosen(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The entries that plain values name, or else the defaults do."""
        hints, defaults = hints_of(cls), {field.name: field.default for field in fields(cls)}  # type: ignore[arg-type]
        return {
            field: typed_value(values[field], hints[field], f"{cls.group}.{field}", defaults[field])
            if field in values
            else defaults[field]
            for field in cls.opens
        }

    @classmethod
    def _made(cls, field: str, chosen: Any, given: Any) -> Any:
        kind = cls._own_class(field, chosen)
        if kind is not None and (given is None or isinstance(given, kind)):
            return kind() if given is None else given
        if isinstance(given, Mapping):
            for key, value in given.items():
                if key not in _names(kind):
                    raise ConfigError(cls._no_such(key, value, {field: chosen}))
            return None if kind is None else build(kind, given, cls.group)
        if given is not None:
            wanted = "has no settings of its own" if kind is None else f"has settings of the class {kind.__name__}"
            raise ConfigError(
                f"{cls.words(field, chosen)} {wanted}, found {found(given)}. Pass {cls.opens[field]}={{}}."
            )
        return None

    @classmethod
    def _own_class(cls, field: str, chosen: Any) -> type[Any] | None:
        kind = cls.settings_of(field, chosen)
        taken = {one.name for one in _common(cls)}.intersection(_names(kind))
        if taken:
            raise ConfigError(
                f"The class {kind.__name__ if kind else ''} of {cls.words(field, chosen)} has a field {min(taken)!r}, "
                f"which every {cls.group}= has. Give it another name."
            )
        return kind

    @classmethod
    def _no_such(cls, key: str, value: Any, chosen: Mapping[str, Any]) -> str:
        first, usual = next(iter(cls.opens)), {field.name: field.default for field in fields(cls)}  # type: ignore[arg-type]
        words = " ".join(cls.words(f, name) for f, name in chosen.items() if f == first or name != usual[f])
        kinds = [cls.settings_of(field, name) for field, name in chosen.items()]
        has = [one.name for one in _common(cls)] + [name for kind in kinds for name in _names(kind)]
        owners = cls.having(key)
        hint = f" It belongs to {', '.join(owners)}." if owners else did_you_mean(str(key), has)
        return (
            f"There is no setting {f'{cls.group}.{key}'!r} for {words} (found {value!r}).{hint} {words} has: "
            f"{', '.join(dict.fromkeys(has))}."
        )


def _names(config_class: type[Any] | None) -> list[str]:
    return [] if config_class is None else [field.name for field in settable(config_class)]


def _common(config_class: type[OpenGroup]) -> list[Field[Any]]:
    """The fields of an open group that all its entries have."""
    held = config_class.opens.values()
    return [field for field in settable(config_class) if field.name not in held]
