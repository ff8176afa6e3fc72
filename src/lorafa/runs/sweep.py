"""A run for each combination of settings: Hydra's grammar says which, Hydra's launchers say where.

Every point is a run directory of its own in the sweep's folder, named by the settings that vary, so a sweep that was
cut short goes on where it stopped: what is finished stays, what broke off is continued. A point that fails is recorded,
and the others are run all the same. Several processes may work on one sweep: each takes the points no other is at.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from filelock import FileLock, Timeout
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from rich.console import Console
from rich.markup import escape

from lorafa.conf.compose import OF_HYDRA, quoted
from lorafa.errors import ConfigError, first_line, shorten
from lorafa.launch import begin_anew
from lorafa.processes import from_main, is_main, world_size
from lorafa.runs import CONFIG
from lorafa.runs.comparison import LOCKS, WAIT
from lorafa.runs.experiment import begun, start_run
from lorafa.runs.record import RunDirectory, TakenError
from lorafa.runs.secrets import refuse_secrets
from lorafa.settings.typed import plain
from lorafa.storage.paths import user_path
from lorafa.storage.whole import make_folder, read_json, write_json
from lorafa.train.memory import return_freed_memory
from lorafa.train.settings.run import RunConfig

RESULT, FAILED = "sweep.json", ".failed"
LONGEST = 120
"""Letters of a directory's name; a longer one ends in a digest."""
FOLDER = "hydra.sweep.dir"


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    """The name of its directory."""
    settings: tuple[str, ...]
    """The settings that vary from point to point."""
    words: tuple[str, ...]
    """All that was said, each with one value."""


@dataclass(frozen=True)
class Sweep:
    """Points with the run of each, and how they are launched."""

    points: tuple[Point, ...]
    configs: tuple[RunConfig, ...]
    folder: Path
    launch: tuple[str, ...] = ()
    """Settings of Hydra's own: ``hydra/launcher=joblib``."""


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings of the runs, and those of Hydra's own."""
    of_hydra = [word for word in words if word.lstrip("+").startswith(OF_HYDRA)]
    return [word for word in words if word not in of_hydra], of_hydra


def points_of(words: Sequence[str], options: Callable[[str], Sequence[str]]) -> list[Point]:
    """Each combination of the values that ``a,b``, ``choice(a,b)``, ``range(1,4)`` and ``glob(*)`` name.

    Args:
        options: group -> its options, among which ``glob`` chooses.

    Raises:
        ConfigError: several values that cannot be listed, as those of an interval.
    """
    keys = [word.lstrip("+").partition("=")[0] for word in words]
    last = [word for place, word in enumerate(words) if keys[place] not in keys[place + 1 :]]
    ways = [_values(word, options) for word in last]
    points = {}
    for chosen in itertools.product(*(texts for texts, _ in ways)):
        varied = [text.lstrip("+") for text, (_, varies) in zip(chosen, ways, strict=True) if varies]
        point = Point(_name(varied), tuple(varied), chosen)
        points[point.name] = point
    return list(points.values())


class _Options:
    """What Hydra's parser asks for the options of a group."""

    def __init__(self, options: Callable[[str], Sequence[str]]) -> None:
        self._options = options

    def get_group_options(self, group: str, **_: Any) -> list[str]:
        return list(self._options(group))


def _values(word: str, options: Callable[[str], Sequence[str]]) -> tuple[list[str], bool]:
    """The word once for each value it names, and whether it names several; what the grammar cannot read is one text."""
    try:
        (parsed,) = OverridesParser.create(config_loader=_Options(options)).parse_overrides([word])
    except HydraException:
        return [word], False
    if not parsed.is_sweep_override():
        return [word], False
    if not parsed.is_discrete_sweep():
        raise ConfigError(f"The values of {word!r} cannot be listed. Name them: a,b or range(1,4) or choice(a,b).")
    values = list(dict.fromkeys(parsed.sweep_string_iterator()))
    if not values:
        raise ConfigError(f"{word!r} names no value. Check its bounds, or the pattern.")
    return [f"{parsed.get_key_element()}={value}" for value in values], True


def _name(varied: Sequence[str]) -> str:
    whole = ",".join(varied)
    name = re.sub(r"[^\w.=,+-]", "_", whole)
    if len(name) <= LONGEST and name == whole:
        return name
    return f"{name[:LONGEST]}-{hashlib.blake2b(whole.encode(), digest_size=4).hexdigest()}"


def planned(points: Sequence[Point], configs: Sequence[RunConfig], launch: Sequence[str]) -> Sweep:
    """The sweep over these points; all that can be wrong with a setting is said here, before the first run.

    Its folder is the ``run_dir`` of its settings, or ``hydra.sweep.dir``, or ``runs/<date>-<time>-sweep``.

    Raises:
        ConfigError: the folder is a run, or holds a point with other settings; a run would be continued elsewhere; a
            setting holds a secret.
    """
    words = [word for word in launch if word.lstrip("+").partition("=")[0] != FOLDER]
    given = [word.partition("=")[2].strip("'\"") for word in launch if word not in words]
    named = {config.run_dir for config in configs}
    if len(named) > 1:
        raise ConfigError(
            f"The runs would lie in several places, {shorten(map(str, sorted(named, key=str)), 3)}, and a sweep has "
            "one folder, in which each run is called by the settings that vary. Give one run_dir (one wandb.name)."
        )
    own = next(iter(named))
    folder = user_path(own or (given or [f"runs/{datetime.now().strftime('%Y%m%d-%H%M%S')}-sweep"])[-1])
    if (folder / CONFIG).is_file():
        raise ConfigError(f"{str(folder)!r} is a run, and a sweep is a folder of runs. Give it another run_dir.")
    if any(config.train.resume for config in configs):
        raise ConfigError("A sweep continues its own runs, found train.resume. Leave it out, or leave out -m.")
    placed = [
        replace(config, run_dir=str(folder / point.name), if_exists="resume")
        for point, config in zip(points, configs, strict=True)
    ]
    for config in placed:
        refuse_secrets(plain(config))
        begun(config)
    return Sweep(tuple(points), tuple(placed), folder, tuple(words))


def sweep(
    plan: Sweep, console: Console, command: Sequence[str], start: Callable[..., Path] = start_run
) -> list[dict[str, Any]]:
    """Run what is not finished yet, and return one row a point; written to sweep.json too.

    Under `accelerate launch` or `torchrun` all processes walk the same points in the same order.

    Args:
        start: starts one run.

    Raises:
        ConfigError: the launcher is not there, or cannot be set up so.
        TrainingError: one of the processes is still in a point that has failed in another.
    """
    together, since = world_size() > 1, time.time()
    job = _Job(plan, tuple(command), since, together, start, _Screen(console))
    left = from_main(lambda: [number for number in range(len(plan.points)) if not _is_over(plan, number, since)])
    if together:
        for number in left:
            begin_anew()  # whatever has become of the point before
            _launch(job, [number])
        begin_anew()
        left = []
    told = False
    while left:
        _launch(job, left)
        left = [number for number in left if not _is_over(plan, number, since)]
        if left:
            if not told:
                console.print("Waiting for runs that other processes are at.")
            told = True
            time.sleep(WAIT)
    found = from_main(lambda: rows(plan))
    if is_main():
        make_folder(plan.folder)
        write_json(plan.folder / RESULT, {"points": found})
    return found


def rows(plan: Sweep) -> list[dict[str, Any]]:
    """One row a point: name, settings, status (finished, failed, unfinished, not begun), its error, the held-out loss
    after the training or else the last of the training, and the directory."""
    return [_row(plan, number) for number in range(len(plan.points))]


def _row(plan: Sweep, number: int) -> dict[str, Any]:
    point, run = plan.points[number], RunDirectory(plan.folder / plan.points[number].name)
    result, failure = run.result(), _failure(plan.folder, point)
    status = result.get("status")
    if status != "finished":
        status = "failed" if failure else "unfinished" if status else "not begun"
    loss = (result.get("after") or {}).get("loss")
    if loss is None:
        loss = next((row["loss"] for row in reversed(run.metrics()) if "loss" in row), None)
    return {
        "name": point.name,
        "settings": list(point.settings),
        "status": status,
        "error": failure.get("error") if status == "failed" else None,
        "loss": loss,
        "directory": str(run.path),
    }


def _is_over(plan: Sweep, number: int, since: float) -> bool:
    """Whether a point is finished, or has failed since this sweep began here."""
    point = plan.points[number]
    if RunDirectory(plan.folder / point.name).result().get("status") == "finished":
        return True
    return float(_failure(plan.folder, point).get("at", 0.0)) >= since


def _failure(folder: Path, point: Point) -> dict[str, Any]:
    path = folder / FAILED / f"{point.name}.json"
    return read_json(path) if path.is_file() else {}


# ---- launching ------------------------------------------------------------------------------------------------------


class _Screen:
    """A console in the process it belongs to; where a launcher has carried the job elsewhere, a quiet one."""

    def __init__(self, console: Console | None) -> None:
        self._console = console

    def __getstate__(self) -> dict[str, Any]:
        return {"_console": None}

    def get(self) -> Console:
        return self._console or Console(quiet=True)


@dataclass(frozen=True)
class _Job:
    """What a launcher calls for each point, here or in another process."""

    plan: Sweep
    command: tuple[str, ...]
    since: float
    together: bool
    start: Callable[..., Path]
    screen: _Screen

    def __call__(self, asked: Any) -> None:
        """Run the point of that number; what goes wrong is recorded, for others are to follow."""
        number, folder = int(asked.point), self.plan.folder
        point, console = self.plan.points[number], self.screen.get()
        try:
            with nullcontext() if self.together else _taken(folder, point):
                if not self.together and _is_over(self.plan, number, self.since):
                    return  # by another process meanwhile
                console.rule(escape(" ".join(point.settings)))
                self.start(self.plan.configs[number], console, self.command)
                (folder / FAILED / f"{point.name}.json").unlink(missing_ok=True)
        except (Timeout, TakenError):
            return
        except Exception as error:
            console.print(f"Failed: {error}", markup=False, highlight=False, soft_wrap=True)
            if is_main():
                text = f"{type(error).__name__}: {first_line(error)}"
                make_folder(folder / FAILED)
                where = traceback.format_exc()
                write_json(
                    folder / FAILED / f"{point.name}.json", {"error": text, "at": time.time(), "traceback": where}
                )
        finally:
            return_freed_memory()


@contextmanager
def _taken(folder: Path, point: Point) -> Iterator[None]:
    make_folder(folder / LOCKS)
    with FileLock(folder / LOCKS / f"{point.name}.lock", blocking=False):
        yield


def _launch(job: _Job, numbers: Sequence[int]) -> None:
    """Have Hydra's sweeper and the launcher asked for call the job for each of these points."""
    words = [
        f"+point={','.join(map(str, numbers))}",
        f"{FOLDER}={quoted(str((job.plan.folder / '.hydra').absolute()))}",
        "hydra.sweep.subdir=.",
        "hydra.output_subdir=null",
        "hydra/hydra_logging=none",
        "hydra/job_logging=none",
        *job.plan.launch,
    ]
    try:
        with hydra.initialize(config_path=None, version_base="1.3"):
            GlobalHydra.instance().hydra.multirun(None, job, words, with_log_configuration=False)
    except HydraException as error:
        raise ConfigError(
            f"The sweep cannot be launched with {' '.join(job.plan.launch) or 'the basic launcher'!r}: "
            f"{first_line(error)}. hydra/launcher= takes basic, and what the packages hydra-joblib-launcher (joblib), "
            "hydra-ray-launcher (ray) and hydra-submitit-launcher (submitit_slurm) bring."
        ) from error
