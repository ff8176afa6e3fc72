"""A file of answers, written as they come: one JSON object a line, in the order of the prompts.

Beside it, in a file with ``.made.json`` behind its name, stands what the answers are made with, so that they are
continued by the same.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorafa.data.unanswered import Unanswered
from lorafa.errors import CheckpointError, ConfigError, LoraError
from lorafa.evals.answering import Answer
from lorafa.runs.made_by import MadeBy
from lorafa.storage.leavings import locked
from lorafa.storage.parsed import from_json
from lorafa.storage.paths import user_path
from lorafa.storage.whole import free_space, read_json, write_json

BESIDE = ".made.json"
"""What is added to the name of the file of answers."""


class AnswerFile:
    """Lines of a file, or of the standard output where there is none."""

    def __init__(self, name: str | None, prompts: Sequence[Unanswered], made_by: MadeBy, *, resume: bool) -> None:
        """Look at what is there; nothing is changed.

        Raises:
            ConfigError: a file is there and is not to be continued, or there is none to continue, or its answers were
                made with another model or other options.
            CheckpointError: it cannot be read, is of other prompts, or nothing says what it was made with.
        """
        if resume and name is None:
            raise ConfigError("--resume continues a file, and none is named. Give --out FILE.")
        self._path = None if name is None else user_path(name)
        self._prompts = prompts
        self._made_by = made_by
        self._kept: list[str] = []
        self._next = 0
        self._size = 0
        """Bytes of the file when it was looked at."""
        self._descriptor: int | None = None
        if self._path is None:
            return
        self._beside = self._path.with_name(self._path.name + BESIDE)
        if not os.path.lexists(self._path):
            if os.path.lexists(self._beside) and _made_with(self._beside) is None:
                raise ConfigError(f"{self._beside} is there already, and was not written here. Give another name.")
            return
        if not resume:
            raise ConfigError(f"{name} is there already. Give --resume to continue it, or another name.")
        self._kept, self._size = _lines(self._path, prompts)
        if self._kept:
            self._require_same()

    def _require_same(self) -> None:
        """Raises ConfigError, or CheckpointError, where the answers that are kept may not be those that this would
        give."""
        found = _made_with(self._beside) if self._beside.is_file() else None
        if found is None:
            raise CheckpointError(
                f"{self._beside} is not there, or damaged, so nothing says with which model and options the answers in "
                f"{self._path} were made. Put it back, or give another name."
            )
        if differences := self._made_by.differences(found["entries"]):
            raise ConfigError(
                f"{self._path} was begun with {found['subject']}, and cannot be continued with other answers: "
                f"{'; '.join(differences)}. Give what it was made with, or another name."
            )

    def done(self, window: int) -> int:
        """How many prompts need no answer any more: a whole number of windows, so that what follows is answered as in
        one go."""
        kept = len(self._kept)
        return kept if kept == len(self._prompts) else kept - kept % window

    def open(self, done: int) -> None:
        """Make the file, or cut it after so many answers. It is this process's until :meth:`close`.

        Raises:
            ConfigError: another process writes it, or has written it since it was looked at.
            CheckpointError: it cannot be written to.
        """
        self._next = done
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            if locked(self._descriptor) is False or os.fstat(self._descriptor).st_size != self._size:
                self.close()
                raise ConfigError(
                    f"{self._path} is taken: another process writes it, or has written it since this one began. "
                    "Nothing of it was changed. Wait until that one has ended and give --resume, or give another name."
                )
            write_json(self._beside, {"subject": self._made_by.subject, "entries": dict(self._made_by.entries)})
            os.truncate(self._path, sum(len(line.encode()) + 1 for line in self._kept[:done]))
        except OSError as error:
            raise CheckpointError(
                f"{self._path} could not be written: {error.strerror or error}. Make room or give --out another place."
            ) from error

    def close(self) -> None:
        """Let go of the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def add(self, answers: Sequence[Answer]) -> None:
        """Write answers to the next prompts.

        Raises:
            CheckpointError: the disk is full, or the file cannot be written to; what was written before stays.
        """
        prompts = self._prompts[self._next : self._next + len(answers)]
        rows = [
            {**prompt.plain(), "output": one.text, "cut": one.cut} for prompt, one in zip(prompts, answers, strict=True)
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._next += len(answers)
        if self._path is None:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        try:
            with self._path.open("ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"{self._path} could not be written: {error.strerror or error}.{free_space(self._path.parent)} What "
                "was written before is whole: continue with --resume."
            ) from error


def _made_with(path: Path) -> dict[str, Any] | None:
    """What a file beside answers says; None for any other file."""
    try:
        found = read_json(path)
    except LoraError:
        return None
    ours = isinstance(found, dict) and found.keys() == {"subject", "entries"} and isinstance(found["entries"], dict)
    return found if ours else None


def _lines(path: Path, prompts: Sequence[Unanswered]) -> tuple[list[str], int]:
    """The whole lines of a file, which answer the first prompts; a last one that was cut off is left out. And how many
    bytes it has."""
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8", errors="replace").split("\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. Check the path.") from error
    kept = lines[:-1]  # after the last line end stands nothing, or what was not finished
    for number, line in enumerate(kept):
        if number >= len(prompts) or not _answers(line, prompts[number]):
            raise CheckpointError(
                f"{path}, line {number + 1} is no answer to the prompt of that number, so the file is of other prompts "
                "and cannot be continued. Give another name."
            )
    return kept, len(content)


def _answers(line: str, prompt: Unanswered) -> bool:
    try:
        row: Any = from_json(line)
    except ValueError:
        return False
    asked = json.loads(json.dumps(prompt.plain()))
    return isinstance(row, dict) and {"output", "cut", *asked} == row.keys() and all(
        row[key] == value for key, value in asked.items()
    )  # fmt: skip
