"""Which settings of a run are not the default ones, found without loading torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from lorafa.conf.compose import OPEN_GROUPS, composed
from lorafa.settings.typed import keys
from lorafa.train.settings.optim import usual_warmup
from lorafa.train.settings.run import RunConfig
from lorafa.train.settings.schedules import SCHEDULES


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested values by their dotted names; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


class Defaults:
    """The settings of the default run, and of what a run has chosen instead: those of an optimizer are its own."""

    def __init__(self) -> None:
        given = OmegaConf.to_container(composed(), resolve=True)
        assert isinstance(given, dict)
        of_classes = {key.name: _plain(key.default) for key in keys(RunConfig)}
        self._values = of_classes | flat({str(group): value for group, value in given.items()})
        self._known: dict[tuple[str, str, str], Mapping[str, Any]] = {}

    def changed(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The flat settings of a run that are not the default ones, but for the place it was written to."""
        own, missing = self._settled(settings), object()
        return {
            name: value
            for name, value in settings.items()
            if name not in ("run_dir", "if_exists", "threads")
            and value != own.get(name, self._values.get(name, missing))
            and not (value is None and name not in self._values)
        }

    def _settled(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What the chosen entries bring: their own settings, the rate of an optimizer, the warm-up of a schedule."""
        found: dict[str, Any] = {}
        for group, kind in OPEN_GROUPS.items():
            for field in kind.opens:
                found |= self._own(group, field, str(settings.get(f"{group}.{field}")))
        schedule = settings.get("optim.schedule")
        return found | ({"optim.warmup": usual_warmup(str(schedule))} if schedule in SCHEDULES else {})

    def _own(self, group: str, field: str, entry: str) -> Mapping[str, Any]:
        if (group, field, entry) not in self._known:
            kind = OPEN_GROUPS[group]
            keys_of_entry = kind.own_keys(field).get(kind.words(field, entry), ())  # none of a file, as of what is gone
            self._known[group, field, entry] = {f"{group}.{key.name}": _plain(key.default) for key in keys_of_entry}
        return self._known[group, field, entry]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def written(value: Any) -> str:
    """A value as it is typed on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(written, value)) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
