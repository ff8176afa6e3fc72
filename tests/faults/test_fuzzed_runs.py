"""Run directories that were changed at random, read by all that reads one: refused by lorafa's own errors, in time.

How many examples the long test makes, :mod:`toys.fuzzing` says.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lorafa.cli.main import main
from lorafa.errors import TEXT, LoraError
from lorafa.report.comparison import write_comparison
from lorafa.runs import measures
from lorafa.runs.comparison import compare
from lorafa.runs.plan import Plan
from lorafa.runs.record import RunDirectory
from lorafa.storage.parsed import from_yaml
from lorafa.train.checkpoints import CONTENTS, seal
from toys.comparisons import compose_once
from toys.fuzzing import BUDGET, SECONDS, command, damage, files_of, many, other_json, stay_at_home
from toys.workplace import make_workplace
from toys.workplace import settings as settings_in

QUICK = 60
RUN = "all/lora/lr-0.01-seed-1"
TEXTS = ("config.yaml", "result.json", "environment.json", "metrics.jsonl")
CHECKPOINT = "checkpoints/checkpoint-2"
SHORT = ["eval.size=0", "eval.before=false", "train.steps=2", "train.checkpoint_every=1", "optim.schedule=constant"]


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder: ``whole/`` holds a comparison of one run, ``now/`` the copy of it that is changed."""
    folder = tmp_path_factory.mktemp("deep") / "in" / "it"
    folder.mkdir(parents=True)
    make_workplace(folder)
    with pytest.MonkeyPatch.context() as patch:
        compose_once(patch)
        stay_at_home(patch, folder)
        patch.setattr(os, "fsync", lambda _: None)
        patch.chdir(folder)
        words = [word for word in settings_in(folder, Path("x")) if not word.startswith(("run_dir=", "optim.lr="))]
        method = {"settings": [], "rates": [0.01]}
        plan = {"methods": {"lora": method}, "baseline": "lora", "seeds": [1], "settings": [*words, *SHORT]}
        for place in ("whole", "now"):
            (folder / place).mkdir()
        (folder / "whole" / "plan.yaml").write_text(yaml.safe_dump(plan))
        shutil.copytree(folder / "whole", folder / "now", dirs_exist_ok=True)
        assert main(["compare", "now/plan.yaml", "now/all"]) == 0  # in the place whose paths it records
        shutil.rmtree(folder / "whole")
        shutil.copytree(folder / "now", folder / "whole")
        yield folder


@dataclass(frozen=True)
class Changed:
    """Files of the comparison's folder with what they hold now: bytes, or None where they are gone."""

    files: dict[str, bytes | None]
    sealed: bool
    """Whether the checkpoint says that this is what was written."""
    reader: str


@cache
def whole() -> dict[str, bytes]:
    return files_of(Path("whole"))


@cache
def held_by(name: str) -> Any:
    """What a file of the whole one holds: the value of a json or yaml text, or those of its lines."""
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in whole()[name].splitlines()]
    return from_yaml(whole()[name].decode())


@st.composite
def changes(draw: st.DrawFn) -> Changed:
    own = [name for name in whole() if not name.endswith((".lock", ".plan", ".html"))]
    records = [f"{RUN}/{name}" for name in TEXTS]
    at = draw(st.integers(0, sum(often for often, _ in READERS.values()) - 1))
    shares = zip(accumulate(often for often, _ in READERS.values()), READERS, strict=True)
    reader = next(name for end, name in shares if at < end)
    made: dict[str, bytes | None] = {}
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(records) | st.sampled_from(own))
        if name.endswith("config.yaml") and reader in LONG:
            continue  # what is trained or answered there takes as long as the settings say
        before = made.get(name) or whole()[name]
        way = draw(st.sampled_from(["json", "json", "json", "damage", "empty", "gone"]))
        if way == "json" and name.endswith((".json", ".yaml")):
            made[name] = json.dumps(draw(other_json(held_by(name)))).encode()
        elif way == "json" and name.endswith(".jsonl"):
            made[name] = "\n".join(json.dumps(draw(other_json(line))) for line in held_by(name)).encode()
        else:
            made[name] = {"empty": b"", "gone": None}.get(way, draw(damage(before)))
    return Changed(made, draw(st.booleans()), reader)


# ---- what reads ------------------------------------------------------------------------------------------------------

WAYS: list[Callable[[RunDirectory], object]] = [
    RunDirectory.config, RunDirectory.settings, RunDirectory.metrics, RunDirectory.result, RunDirectory.environment,
    RunDirectory.last_checkpoint, RunDirectory.trained_adapter, measures.is_over, measures.samples_of,
    measures.final_loss, lambda run: measures.heldout_curve(run.metrics()), lambda run: run.drop_metrics_after(1),
    lambda run: measures.spread(measures.step_seconds(run.metrics())),
]  # fmt: skip


def in_time(act: Callable[[], object]) -> None:
    """What is called succeeds, or raises a LoraError of a screen at most."""
    start, said = time.process_time(), ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            act()
    except LoraError as error:
        said = str(error)
    assert len(said) < TEXT + 200
    assert time.process_time() - start < SECONDS


def read() -> None:
    for way in WAYS:
        in_time(lambda way=way: way(RunDirectory.open(f"now/{RUN}")))


def compared() -> None:
    def put_back(config: Any, *_: object, **__: object) -> Path:
        return shutil.copytree(f"whole/{RUN}", RunDirectory.place(config), dirs_exist_ok=True)

    in_time(lambda: compare(Plan.read("now/plan.yaml"), Path("now/all"), Console(quiet=True), start=put_back))
    in_time(lambda: write_comparison("now/all"))


def asked(*words: str, takes: float = 0.0) -> Callable[[], None]:
    def act() -> None:
        assert command(words, "Hello?\n").seconds < SECONDS + takes, words

    return act


FEW = ["--max-new-tokens", "2"]
RESUME = ["train", f"train.resume=now/{RUN}", "train.steps=3"]
READERS: dict[str, tuple[int, Callable[[], None]]] = {
    "read": (780, read),
    "report": (30, asked("report", f"now/{RUN}")),
    "page": (15, asked("report", "now/all", f"whole/{RUN}", "--page", "page.html")),
    "compare": (60, compared),
    "inspect": (40, asked("inspect", f"now/{RUN}", "--json")),
    "merge": (12, asked("merge", f"now/{RUN}", "--out", "out")),
    "combine": (12, asked("combine", f"now/{RUN}", f"whole/{RUN}", "--out", "out")),
    "export": (12, asked("export", f"now/{RUN}", "--for", "peft", "--out", "out")),
    "plan": (3, asked("plan", *RESUME[1:])),
    "dry run": (15, asked(*RESUME, "--dry-run")),
    "resume": (7, asked(*RESUME, takes=1.5)),
    "eval": (4, asked("eval", f"now/{RUN}", "task=perplexity", "data=rows.jsonl", "eval.size=2")),
    "chat": (4, asked("chat", f"now/{RUN}", *FEW)),
    "generate": (6, asked("generate", f"now/{RUN}", "rows.jsonl", *FEW)),
}
"""What reads a run, with how often of a thousand times: those that train or draw take a hundred times as long."""
LONG = ("resume", "eval", "plan")
WRITTEN = ("report.html", "comparison.html", "comparison.json", "metrics.jsonl", ".lock", ".plan")
"""What readers write themselves: `metrics.jsonl` by what forgets later lines."""


def held(changed: Changed) -> None:
    for made in ("now", "out"):
        shutil.rmtree(made, ignore_errors=True)
    shutil.copytree("whole", "now")
    for name, content in changed.files.items():
        path = Path("now") / name
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    if changed.sealed and f"{RUN}/{CHECKPOINT}/{CONTENTS}" not in changed.files:
        seal(Path("now") / RUN / CHECKPOINT)
    before = files_of(Path.cwd())
    READERS[changed.reader][1]()
    after = files_of(Path.cwd())
    kept = {name for name in before if not name.endswith(WRITTEN) and not name.startswith(("page.html", "cache/"))}
    if changed.reader in ("resume", "compare"):  # which go on with the run, or set it aside
        kept = {name for name in kept if not name.startswith("now/")}
    assert [name for name in kept if before[name] != after.get(name)] == []


@settings(BUDGET, max_examples=QUICK)
@given(changes())
def test_changed_runs_are_read_or_refused(changed: Changed) -> None:
    held(changed)


@pytest.mark.slow
def test_many_changed_runs_are_read_or_refused() -> None:
    many(changes(), held, 20_000)
