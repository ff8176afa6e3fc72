"""Methods side by side: a learning rate for each, several seeds, means with their intervals.

A comparison is a yaml file:

    baseline: lora                      the method the others are measured against
    seeds: [0, 1, 2]                    the first one chooses the learning rates
    settings: [train.steps=100]         of every run, as on the command line
    methods:
      lora: {settings: [optim=adamw], rates: [1.0e-3, 2.0e-3]}

Every (method, rate, seed) is a run directory of its own, so a comparison that was cut short goes on where it stopped.
Several processes may work on one comparison: each takes the runs no other is at.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

from lorafa.conf.compose import compose
from lorafa.errors import ConfigError, DivergedError, first_line
from lorafa.runs.differences import difference, differing
from lorafa.runs.experiment import start_run
from lorafa.runs.record import RunDirectory, TakenError
from lorafa.settings.checks import is_int
from lorafa.settings.typed import plain
from lorafa.storage.whole import write_json
from lorafa.train.memory import return_freed_memory
from lorafa.train.settings.run import RunConfig

RESULT = "comparison.json"
LOCKS = ".locks"
WAIT = 5.0
"""Seconds between looks at what other processes have done meanwhile."""
MORE_RATES = 2
"""How often the grid grows by one rate beyond its end when the best one lies there."""
OWN = {
    "optim.lr": "see rates",
    "train.seed": "see seeds",
    "run_dir": "every run has its own",
    "if_exists": "runs that are over are kept, others start anew",
    "train.resume": "a run that was cut short starts anew",
}
"""Settings that the comparison gives every run."""
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % points of Student's t with 1 to 9 degrees of freedom. More than ten seeds take the last one: their
interval is wider than it need be, by less than 16 %."""


@dataclass(frozen=True)
class Method:
    name: str
    settings: tuple[str, ...]
    rates: tuple[float, ...]
    """Learning rates to try with the first seed, rising."""


@dataclass(frozen=True)
class Choice:
    """The learning rate a method runs at with the other seeds."""

    rate: float
    at_end: bool
    """The best one lies at an end of the rates tried, so a better one may lie beyond."""
    diverged: bool
    """Every rate diverged: this is the lowest one tried, and no other seed runs at it."""


@dataclass(frozen=True)
class Plan:
    """A comparison as its file says it."""

    methods: tuple[Method, ...]
    baseline: str
    seeds: tuple[int, ...]
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
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} cannot be read as a comparison: {first_line(error)}.") from error
        keys = {"methods", "baseline", "seeds", "settings"}
        if not isinstance(values, Mapping) or set(values) != keys or not isinstance(values["methods"], Mapping):
            found = ", ".join(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
            raise ConfigError(f"{path} must hold {', '.join(sorted(keys))}, found {found}.")
        seeds = values["seeds"]
        if not isinstance(seeds, list) or not seeds or not all(map(is_int, seeds)) or len(set(seeds)) < len(seeds):
            raise ConfigError(f"{path}: seeds must be a list of different integers, found {seeds!r}. Write [0, 1, 2].")
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
        plan = cls(tuple(methods), str(values["baseline"]), tuple(seeds), settings)
        if plan.baseline not in values["methods"]:
            raise ConfigError(f"{path}: the baseline {plan.baseline!r} is none of {', '.join(values['methods'])}.")
        for each in plan.methods:
            for rate in each.rates:
                config = compose([*plan.overrides(each, rate, plan.seeds[0]), *extra])
                if config.data.eval_size == 0:
                    raise ConfigError(
                        f"{path}: runs are compared by held-out loss, and data.eval_size of {each.name} is 0."
                    )
        return plan

    def overrides(self, method: Method, rate: float, seed: int) -> list[str]:
        return [*self.settings, *method.settings, f"optim.lr={rate!r}", f"train.seed={seed}"]


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


def compare(
    plan: Plan,
    folder: Path,
    console: Console,
    extra: Sequence[str] = (),
    start: Callable[..., Path] = start_run,
) -> list[dict[str, Any]]:
    """Run what is not finished yet and return one row a method; rewritten to comparison.json after every run.

    Args:
        folder: holds one run directory a point, and the result.
        extra: settings of every run that come last (data, threads).
        start: starts one run.

    Raises:
        ConfigError: a finished run in ``folder`` had other settings.
        LoraError: a run failed, other than by diverging, which counts as an infinite loss: the rate is chosen only if
            all diverge, and a method with such a run has no mean (see :func:`rows`).
    """
    chosen: dict[str, Choice] = {}

    def run(method: Method, rate: float, seed: int) -> RunDirectory | None:
        """The run, which is over; None where another process is at it."""
        path = run_path(folder, method.name, rate, seed)
        config = compose([*plan.overrides(method, rate, seed), *extra, f"run_dir={path}"])
        lock = folder / LOCKS / method.name / f"{path.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(lock, blocking=False):
                title = f"{method.name}, learning rate {rate:.4g}, seed {seed}"
                return _finished(path, config) or _run(config, console, start, title)
        except (Timeout, TakenError):
            return None

    def work() -> bool:
        """Run what is missing and free; whether something is left to other processes."""
        busy = False
        for method in plan.methods:
            if method.name in chosen:
                continue
            choice = _choose(method, lambda m, r: _loss_of(run(m, r, plan.seeds[0])))
            if choice is None:
                busy = True
                continue
            chosen[method.name] = choice
            write_json(folder / RESULT, {"methods": rows(plan, folder, chosen)})
        for seed in plan.seeds[1:]:
            for method in (method for method in plan.methods if method.name in chosen):
                if not chosen[method.name].diverged:
                    busy |= run(method, chosen[method.name].rate, seed) is None
                    write_json(folder / RESULT, {"methods": rows(plan, folder, chosen)})
        return busy

    told = False
    while work():
        if not told:
            console.print("Waiting for runs that other processes are at.")
        told = True
        time.sleep(WAIT)
    return rows(plan, folder, chosen)


def _finished(path: Path, config: RunConfig) -> RunDirectory | None:
    """The run that is there, if it is over; one that was cut short is set aside.

    Raises:
        ConfigError: it is over and had other settings; TakenError where somebody is continuing it.
    """
    if not (path / "config.yaml").is_file():
        return None
    earlier = RunDirectory.open(path)
    if not is_over(earlier):
        with earlier.held():
            if not is_over(earlier):  # still: whoever held it may have ended it
                number = next(n for n in range(1, 1000) if not path.with_name(f"{path.name}.unfinished-{n}").exists())
                path.rename(path.with_name(f"{path.name}.unfinished-{number}"))
                return None
    _check_same(plain(config), plain(earlier.config()), path)
    return earlier


def _run(config: RunConfig, console: Console, start: Callable[..., Path], title: str) -> RunDirectory:
    console.rule(escape(title))
    run = RunDirectory(Path(str(config.run_dir)))
    try:
        start(config, console, ["lorafa", "compare"])
    except DivergedError as error:  # a result too, of the rate
        run.update_result(diverged=True)
        console.print(f"Diverged: {error}", markup=False, highlight=False)
    return_freed_memory()
    return run


def run_path(folder: Path, method: str, rate: float, seed: int) -> Path:
    """The run directory of one point."""
    return folder / method / f"lr-{rate:.4g}-seed-{seed}"


def is_over(run: RunDirectory) -> bool:
    """Whether the run finished or diverged: it has a :func:`final_loss` and is not run again."""
    result = run.result()
    return result.get("status") == "finished" or bool(result.get("diverged"))


def final_loss(run: RunDirectory) -> float:
    """Held-out loss after training, nats a token; inf where the run diverged or the loss is not finite.

    Raises:
        ConfigError: it holds no rows out.
    """
    result = run.result()
    if result.get("diverged"):
        return math.inf
    if "loss" not in result["after"]:
        raise ConfigError(
            f"The run {str(run.path)!r} holds no rows out, so it has no loss to be compared by. Set data.eval_size."
        )
    loss = float(result["after"]["loss"])
    return loss if math.isfinite(loss) else math.inf


def _loss_of(run: RunDirectory | None) -> float | None:
    return None if run is None else final_loss(run)


def _choose(method: Method, loss_at: Callable[[Method, float], float | None]) -> Choice | None:
    """The rate with the lowest loss; the grid grows where that is at one of its ends, downwards where all diverge.

    None where a loss that decides is not there yet.
    """
    rates, losses = list(method.rates), {}
    found = {rate: loss_at(method, rate) for rate in rates}
    for growth in range(MORE_RATES + 1):
        losses = {rate: loss for rate, loss in found.items() if loss is not None}
        if len(losses) < len(found):
            return None
        best = min(rates, key=lambda rate: losses[rate])  # the lowest of equals
        at_end = len(rates) > 1 and best in (rates[0], rates[-1])
        if not at_end or growth == MORE_RATES:
            break
        beside = rates[1] if best == rates[0] else rates[-2]
        more = float(f"{best * best / beside:.4g}")  # the digits its folder is named with
        found[more] = loss_at(method, more)
        rates = sorted(found)
    return Choice(best, at_end, diverged=math.isinf(losses[best]))


def rows(plan: Plan, folder: Path, chosen: Mapping[str, Choice]) -> list[dict[str, Any]]:
    """One row a method whose rate is chosen: held-out loss with its 95 % interval, difference from the baseline seed by
    seed, steps to the baseline's last loss on the way, seconds a step with the measurements on the way.

    Loss, difference and steps are None where a run of the method diverged: the mean of the others would say it is
    better than it is. Difference and steps are None where one of the baseline did.
    """
    runs = {name: _over(plan, folder, name, choice.rate) for name, choice in chosen.items()}
    baseline = runs.get(plan.baseline, {})
    if any(math.isinf(final_loss(run)) for run in baseline.values()):
        baseline = {}
    table = []
    for name, choice in chosen.items():
        losses = {seed: final_loss(run) for seed, run in runs[name].items()}
        diverged = sum(map(math.isinf, losses.values()))
        results = [result for run in runs[name].values() if (result := run.result()).get("status") == "finished"]
        against = {} if diverged or name == plan.baseline else baseline
        differences = [losses[seed] - final_loss(run) for seed, run in against.items() if seed in losses]
        seconds = [each["seconds"]["train"] / each["steps"] for each in results]
        table.append({
            "method": name,
            "lr": choice.rate,
            "at_end": choice.at_end,
            "seeds": len(losses),
            "diverged": diverged,
            "loss": None if diverged else interval(list(losses.values())),
            "difference": interval(differences) if differences else None,
            "steps_to_baseline": None if diverged else _mean_steps(runs[name].values(), baseline.values()),
            "seconds_a_step": statistics.mean(seconds) if seconds else None,
            "trainable": results[0]["parameters"]["trainable"] if results else None,
            "swept_with": plan.seeds[0],
        })  # fmt: skip
    return table


def _over(plan: Plan, folder: Path, method: str, rate: float) -> dict[int, RunDirectory]:
    """The runs of a method at a rate that are over, by seed."""
    at_rate = {seed: RunDirectory(run_path(folder, method, rate, seed)) for seed in plan.seeds}
    return {seed: run for seed, run in at_rate.items() if is_over(run)}


def _mean_steps(runs: Iterable[RunDirectory], baseline: Iterable[RunDirectory]) -> float | None:
    """The mean step at which runs reach the baseline's last loss on the way; None if one does not, or it has none."""
    ends = [curve[-1][1] for run in baseline if (curve := heldout_curve(run.metrics()))]
    if not ends:
        return None
    steps = [steps_to(run.metrics(), statistics.mean(ends)) for run in runs]
    reached = [step for step in steps if step is not None]
    return statistics.mean(reached) if steps and len(reached) == len(steps) else None


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and half the width of its 95 % interval (Student's t); None with a single value."""
    half = None
    if len(values) > 1:
        half = T_95[min(len(values) - 2, len(T_95) - 1)] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": statistics.mean(values), "half_width": half, "values": list(values)} if values else {}


def heldout_curve(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(step, held-out loss) of every measurement on the way."""
    return [(float(row["step"]), float(row["eval_loss"])) for row in metrics if "eval_loss" in row]


def steps_to(metrics: Sequence[Mapping[str, Any]], goal: float) -> float | None:
    """The step at which the held-out loss first reaches ``goal``, between two measurements by a straight line."""
    curve = heldout_curve(metrics)
    last_step, last_loss = 0.0, math.inf
    for step, loss in curve:
        if loss <= goal:
            share = 1.0 if math.isinf(last_loss) else (last_loss - goal) / (last_loss - loss)
            return last_step + (step - last_step) * share
        last_step, last_loss = step, loss
    return None


def _check_same(now: Mapping[str, Any], then: Mapping[str, Any], path: Path) -> None:
    different = differing(now, then)
    if different:
        raise ConfigError(
            f"{path} is finished, but with other settings ({', '.join(different)}) than this comparison's: "
            f"{difference(different[0], now[different[0]], then.get(different[0]))}. Give another folder."
        )
