"""Contenders in processes of their own, timed in turns: every benchmark file uses this and nothing else.

A process of its own gives each contender a peak memory of its own; taking turns gives all of them the same noise. The
same number of threads and the same allocator settings are set in every process. Rows are printed as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from lorafa.train.memory import keep_freed_memory

THREADS = 2
"""Of every contender, unless a benchmark says otherwise."""


class Contender:
    """A process that builds something once and then runs its methods on request."""

    def __init__(self, name: str, build: Callable[..., Any], *, threads: int = THREADS, **arguments: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads, build, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def __call__(self, method: str, *arguments: Any) -> Any:
        self._pipe.send((method, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except EOFError as error:
            raise RuntimeError(f"{self.name}: the process ended") from error
        if kind == "error":
            raise RuntimeError(f"{self.name}:\n{value}")
        return value

    def peak_mib(self) -> float:
        """Peak resident memory of the process so far, MiB."""
        return float(self("__peak__"))

    def close(self) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe: Connection, threads: int, build: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(threads)
    keep_freed_memory()
    try:
        served = build(**arguments)
        pipe.send(("ok", None))
        while True:
            method, values = pipe.recv()
            if method == "__peak__":
                pipe.send(("ok", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
            else:
                pipe.send(("ok", getattr(served, method)(*values)))
    except EOFError:
        return
    except BaseException:
        pipe.send(("error", traceback.format_exc()))


def interleave(contenders: Sequence[Contender], method: str, repeats: int, warmups: int = 1) -> dict[str, list[float]]:
    """Seconds ``method`` took in each contender, by name; they take turns, in changing order."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(warmups + repeats):
        order = contenders if turn % 2 == 0 else list(reversed(contenders))
        for contender in order:
            taken = contender(method)
            if turn >= warmups:
                seconds[contender.name].append(taken)
    return seconds


def timed(run: Callable[[], object]) -> float:
    """Seconds of wall time ``run`` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def positive(text: str) -> int:
    """An integer >= 1, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, found {text!r}")
    return int(text)


def emit(**row: object) -> None:
    """Print one row of results as a JSON line."""
    print(json.dumps(row), flush=True)


def verdict(benchmark: str, name: str, value: float, target: float, **more: object) -> bool:
    """Print a ratio beside its target; returns whether it is met."""
    met = value <= target
    emit(benchmark=benchmark, figure=name, value=round(value, 3), target=target, met=met, **more)
    return met
