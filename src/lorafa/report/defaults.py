"""Which settings of a run are not the default ones, found without loading torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from lorafa.conf.compose import OPEN_GROUPS, composed
from lorafa.report.values import flat
from lorafa.runs.differences import ELSEWHERE
from lorafa.settings.typed import keys
from lorafa.train.settings.optim import usual_warmup
from lorafa.train.settings.run import RunConfig
from lorafa.train.settings.schedules import SCHEDULES


class Defaults:
    """The settings of the default run, and of what a run has chosen instead: those of an optimizer are its own."""

    def __init__(self) -> None:
        given = OmegaConf.to_container(composed(), resolve=True)
        assert isinstance(given, dict)
        self._of_classes = {key.name: _plain(key.default) for key in keys(RunConfig)}
        self._values = self._of_classes | flat({str(group): value for group, value in given.items()})
        self._known: dict[tuple[str, str, str], Mapping[str, Any]] = {}

    def changed(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The flat settings of a run that are not the default ones, but for the place it was written to."""
        own, missing = self._settled(settings), object()
        return {
            name: value
            for name, value in settings.items()
            if name not in ELSEWHERE
            and value != own.get(name, self._values.get(name, missing))
            and not (value is None and name not in self._values)
        }

    def _settled(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What the chosen entries bring: their own settings, the rate of an optimizer, the warm-up of a schedule."""
        found: dict[str, Any] = {}
        for group, kind in OPEN_GROUPS.items():
            for field in kind.opens:
                entry, usual = settings.get(f"{group}.{field}"), self._values.get(f"{group}.{field}")
                own = dict(self._own(group, field, str(entry)))
                if entry == usual:  # files of settings say what it has
                    own |= {name: self._values[name] for name in own if self._values.get(name) is not None}
                elif field == next(iter(kind.opens)):  # they say it of the usual one alone
                    common = {name: value for name, value in self._of_classes.items() if name.startswith(f"{group}.")}
                    own = common | {f"{group}.{field}": usual} | own
                found |= own
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
