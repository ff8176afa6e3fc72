"""What a comparison runs, as its yaml file says it: methods, their learning rates, and which seeds do what."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from lorafa.conf.compose import compose
from lorafa.errors import ConfigError, first_line
from lorafa.settings.checks import is_int
from lorafa.storage.parsed import from_yaml

RESULT = "comparison.json"
"""What a comparison writes into its folder beside the runs."""
OWN = {
    "optim.lr": "see rates",
    "train.seed": "see seeds",
    "run_dir": "every run has its own",
    "if_exists": "runs that are over are kept, others start anew",
    "train.resume": "a run that was cut short starts anew",
}
"""Settings that the comparison gives every run."""


@dataclass(frozen=True)
class Method:
    """A line of the comparison's table: what it sets, and the rates it is tried at."""

    name: str
    settings: tuple[str, ...]
    rates: tuple[float, ...]
    """Learning rates to choose from, rising; a single one is given, and nothing is chosen."""


@dataclass(frozen=True)
class Plan:
    """A comparison as its file says it."""

    methods: tuple[Method, ...]
    baseline: str
    choose: tuple[int, ...]
    """Seeds that choose the learning rates; none where every method has a single one."""
    seeds: tuple[int, ...]
    """Seeds that are reported: others than those that choose, unless there is one seed in all."""
    settings: tuple[str, ...]

    @classmethod
    def read(cls, path: str | Path, extra: Sequence[str] = ()) -> Plan:
        """The plan in a yaml file; the settings of every run are composed here: a mistake shows before the first run.

        Args:
            extra: settings of every run that come last.

        Raises:
            ConfigError: the file is not readable as a plan, or a setting is wrong.
        """
        try:
            values = from_yaml(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path} cannot be read as a comparison: {first_line(error)}. Correct it, or name another file."
            ) from error
        keys = {"methods", "baseline", "seeds", "settings"}
        of_keys = isinstance(values, Mapping) and set(values) - {"choose"} == keys
        if not of_keys or not isinstance(values["methods"], Mapping):
            found = ", ".join(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
            raise ConfigError(
                f"{path} must hold {', '.join(sorted(keys))} (and may hold choose), found {found}. See recipes/."
            )
        settings, methods = _settings(path, "settings", values["settings"]), []
        _settings("the command", "key=value", list(extra))
        for name, method in values["methods"].items():
            rates = _rates(method.get("rates")) if isinstance(method, Mapping) else ()
            if not rates or set(method) != {"settings", "rates"}:
                raise ConfigError(
                    f"{path}: {name} must hold settings and rates (numbers > 0, rising), found {method!r}. "
                    "Numbers are written with a point: 1.0e-3."
                )
            if not re.fullmatch(r"[\w.+-]+", str(name)) or set(str(name)) == {"."}:
                raise ConfigError(f"{path}: {name!r} cannot name a folder. Use letters, digits and - _ . + in names.")
            methods.append(Method(str(name), _settings(path, str(name), method["settings"]), rates))
        choose, seeds = _roles(path, values, swept=any(len(method.rates) > 1 for method in methods))
        plan = cls(tuple(methods), str(values["baseline"]), choose, seeds, settings)
        if plan.baseline not in values["methods"]:
            known = ", ".join(method.name for method in methods)
            raise ConfigError(f"{path}: the baseline {plan.baseline!r} is none of {known}. Name one of them.")
        for each in plan.methods:
            for rate in each.rates:
                config = compose([*plan.overrides(each, rate, plan.seeds[0]), *extra])
                if config.data.eval_size == 0:
                    raise ConfigError(
                        f"{path}: runs are compared by held-out loss, and data.eval_size of {each.name} is 0. "
                        "Give it rows to hold out."
                    )
        return plan

    def overrides(self, method: Method, rate: float, seed: int) -> list[str]:
        return [*self.settings, *method.settings, f"optim.lr={rate!r}", f"train.seed={seed}"]


def _roles(path: str | Path, values: Mapping[str, object], swept: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The seeds that choose the rates, and those that are reported.

    Args:
        swept: some method has several rates.
    """
    seeds = _seeds(path, "seeds", values["seeds"])
    if values.get("choose") is None:
        if not swept:
            return (), seeds
        return seeds[:1], seeds[1:] or seeds
    choose = _seeds(path, "choose", values["choose"])
    if not swept:
        raise ConfigError(f"{path}: choose names seeds, but no method has several rates to choose from. Leave it out.")
    if both := sorted(set(choose) & set(seeds)):
        raise ConfigError(
            f"{path}: seeds that choose a rate are not reported, found {', '.join(map(str, both))} in choose and in "
            "seeds. Name others in one of them."
        )
    return choose, seeds


def _seeds(path: str | Path, key: str, given: object) -> tuple[int, ...]:
    if not isinstance(given, list) or not given or not all(map(is_int, given)) or len(set(given)) < len(given):
        raise ConfigError(f"{path}: {key} must be a list of different integers, found {given!r}. Write [0, 1, 2].")
    return tuple(given)


def _rates(given: object) -> tuple[float, ...]:
    """Numbers > 0 that rise in the four digits their folders are named with; empty where they do not."""
    if not isinstance(given, list) or not all(isinstance(rate, float) and rate > 0 for rate in given):
        return ()
    shown = [float(f"{rate:.4g}") for rate in given]
    return tuple(given) if all(low < high for low, high in pairwise(shown)) else ()


def _settings(path: str | Path, where: str, given: object) -> tuple[str, ...]:
    """A list of key=value that leaves alone what the comparison itself sets, or its table would be wrong."""
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise ConfigError(f"{path}: {where} must be a list of settings, found {given!r}. Write [train.steps=100].")
    for text in given:
        key = text.lstrip("+").partition("=")[0]
        if key in OWN:
            raise ConfigError(
                f"{path}: {where} sets {text!r}, but {key} is the comparison's: {OWN[key]}. Leave it out."
            )
    return tuple(given)


def run_path(folder: Path, method: str, rate: float, seed: int) -> Path:
    """The run directory of one point."""
    return folder / method / f"lr-{rate:.4g}-seed-{seed}"
