"""Methods side by side: a learning rate for each, several seeds, means with their intervals.

A comparison is a yaml file:

    baseline: lora                      the method the others are measured against
    choose: [0]                         seeds that choose the learning rates
    seeds: [1, 2, 3]                    seeds that are reported
    settings: [train.steps=100]         of every run, as on the command line
    methods:
      lora: {settings: [optim=adamw], rates: [1.0e-3, 2.0e-3]}

Without ``choose`` the first of the seeds chooses and the others are reported: the lowest of several losses is lower
than losses of its kind are on average, so a seed that has chosen would flatter what it chose.

Every (method, rate, seed) is a run directory of its own, so a comparison that was cut short goes on where it stopped.
Several processes may work on one comparison: each takes the runs no other is at. One with another plan, whose table
would stand in the same place, is refused while they do.
"""

from __future__ import annotations

import hashlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

from lorafa.conf.compose import compose
from lorafa.errors import ConfigError, DivergedError
from lorafa.runs.differences import ELSEWHERE, difference, differing
from lorafa.runs.experiment import start_run
from lorafa.runs.measures import final_loss, heldout_curve, is_over, samples_of, spread, step_seconds, steps_to_baseline
from lorafa.runs.places import with_whole_paths
from lorafa.runs.plan import RESULT, Method, Plan, run_path
from lorafa.runs.record import RunDirectory, TakenError
from lorafa.runs.student import interval
from lorafa.settings.typed import plain
from lorafa.storage.leavings import locked
from lorafa.storage.whole import make_folder, write_json
from lorafa.train.memory import return_freed_memory
from lorafa.train.settings.run import RunConfig

LOCKS = ".locks"
WAIT = 5.0
"""Seconds between looks at what other processes have done meanwhile."""
MORE_RATES = 2
"""How often the grid grows by one rate beyond its end when the best one lies there."""


@dataclass(frozen=True)
class Choice:
    """The learning rate a method runs at with the seeds that are reported."""

    rate: float
    at_end: bool
    """The best one lies at an end of the rates tried, so a better one may lie beyond."""
    diverged: bool
    """Every rate diverged: this is the lowest one tried, and no other seed runs at it."""


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
        ConfigError: a finished run in ``folder`` had other settings, or saw other samples than the others; another
            process is at another comparison there.
        LoraError: a run failed, other than by diverging, which counts as an infinite loss: the rate is chosen only if
            all diverge, and a method with such a run has no mean (see :func:`rows`).
    """
    with _one_plan(make_folder(folder), plan, extra):
        return _compared(plan, folder, console, extra, start)


def _compared(
    plan: Plan, folder: Path, console: Console, extra: Sequence[str], start: Callable[..., Path]
) -> list[dict[str, Any]]:
    chosen: dict[str, Choice] = {}
    samples = _Samples(plan, folder)

    def run(method: Method, rate: float, seed: int) -> RunDirectory | None:
        """The run, which is over; None where another process is at it."""
        path = run_path(folder, method.name, rate, seed)
        config = compose([*plan.overrides(method, rate, seed), *extra, f"run_dir={path}"])
        lock = folder / LOCKS / method.name / f"{path.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(lock, blocking=False):
                title = f"{method.name}, learning rate {rate:.4g}, seed {seed}"
                command = ["lorafa", "train", *plan.overrides(method, rate, seed), *extra, f"run_dir={path}"]
                found = _finished(path, config) or _run(config, console, start, title, command, samples.seen)
        except (Timeout, TakenError):
            return None
        samples.require_same(found)
        return found

    def loss(method: Method, rate: float) -> float | None:
        """The mean held-out loss over the seeds that choose; None where one is not there yet."""
        runs = [run(method, rate, seed) for seed in plan.choose]
        losses = [final_loss(each) for each in runs if each is not None]
        return statistics.mean(losses) if len(losses) == len(runs) else None

    def work() -> bool:
        """Run what is missing and free; whether something is left to other processes."""
        busy = False
        for method in plan.methods:
            if method.name in chosen:
                continue
            choice = _choose(method, loss) if len(method.rates) > 1 else Choice(method.rates[0], False, False)
            if choice is None:
                busy = True
                continue
            chosen[method.name] = choice
            write_json(folder / RESULT, summary(plan, folder, chosen))
        for seed in plan.seeds:
            for method in (method for method in plan.methods if method.name in chosen):
                if not chosen[method.name].diverged:
                    busy |= run(method, chosen[method.name].rate, seed) is None
                    write_json(folder / RESULT, summary(plan, folder, chosen))
        return busy

    told = False
    while work():
        if not told:
            console.print("Waiting for runs that other processes are at.")
        told = True
        time.sleep(WAIT)
    return rows(plan, folder, chosen)


@contextmanager
def _one_plan(folder: Path, plan: Plan, extra: Sequence[str]) -> Iterator[None]:
    """Inside the block no process begins another comparison in the folder; the locks go with their processes.

    Raises:
        ConfigError: one is at another comparison there.
    """
    said = [text for text in extra if text.lstrip("+").partition("=")[0] not in ELSEWHERE]
    own = make_folder(folder / LOCKS) / f"{hashlib.sha256(repr((plan, said)).encode()).hexdigest()[:16]}.plan"
    descriptor = os.open(own, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        mine = locked(descriptor, shared=True) is not False
        if not mine or any(_is_held(other) for other in own.parent.glob("*.plan") if other != own):
            raise TakenError(
                f"{folder} is taken: another process is at a comparison there, of another plan or with other settings. "
                "Wait until that one has ended, or give another folder."
            )
        yield
    finally:
        os.close(descriptor)


def _is_held(file: Path) -> bool:
    try:
        descriptor = os.open(file, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return locked(descriptor) is False
    finally:
        os.close(descriptor)


class _Samples:
    """The samples that the runs of a comparison see, which are to be the same."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._by: RunDirectory | None = None
        self.seen: str | None = None
        for method in plan.methods:
            for settings in sorted((folder / method.name).glob("lr-*/config.yaml")):
                run = RunDirectory(settings.parent)
                if self.seen is None and ".unfinished-" not in run.path.name and is_over(run):
                    self._take(run)

    def _take(self, run: RunDirectory) -> None:
        self._by, self.seen = run, samples_of(run)

    def require_same(self, run: RunDirectory) -> None:
        """Raises ConfigError for a run that saw others; one that was recorded without a digest is let through, and
        counted in the result."""
        if self.seen is None or self._by is None:
            self._take(run)
            return
        own = samples_of(run)
        if own in (None, self.seen):
            return
        now, then = run.config(), self._by.config()
        same = plain(now)["data"] == plain(then)["data"]
        why = (
            "their settings of data are the same, so the records or the tokenizer have changed in between"
            if same
            else difference("data", plain(now)["data"], plain(then)["data"])
        )
        raise ConfigError(
            f"{run.path} saw other samples than {self._by.path} (samples_sha256 {own!s:.12} and {self.seen:.12}): "
            f"{why}. A table over both would compare data, not methods. Give another folder, or restore the records "
            "and remove the runs that saw others."
        )


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
    _check_same(with_whole_paths(plain(config)), with_whole_paths(plain(earlier.config())), path)
    return earlier


def _run(
    config: RunConfig,
    console: Console,
    start: Callable[..., Path],
    title: str,
    command: Sequence[str],
    samples: str | None,
) -> RunDirectory:
    """Make a run, which records the command that would make it alone."""
    console.rule(escape(title))
    run = RunDirectory(Path(str(config.run_dir)))
    try:
        start(config, console, command, samples=samples)
    except DivergedError as error:  # a result too, of the rate
        run.update_result(diverged=True)
        console.print(f"Diverged: {error}", markup=False, highlight=False)
    return_freed_memory()
    return run


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


def summary(plan: Plan, folder: Path, chosen: Mapping[str, Choice]) -> dict[str, Any]:
    """What comparison.json holds: the rows, which seeds chose and which are reported, and whether all saw the same."""
    reported = [run for name, choice in chosen.items() for run in _reported(plan, folder, name, choice).values()]
    return {
        "methods": rows(plan, folder, chosen),
        "baseline": plan.baseline,
        "choose": list(plan.choose),
        "seeds": list(plan.seeds),
        "samples_sha256": next((digest for run in reported if (digest := samples_of(run))), None),
        "without_digest": sum(samples_of(run) is None and not run.result().get("diverged") for run in reported),
    }


def rows(plan: Plan, folder: Path, chosen: Mapping[str, Choice]) -> list[dict[str, Any]]:
    """One row a method whose rate is chosen, in the order of the plan: held-out loss with its 95 % interval, difference
    from the baseline seed by seed with an interval for the number of differences, steps to the baseline's last loss on
    the way, seconds a step.

    Loss, difference and steps are None where a run of the method diverged: the mean of the others would say it is
    better than it is. Difference and steps are None where one of the baseline did.
    """
    # several processes choose in the order in which runs end
    chosen = {method.name: chosen[method.name] for method in plan.methods if method.name in chosen}
    runs = {name: _reported(plan, folder, name, choice) for name, choice in chosen.items()}
    baseline = runs.get(plan.baseline, {})
    if any(math.isinf(final_loss(run)) for run in baseline.values()):
        baseline = {}
    table = []
    for name, choice in chosen.items():
        losses = {seed: final_loss(run) for seed, run in runs[name].items()}
        diverged = sum(map(math.isinf, losses.values()))
        against = {} if diverged or name == plan.baseline else baseline
        differences = [losses[seed] - final_loss(run) for seed, run in against.items() if seed in losses]
        curves, of_baseline = ([heldout_curve(r.metrics()) for r in each.values()] for each in (runs[name], baseline))
        table.append({
            "method": name,
            "lr": choice.rate,
            "at_end": choice.at_end,
            "seeds": len(losses),
            "diverged": diverged,
            "loss": None if diverged else interval(list(losses.values())),
            "difference": interval(differences, len(plan.methods) - 1) if differences else None,
            "steps_to_baseline": None if diverged else steps_to_baseline(curves, of_baseline),
            **_costs(list(runs[name].values())),
            "swept_with": list(plan.choose),
        })  # fmt: skip
    return table


def _costs(runs: Sequence[RunDirectory]) -> dict[str, Any]:
    """What the finished runs took: seconds a step with their spread, peaks where they are the runs' own, parameters."""
    results = [result for run in runs if (result := run.result()).get("status") == "finished"]
    own = [int(each["peak_rss_bytes"]) for each in results if each.get("peak_rss_of") == "run"]
    device = [int(each["peak_device_bytes"]) for each in results if each.get("peak_device_bytes") is not None]
    kept = [result["kept_step"] for result in results if result.get("kept_step") is not None]
    return {
        "seconds_a_step": spread([second for run in runs for second in step_seconds(run.metrics())]),
        "peak_rss_bytes": max(own) if own and len(own) == len(results) else None,
        "peak_device_bytes": max(device) if device and len(device) == len(results) else None,
        "trainable": results[0]["parameters"]["trainable"] if results else None,
        **({"kept_steps": kept} if kept else {}),
    }


def _reported(plan: Plan, folder: Path, method: str, choice: Choice) -> dict[int, RunDirectory]:
    """The runs of a method that its row is made of and that are over, by seed; where every rate diverged, those that
    were to choose."""
    seeds = plan.choose if choice.diverged else plan.seeds
    at_rate = {seed: RunDirectory(run_path(folder, method, choice.rate, seed)) for seed in seeds}
    return {seed: run for seed, run in at_rate.items() if is_over(run)}


def _check_same(now: Mapping[str, Any], then: Mapping[str, Any], path: Path) -> None:
    different = differing(now, then)
    if different:
        raise ConfigError(
            f"{path} is finished, but with other settings ({', '.join(different)}) than this comparison's: "
            f"{difference(different[0], now[different[0]], then.get(different[0]))}. Give another folder."
        )
