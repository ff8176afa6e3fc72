"""Programs that nobody has read: each in a process with limits on time, memory, files and processes, and no network."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from math import ceil
from pathlib import Path

from lorafa.errors import NotAvailableError
from lorafa.evals import confined
from lorafa.evals.confined import BY_SIGNAL, ERROR, TIMEOUT

AT_ONCE = 8
"""Programs that run together, at most."""
START = 10.0
"""Seconds that the two interpreters may take to start, beside a program's own."""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 5.0
    """Time on the clock, and, rounded up, on the processor."""
    memory_bytes: int = 2**30
    """Address space."""
    file_bytes: int = 2**20
    """Size of each file, which may lie in its own temporary folder only."""


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    reason: str
    """passed; failed: an assertion did not hold; error: it raised something else, or ended by itself; timeout."""
    text: str = ""
    """The error, in a line."""
    apart: bool = True
    """Whether the system gave it namespaces of its own; otherwise the interpreter alone refuses sockets."""


def require_system() -> None:
    """Raises NotAvailableError where processes cannot be limited."""
    if os.name != "posix":
        raise NotAvailableError(
            f"Programs that a model writes are run with limits that this system ({sys.platform}) does not have. "
            "Measure on Linux or macOS."
        )


def run_all(programs: Sequence[str], limits: Limits) -> list[Outcome]:
    """Run programs, a few at a time; the outcomes are in their order."""
    require_system()
    with ThreadPoolExecutor(max(1, min(AT_ONCE, len(programs), os.cpu_count() or 1))) as pool:
        return list(pool.map(lambda program: run_program(program, limits), programs))


def run_program(program: str, limits: Limits) -> Outcome:
    """Run one program to its end, or to the end of its time; whatever it started is ended with it."""
    word = secrets.token_hex(16)
    own = {**asdict(limits), "cpu_seconds": ceil(limits.seconds)}
    text = _text()
    words = [sys.executable, "-I", "-S", "-B", "-c", text, "outer", json.dumps(own), text]
    with tempfile.TemporaryDirectory(prefix="lorafa-program-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            words, cwd=folder, env={}, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            said, errors = process.communicate(json.dumps([word, program]).encode(), timeout=limits.seconds + START)
        except subprocess.TimeoutExpired:
            return Outcome(TIMEOUT, "its time was over, and it went on")
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.communicate()
    return _read(said, word, process.returncode, errors)


@cache
def _text() -> str:
    return Path(confined.__file__).read_text(encoding="utf-8")


def _read(said: bytes, word: str, status: int, errors: bytes) -> Outcome:
    try:
        found, reason, text, apart = json.loads(said)
    except ValueError:
        found = None
    if found == word:
        return Outcome(reason, text, apart)
    if status - BY_SIGNAL in (signal.SIGALRM, signal.SIGXCPU):
        return Outcome(TIMEOUT, "its time was over")
    last = errors.decode(errors="replace").strip().splitlines()[-1:]
    return Outcome(ERROR, f"ended with status {status} before its test was over{': ' + last[0] if last else ''}")
