"""One run, one directory. Every file is whole at any moment; a crash leaves everything recorded before it.

config.yaml        all settings, resolved
environment.json   versions, processor, threads, the command
metrics.jsonl      one line a logged step
result.json        status, what was measured before and after, times, sizes; rewritten as the run goes on
checkpoints/       what a continued run starts from
adapter/           the trained adapter in PEFT's format
report.html        written by lorafa.report
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from lorafa.errors import CheckpointError, ConfigError, first_line, shorten
from lorafa.runs.formats import current
from lorafa.settings.typed import build, plain
from lorafa.storage import make_folder, read_json, write_json, written_whole
from lorafa.train.checkpoints import last_checkpoint
from lorafa.train.recipe import lora_config
from lorafa.train.settings.init import InitConfig
from lorafa.train.settings.run import RunConfig
from lorafa.variants import variant_types

CONFIG, ENVIRONMENT, METRICS, RESULT = "config.yaml", "environment.json", "metrics.jsonl", "result.json"


class RunDirectory:
    """Reads and writes the files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoints"

    @staticmethod
    def place(config: RunConfig) -> Path:
        """Where the run is to be written: ``config.run_dir``, or a new directory under ``runs/``. Makes nothing yet.

        Raises:
            ConfigError: the directory exists and is not empty, or cannot be made where it is to be.
        """
        path = Path(config.run_dir).expanduser() if config.run_dir else _fresh(Path("runs"), _short_name(config))
        there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            why = "cannot be written to" if there.is_dir() else "is not a folder"
            raise ConfigError(
                f"The run directory {str(path)!r} cannot be made: {str(there)!r} {why}. Choose another run_dir."
            )
        if path.is_dir() and any(path.iterdir()):
            raise ConfigError(
                f"The run directory {str(path)!r} exists and is not empty; a run overwrites nothing. "
                f"Choose another run_dir, or continue that run: train.resume={path}"
            )
        return path

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> RunDirectory:
        """Make the directory and write the settings into it."""
        run = cls(make_folder(path))
        run._write(CONFIG, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """An existing run.

        Raises:
            ConfigError: the path is no run directory.
        """
        path = Path(path).expanduser()
        if not (path / CONFIG).is_file():
            kind = "is a file" if path.is_file() else "does not exist"
            what = "holds no config.yaml" if path.is_dir() else kind
            raise ConfigError(f"{str(path)!r} is not a run directory: it {what}. {_run_near(path)}")
        return cls(path)

    def config(self) -> RunConfig:
        """The settings of the run.

        Raises:
            ConfigError: config.yaml was edited into something that is no config.
        """
        try:
            values = yaml.safe_load((self.path / CONFIG).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.path / CONFIG} is not yaml: {first_line(error)}. Restore it.") from error
        if not isinstance(values, Mapping):
            raise ConfigError(f"{self.path / CONFIG} holds no settings. Restore it, or start a new run.")
        return build(RunConfig, current(values))

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        write_json(self.path / ENVIRONMENT, dict(environment))

    def environment(self) -> dict[str, Any]:
        return read_json(self.path / ENVIRONMENT) if (self.path / ENVIRONMENT).is_file() else {}

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; it is on its way to the disk when this returns.

        Raises:
            CheckpointError: the file cannot be written.
        """
        try:
            with open(self.path / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(dict(row)) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"{self.path / METRICS} could not be written: {error.strerror or error}. Make room, or see who removed "
                "the run directory; a checkpoint can be continued from."
            ) from error

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl; a last line that a crash cut off is left out.

        Raises:
            CheckpointError: a line is no object with a step and numbers.
        """
        file = self.path / METRICS
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                if number == len(lines) and not line.endswith("}"):
                    break
                raise CheckpointError(f"Line {number} of {file} is not json: {error}. Remove the line.") from error
            if not _is_row(row):
                raise CheckpointError(f"Line {number} of {file} is not of a training: {line:.60}. Remove the line.")
            rows.append(row)
        return rows

    def drop_metrics_after(self, step: int) -> None:
        """Forget what was logged after ``step``: a run continued from there logs it again."""
        kept = [row for row in self.metrics() if row["step"] <= step]
        self._write(METRICS, "".join(json.dumps(row) + "\n" for row in kept))

    def result(self) -> dict[str, Any]:
        """What is recorded so far.

        Raises:
            CheckpointError: result.json was edited into something that is no result.
        """
        values = read_json(self.path / RESULT) if (self.path / RESULT).is_file() else {}
        for name, kind in _ENTRIES.items():
            if values.get(name) is not None and not isinstance(values[name], kind):
                raise CheckpointError(
                    f"{self.path / RESULT}: {name} must be {'a list' if kind is list else 'an object'}, found "
                    f"{values[name]!r:.60}. Restore it, or start a new run."
                )
        return values

    def update_result(self, **entries: Any) -> None:
        """Add entries to result.json, replacing those of the same name."""
        write_json(self.path / RESULT, {**self.result(), **entries})

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        return last_checkpoint(self.checkpoints)

    def _write(self, name: str, text: str) -> None:
        with written_whole(self.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


_ENTRIES = {"before": dict, "after": dict, "seconds": dict, "parameters": dict, "samples": list}
"""Entries of result.json that hold others."""


def _is_row(value: Any) -> bool:
    """An object whose entries that reports and continued runs calculate with are numbers, the step among them."""
    if not isinstance(value, dict) or "step" not in value:
        return False
    read = [value[name] for name in ("step", "loss", "eval_loss", "seconds") if name in value]
    return all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in read)


def _run_near(path: Path) -> str:
    """What was perhaps meant: the run a path lies in, or the runs that lie in it."""
    around = [parent for parent in path.absolute().parents[:2] if (parent / CONFIG).is_file()]
    inside = sorted(str(file.parent) for file in path.glob(f"*/{CONFIG}")) if path.is_dir() else []
    if around:
        return f"It lies in the run {str(around[0])!r}: give that."
    return f"It holds runs: {shorten(inside)}." if inside else "Give one that `lorafa train` made."


def _short_name(config: RunConfig) -> str:
    formula = variant_types(lora_config(config))[-1].name
    start = "" if config.init.mode in (InitConfig().mode, formula) else f"-{config.init.mode}"
    return f"{formula}-r{config.peft.r}{start}"


def _fresh(parent: Path, name: str) -> Path:
    """``parent/<date>-<time>-<name>``, numbered when two runs start within one second."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    candidates = [parent / f"{stamp}-{name}", *(parent / f"{stamp}-{name}-{n}" for n in range(2, 1000))]
    return next(path for path in candidates if not path.exists())
