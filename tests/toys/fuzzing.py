"""Values as nobody should write them, files that are damaged, and how many examples of them hypothesis makes.

``make test`` takes a fixed few. The long tests take :data:`SHARE` of the whole budget, 3 % of it unless ``LORAFA_FUZZ``
says more (1 is all of it: ``make fuzz``), from a seed that they print and ``LORAFA_SEED`` sets.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from lorafa.cli.main import main
from lorafa.errors import TEXT

SECONDS = 2.0
"""CPU seconds that an example may take at most."""
SHARE = float(os.environ.get("LORAFA_FUZZ", "0.03"))
SEED = int(os.environ.get("LORAFA_SEED") or random.SystemRandom().randrange(2**32))
PART = 250
"""Examples of one seed: hypothesis keeps what it has drawn, and gets slow."""
BUDGET = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)

EXPRESSIONS = ["(", "(a+)+b", ".*", ".*first", "a{9999999}", "(?i)first", "first|a", "^a.first", "", "\\", "x" * 5000]
ODD: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.sampled_from([10**9, 10**30, -(10**400), 2**63, 0]),
    st.floats(), st.text(max_size=5).filter(lambda text: not text.startswith(("/", "~"))), st.sampled_from(EXPRESSIONS),
)  # fmt: skip
"""No value leads out of the folder a test works in."""
KEYS = st.text(max_size=3) | st.sampled_from(EXPRESSIONS)
VALUES = st.recursive(
    ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
"""What a json text may hold."""


def damaged(content: bytes, at: int, way: int, new: bytes) -> bytes:
    """The content cut at a place, or with other, more or fewer bytes there."""
    end = [len(content), at + len(new), at, at + 4][way]
    return content[:at] + (new if way in (1, 2) else b"") + content[end:]


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with one place of it damaged."""
    at, way = draw(st.integers(0, max(0, len(content) - 1))), draw(st.integers(0, 3))
    return damaged(content, at, way, draw(st.binary(max_size=4)))


def many(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], whole: int) -> None:
    """Check examples of a strategy, as many as the share of ``whole`` is; which seeds they have is printed."""
    count = math.ceil(whole * SHARE)

    def one(example: Any) -> None:
        check(example)

    for part in range(math.ceil(count / PART)):
        print(f"{check.__name__}: {min(PART, count - part * PART)} examples of {count}, LORAFA_SEED={SEED + part}")
        few = settings(
            BUDGET, max_examples=min(PART, count - part * PART), database=None,
            phases=[Phase.generate, Phase.shrink],
        )  # fmt: skip
        seed(SEED + part)(few(given(strategy)(one)))()


# ---- json values -----------------------------------------------------------------------------------------------------


@st.composite
def other_json(draw: st.DrawFn, value: Any) -> Any:
    """A json value of which one place holds something odd, has another name, or is gone."""
    value = json.loads(json.dumps(value))
    holder, key = [value], 0  # type: tuple[Any, Any]
    while isinstance(holder[key], (dict, list)) and holder[key] and draw(st.integers(0, 3)):
        holder = holder[key]
        key = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
    way = draw(st.sampled_from(["other", "other", "other", "gone", "renamed", "near"]))
    if way == "gone" and holder is not value:
        del holder[key]
    elif way == "renamed" and isinstance(holder, dict):
        holder[draw(KEYS)] = holder.pop(key)
    elif way == "near" and isinstance(holder[key], (int, float)):
        holder[key] = draw(st.sampled_from([-1, 0, 0.5, 1e300, 2**64, str(holder[key]), [holder[key]], None]))
    else:
        holder[key] = draw(VALUES)
    return value


# ---- a command in this process ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    said: str
    """What it wrote to the standard error."""
    seconds: float


def command(words: Sequence[str], typed: str = "") -> Ended:
    """Run a command in this process: it ends with 0, 1 or 2 and an error of a screen at most, which was foreseen."""
    out, said, start = io.StringIO(), io.StringIO(), time.process_time()
    with redirect_stdout(out), redirect_stderr(said), mock.patch("sys.stdin", io.StringIO(typed)):
        try:
            status = main(words)
        except SystemExit as end:  # of argparse: help, and words it cannot read
            status = 0 if end.code is None else int(end.code)
    ended = Ended(status, said.getvalue(), time.process_time() - start)
    assert ended.status in (0, 1, 2), ended
    assert not any(mark in ended.said for mark in ("not foreseen", "Traceback")), ended.said
    errors = [line for line in ended.said.splitlines() if line.startswith("error:")]
    assert all(len(line) < TEXT + 200 for line in errors)
    assert bool(errors) == (ended.status != 0) or "usage:" in ended.said or out.getvalue(), ended
    return ended


def files_of(folder: Path) -> dict[str, bytes]:
    """The files below a folder with their bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stay_at_home(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have commands keep what they keep in a folder, and fetch nothing."""
    patch.setenv("HOME", str(folder))
    patch.setenv("LORAFA_CACHE", str(folder / "cache"))
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
