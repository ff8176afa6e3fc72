"""Trials in another process: what is imported there may print, hang or end the interpreter.

The other process says by lines of json when a trial begins and what came of it. What packages write goes to a file, by
the descriptors of the process and not by Python's streams alone, for libraries in C write too.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from lorafa.errors import bounded

MOST = 2000
"""Characters that are kept of what a trial has written."""
_START = "import sys; sys.path[:] = sys.argv.pop(1).split('\\n'); from lorafa.diagnosis.jobs import main; main()"


@dataclass(frozen=True)
class Outcome:
    """What became of a trial."""

    error: str | None = None
    """Kind and text of the exception; None where all went well."""
    value: Any = None
    """What the trial found."""
    written: str = ""
    """What was written meanwhile, to either stream."""

    @property
    def well(self) -> bool:
        return self.error is None

    def first_written(self) -> str:
        """The first line of what was written that says something."""
        return bounded(next((line.strip() for line in self.written.splitlines() if line.strip()), ""), 200)


def outcomes(jobs: Sequence[str], patience: float) -> Generator[tuple[str, Outcome], None, None]:
    """Trials and what became of them, in order, as they end.

    One that ends the process, or takes more than ``patience`` seconds, is told from the others: the rest goes on in
    another process. Closing the iterator ends it.
    """
    left = list(jobs)
    while left:
        for job, outcome in _of_one_process(left, patience):
            left.remove(job)
            yield job, outcome


def _of_one_process(jobs: Sequence[str], patience: float) -> Iterator[tuple[str, Outcome]]:
    """Outcomes until the process has ended; at least one."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", _START, "\n".join(sys.path), *jobs]
    with tempfile.TemporaryFile() as written:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=written, env=environment
        )
        try:
            yield from _read(process, written, jobs[0], patience)
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _read(process: subprocess.Popen[bytes], written: IO[bytes], job: str, patience: float) -> Iterator[Any]:
    lines: queue.Queue[bytes | None] = queue.Queue()
    threading.Thread(target=_pass_on, args=(process.stdout, lines), daemon=True).start()
    start = 0
    pending: str | None = job  # the interpreter itself may not come up
    while True:
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            yield pending, Outcome(f"It had not ended after {patience:g} s.", written=_between(written, start))
            return
        if line is None:
            if pending is not None:
                process.wait()
                text = _between(written, start)
                yield pending, Outcome(_how_it_ended(process.returncode, text), written=text)
            return
        said = json.loads(line)
        if "begins" in said:
            pending = said["begins"]
            continue
        yield said["job"], Outcome(said["error"], said["value"], _between(written, start, said["end"]))
        start, pending = said["end"], None


def _pass_on(stream: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    try:
        for line in stream:
            lines.put(line)
    except ValueError:  # closed meanwhile
        pass
    lines.put(None)


def _between(file: IO[bytes], start: int, end: int | None = None) -> str:
    """What a file holds between two places, the second of which may be its end; not all of it where that is much."""
    length = (os.fstat(file.fileno()).st_size if end is None else end) - start
    content = os.pread(file.fileno(), min(length, 4 * MOST), start) if hasattr(os, "pread") else b""
    return bounded(content.decode("utf-8", "replace"), MOST)


def _how_it_ended(status: int, text: str) -> str:
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    by = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return f"It ended the whole process ({by})." + (f" Last words: {bounded(last, 200)}" if last else "")
