"""One run, one directory. Every file is whole at any moment; a crash leaves everything recorded before it.

config.yaml        all settings, resolved
environment.json   versions, processor, threads, processes, the command
metrics.jsonl      one line a logged step
result.json        status, what was measured before and after, times, sizes; rewritten as the run goes on
checkpoints/       what a continued run starts from
adapter/           the trained adapter in PEFT's format; with peft.full the whole model in model/
merged/            the whole model with the adapter in its weights, where train.save_merged asks for it
report.html        written by lorafa.report
.lock              held by the process that writes all this; the system lets go of it when that ends
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from lorafa.errors import CheckpointError, ConfigError, first_line, shorten, warn
from lorafa.runs import CONFIG
from lorafa.runs.formats import current
from lorafa.runs.places import with_whole_paths
from lorafa.runs.secrets import masked
from lorafa.runs.strict import finite
from lorafa.settings.typed import build, plain
from lorafa.storage.leavings import is_temporary, remove_left_over
from lorafa.storage.parsed import from_json, from_yaml
from lorafa.storage.paths import user_path, why_not_made
from lorafa.storage.whole import make_folder, read_json, write_json, written_whole
from lorafa.train.checkpoints import newest_whole
from lorafa.train.settings.init import InitConfig
from lorafa.train.settings.run import RunConfig
from lorafa.train.settings.trust import trusting

ENVIRONMENT, METRICS, RESULT = "environment.json", "metrics.jsonl", "result.json"
LOCK = ".lock"
NUMBERS = 1000
"""Runs that may start within one second under one parent."""


class TakenError(ConfigError):
    """Another process is writing to the run."""


class RunDirectory:
    """Reads and writes the files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / "adapter"
        self.model = path / "model"
        self.checkpoints = path / "checkpoints"
        self.merged = path / "merged"

    @staticmethod
    def place(config: RunConfig) -> Path:
        """Where the run is to be written: ``config.run_dir``, or a new directory under ``runs/``, or for
        ``if_exists=new`` the next free name. Makes nothing yet.

        Raises:
            ConfigError: the directory exists and is not empty, or cannot be made where it is to be.
        """
        numbered = _is_numbered(config)
        path = _free(_names(config)) if numbered else user_path(str(config.run_dir))
        there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
        usable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        if why := why_not_made(path.absolute(), there):
            raise ConfigError(f"The run directory {str(path)!r} cannot be made: {why}. Choose another run_dir.")
        if not usable and os.path.lexists(there):  # or another run that came to nothing has just taken it away
            why = "cannot be written to" if there.is_dir() else "is not a folder"
            raise ConfigError(
                f"The run directory {str(path)!r} cannot be made: {str(there)!r} {why}. Choose another run_dir."
            )
        if not numbered and os.path.isdir(path) and not _is_empty(path):  # a number is free, or the next one is taken
            raise ConfigError(
                f"The run directory {str(path)!r} exists and is not empty; a run overwrites nothing. "
                f"Choose another run_dir, or if_exists=new, or continue that run: train.resume={path}"
            )
        return path

    @classmethod
    @contextmanager
    def claimed(cls, config: RunConfig) -> Iterator[RunDirectory]:
        """A new directory, where :meth:`place` says, that is this process's alone until the block ends.

        It is made, or locked where it is there and empty, in one step that one of several processes can take. A block
        that wrote nothing into it leaves nothing behind.

        Raises:
            ConfigError: as :meth:`place`; TakenError where another process was first.
        """
        path = cls.place(config)
        try:
            path, made = _make_first(_names(config)) if _is_numbered(config) else (path, _make(path, or_take=True))
        except OSError as error:
            raise ConfigError(
                f"The run directory {str(path)!r} cannot be made: {error.strerror or error}. Choose another run_dir."
            ) from error
        run = cls(path)
        with run.held():
            if not _is_empty(path) or not (path / LOCK).exists():  # another was here between the look and the lock
                raise TakenError(run._taken())
            try:
                yield run
            finally:
                if _is_empty(path):
                    _remove(path, made)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else claims or holds the run inside the block; the lock goes with the process, however that ends.

        What killed processes have left half written is removed.

        Raises:
            TakenError: another process holds it.
            ConfigError: it cannot be locked.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / LOCK, blocking=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise TakenError(self._taken()) from error
        except (OSError, NotImplementedError) as error:
            raise ConfigError(
                f"The run {str(self.path)!r} cannot be locked against other processes: {first_line(error)}. Put it "
                "where this process may write, on a file system with locks."
            ) from error
        try:
            remove_left_over(self.path, "*")
            yield
        finally:
            lock.release()

    def _taken(self) -> str:
        return (
            f"The run {str(self.path)!r} is taken: another process is writing to it. Nothing of it was changed. Wait "
            "until that one has ended, or start a run in another run_dir."
        )

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> RunDirectory:
        """Make the directory, if it is not there, and write the settings into it, with absolute paths."""
        run = cls(make_folder(path))
        run._write(CONFIG, yaml.safe_dump(with_whole_paths(plain(config)), sort_keys=False, allow_unicode=True))
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """An existing run.

        Raises:
            ConfigError: the path is no run directory.
        """
        path = user_path(path)
        if not os.path.isfile(path / CONFIG):
            kind = "is a file" if os.path.isfile(path) else "does not exist"
            what = "holds no config.yaml" if os.path.isdir(path) else kind
            raise ConfigError(f"{str(path)!r} is not a run directory: it {what}. {_run_near(path)}")
        return cls(path)

    def config(self) -> RunConfig:
        """The settings of the run, without trust in any model's own code: a file says whom somebody has trusted, and
        who reads it trusts anew.

        Raises:
            ConfigError: config.yaml was edited into something that is no config.
        """
        return trusting(build(RunConfig, self.settings()))

    def settings(self) -> Mapping[str, Any]:
        """The settings as they are recorded, whether this version knows them or not.

        Raises:
            ConfigError: config.yaml was edited into something that holds none.
            CheckpointError: it cannot be read.
        """
        try:
            values = from_yaml(_text(self.path / CONFIG))
        except ValueError as error:
            raise ConfigError(f"{self.path / CONFIG} is not yaml: {first_line(error)}. Restore it.") from error
        if not isinstance(values, Mapping):
            raise ConfigError(f"{self.path / CONFIG} holds no settings. Restore it, or start a new run.")
        return current(values)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        write_json(self.path / ENVIRONMENT, finite(masked(environment)))

    def environment(self) -> dict[str, Any]:
        return read_json(self.path / ENVIRONMENT) if (self.path / ENVIRONMENT).is_file() else {}

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; it is on its way to the disk when this returns.

        Raises:
            CheckpointError: the file cannot be written.
        """
        try:
            with open(self.path / METRICS, "a", encoding="utf-8") as file:
                file.write(_line(row))
        except OSError as error:
            raise CheckpointError(
                f"{self.path / METRICS} could not be written: {error.strerror or error}. Make room, or see who removed "
                "the run directory; a checkpoint can be continued from."
            ) from error

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl; a last line that a crash cut off is left out, with a warning.

        Raises:
            CheckpointError: a line is no object with a step and numbers, or the file cannot be read.
        """
        file = self.path / METRICS
        lines = _text(file, errors="replace").splitlines() if file.is_file() else []
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                row = from_json(line)
            except ValueError as error:
                if number == len(lines) and not line.endswith("}"):
                    warn(
                        f"Line {number} of {file}, the last one, is not whole and is left out: {line[:60]!r}. The run "
                        "was stopped as it wrote it, or is writing it."
                    )
                    break
                raise CheckpointError(f"Line {number} of {file} is not json: {error}. Remove the line.") from error
            if not _is_row(row):
                raise CheckpointError(f"Line {number} of {file} is not of a training: {line:.60}. Remove the line.")
            rows.append(row)
        return rows

    def drop_metrics_after(self, step: int) -> None:
        """Forget what was logged after ``step``: a run continued from there logs it again."""
        kept = [row for row in self.metrics() if row["step"] <= step]
        self._write(METRICS, "".join(map(_line, kept)))

    def result(self) -> dict[str, Any]:
        """What is recorded so far.

        Raises:
            CheckpointError: result.json was edited into something that is no result.
        """
        values = read_json(self.path / RESULT) if (self.path / RESULT).is_file() else {}
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.path / RESULT} holds no result, but {values!r:.40}. Restore it.")
        for name, kind in _ENTRIES.items():
            if values.get(name) is not None and not isinstance(values[name], kind):
                raise CheckpointError(
                    f"{self.path / RESULT}: {name} must be {'a list' if kind is list else 'an object'}, found "
                    f"{values[name]!r:.60}. Restore it, or start a new run."
                )
        for name in ("before", "after"):
            loss = (values.get(name) or {}).get("loss")
            if loss is not None and (not isinstance(loss, (int, float)) or isinstance(loss, bool)):
                raise CheckpointError(f"{self.path / RESULT}: the loss {name} is {loss!r:.40}, no number. Restore it.")
        return values

    def update_result(self, **entries: Any) -> None:
        """Add entries to result.json, replacing those of the same name; a number that is not finite becomes null."""
        write_json(self.path / RESULT, finite({**self.result(), **masked(entries)}))

    def trained_adapter(self) -> Path:
        """The folder of the adapter that the run has trained.

        Raises:
            ConfigError: it has trained none yet, or the whole model.
        """
        if self.adapter.is_dir():
            return self.adapter
        if self.model.is_dir():
            raise ConfigError(f"The run {str(self.path)!r} has no adapter: it has trained the whole model.")
        status = self.result().get("status", "not begun")
        raise ConfigError(f"The run {str(self.path)!r} has no adapter yet (status: {status}). Let it finish first.")

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint, with a warning for each newer one that is not."""
        return newest_whole(self.checkpoints)

    def _write(self, name: str, text: str) -> None:
        with written_whole(self.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


_ENTRIES = {"before": dict, "after": dict, "seconds": dict, "parameters": dict, "samples": list}
"""Entries of result.json that hold others."""


def _text(file: Path, errors: str = "strict") -> str:
    try:
        return file.read_text(encoding="utf-8", errors=errors)
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read: {error.strerror or error}. See whose file it is and who may read it."
        ) from error


def _line(row: Mapping[str, Any]) -> str:
    """A line of metrics.jsonl, without the numbers that are not finite."""
    return json.dumps({name: value for name, value in row.items() if finite(value) == value}) + "\n"


def _is_row(value: Any) -> bool:
    """An object whose entries that reports and continued runs calculate with are numbers, the step among them."""
    if not isinstance(value, dict) or "step" not in value:
        return False
    read = [value[name] for name in ("step", "loss", "eval_loss", "seconds") if name in value]
    return all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in read)


def _run_near(path: Path) -> str:
    """What was perhaps meant: the run a path lies in, or the runs that lie in it."""
    around = [parent for parent in path.absolute().parents[:2] if os.path.isfile(parent / CONFIG)]
    inside = sorted(str(file.parent) for file in path.glob(f"*/{CONFIG}")) if os.path.isdir(path) else []
    if around:
        return f"It lies in the run {str(around[0])!r}: give that."
    return f"It holds runs: {shorten(inside)}." if inside else "Give one that `lorafa train` made."


def _short_name(config: RunConfig) -> str:
    if config.peft.full:
        return "full"
    from lorafa.train.adapter_config import lora_config  # which loads torch; reports do without
    from lorafa.variants import variant_types

    formula = variant_types(lora_config(config))[-1].name
    start = "" if config.init.mode in (InitConfig().mode, formula) else f"-{config.init.mode}"
    return f"{formula}-r{config.peft.r}{start}"


def _names(config: RunConfig) -> Iterator[Path]:
    """``runs/<date>-<time>-<adapter>`` or what ``run_dir`` says, then the same with a number."""
    if config.run_dir:
        named = user_path(config.run_dir)
    else:
        named = Path("runs") / f"{datetime.now().strftime('%Y%m%d-%H%M%S')}-{_short_name(config)}"
    yield named
    yield from (named.with_name(f"{named.name}-{number}") for number in range(2, NUMBERS))


def _is_numbered(config: RunConfig) -> bool:
    """Whether the run takes the first free name: without a ``run_dir``, and where what is there stays beside it."""
    if not config.run_dir:
        return True
    path = user_path(config.run_dir)
    return config.if_exists == "new" and path.is_dir() and not _is_empty(path)


def _free(names: Iterator[Path]) -> Path:
    return next(path for path in names if not os.path.lexists(path))


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, or only what a process leaves that was ended before it began: the lock, and the
    settings half written."""
    return all(inside.name == LOCK or is_temporary(inside) for inside in folder.iterdir())


def _make_first(names: Iterator[Path]) -> tuple[Path, list[Path]]:
    """Make the first of these folders that is not there; it and all folders made. No two processes make the same."""
    for path in names:
        with suppress(FileExistsError):
            return path, _make(path)
    raise FileExistsError(None, "all names are taken")


def _make(path: Path, *, or_take: bool = False) -> list[Path]:
    """Make a folder with those above it that are missing; which were made, the highest first.

    Raises:
        FileExistsError: it is there already, unless that is right (``or_take``).
    """
    made: list[Path] = []
    above = [place for place in path.absolute().parents if not place.exists()]
    for folder in (*reversed(above), path):
        try:
            folder.mkdir()
            made.append(folder)
        except FileExistsError:
            if folder is path and not or_take:
                raise
        except FileNotFoundError:  # the one above was there, empty, and whoever had made it took it back
            return made + _make(path, or_take=or_take)
    return made


def _remove(path: Path, made: list[Path]) -> None:
    """Take back what :func:`_make` made, as far as nothing is in it."""
    (path / LOCK).unlink(missing_ok=True)
    with suppress(OSError):
        for folder in reversed(made):
            folder.rmdir()
