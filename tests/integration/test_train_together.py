"""Several processes that start, continue or compare runs at the same time: each run is one process's alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from toys.places import ROOT
from toys.workplace import make_workplace, metrics, read, settings

SOURCES = str(ROOT / "src")
LIMIT = 300
"""Seconds after which a process that should be done has failed."""
STEPS = ["train.steps=6", "train.checkpoint_every=2", "eval.size=0", "eval.before=false"]

PAUSED = """
import sys, time
from pathlib import Path
from lorafa.cli.main import main
from lorafa.train import recipe

place, signs, *arguments = sys.argv[1:]
signs = Path(signs)

def pause():
    (signs / "there").touch()
    while not (signs / "go").exists():
        time.sleep(0.05)

prepare, log = recipe.load_model, recipe.RunCallback.on_log

def load_model(*args, **kwargs):
    if place == "prepare":
        pause()
    return prepare(*args, **kwargs)

def on_log(self, args, state, *rest, **more):
    log(self, args, state, *rest, **more)
    if place == f"step {state.global_step}":
        pause()

recipe.load_model, recipe.RunCallback.on_log = load_model, on_log
sys.exit(main(arguments))
"""
"""`lorafa` that stops at a place in the work, says "there", and goes on at "go"."""

CLAIM = """
import sys, time
from lorafa.conf.compose import compose
from lorafa.errors import ConfigError
from lorafa.runs.record import RunDirectory
from lorafa.train.adapter_config import lora_config

run_dir, start, keep = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
config = compose([f"run_dir={run_dir}"] if run_dir else [])
lora_config(config)  # a name is made of it: what that loads is there before the moment
while time.time() < start:
    pass
try:
    with RunDirectory.claimed(config) as run:
        (run.path / "config.yaml").write_text("")
        print("has", run.path.resolve())
        time.sleep(keep)
except ConfigError as error:
    print("refused", error)
"""
"""Claim a run directory at a moment; the settings are all that is read of them."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start Python with arguments in an empty folder; what still runs at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def go(*arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield go
    for process in started:
        process.kill()
        process.communicate()


def paused(start: Start, at: str, signs: Path, *arguments: str) -> subprocess.Popen[str]:
    """A command that has come to that place."""
    signs.mkdir(exist_ok=True)
    process = start("-c", PAUSED, at, str(signs), *arguments)
    deadline = time.monotonic() + LIMIT
    while not (signs / "there").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit status and what it said of errors."""
    _, err = process.communicate(timeout=LIMIT)
    return process.returncode, err


def lorafa(start: Start, *arguments: str) -> tuple[int, str]:
    return ended(start("-m", "lorafa.cli.main", *arguments))


@pytest.mark.parametrize("at", ["prepare", "step 3"])
def test_a_run_directory_somebody_is_at_is_refused_before_any_work(
    workplace: Path, tmp_path: Path, start: Start, at: str
) -> None:
    run = tmp_path / "run"
    first = paused(start, at, tmp_path / "signs", "train", *settings(workplace, run), *STEPS, "train.seed=1")
    before = sorted(path.name for path in run.iterdir())
    status, err = lorafa(start, "train", *settings(workplace, run), "model=there/is/none", "train.seed=2")
    assert (status, "is not empty" in err if at == "step 3" else "is taken: another process" in err) == (2, True)
    assert sorted(path.name for path in run.iterdir()) == before
    (tmp_path / "signs" / "go").touch()
    assert ended(first)[0] == 0
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert "seed: 1\n" in (run / "config.yaml").read_text()
    assert read(run / "result.json")["status"] == "finished"


def test_a_run_somebody_continues_is_not_continued_twice(workplace: Path, tmp_path: Path, start: Start) -> None:
    run = tmp_path / "run"
    killed = paused(start, "step 3", tmp_path / "first", "train", *settings(workplace, run), *STEPS)
    resume = ("train", f"train.resume={run}")
    status, err = lorafa(start, *resume)  # while it is still at it
    assert (status, "is taken: another process is writing to it" in err) == (2, True)
    killed.send_signal(signal.SIGKILL)  # no clean-up of ours: the system lets go of the lock
    killed.wait(LIMIT)
    first = paused(start, "step 5", tmp_path / "second", *resume)
    logged = (run / "metrics.jsonl").read_bytes()
    status, err = lorafa(start, *resume)
    assert (status, "is taken: another process is writing to it" in err) == (2, True)
    assert (run / "metrics.jsonl").read_bytes() == logged
    (tmp_path / "second" / "go").touch()
    assert ended(first)[0] == 0
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_was_killed_before_it_began_leaves_its_directory_to_the_next(
    workplace: Path, tmp_path: Path, start: Start
) -> None:
    run = tmp_path / "run"
    killed = paused(start, "prepare", tmp_path / "signs", "train", *settings(workplace, run), *STEPS)
    killed.send_signal(signal.SIGKILL)
    killed.wait(LIMIT)
    assert lorafa(start, "train", *settings(workplace, run), *STEPS)[0] == 0
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("there", [True, False])
def test_one_of_many_that_start_at_the_same_moment_has_the_directory(tmp_path: Path, start: Start, there: bool) -> None:
    if there:
        (tmp_path / "run").mkdir()
    answers = claims(start, "run", keep=1.0)
    assert sorted(answer.split()[0] for answer in answers) == ["has", *["refused"] * 5]
    assert all("taken" in answer or "not empty" in answer for answer in answers if not answer.startswith("has"))


def test_runs_that_start_at_the_same_moment_have_directories_of_their_own(tmp_path: Path, start: Start) -> None:
    answers = claims(start, "", keep=0.0)
    assert all(answer.startswith("has") for answer in answers)
    assert len(set(answers)) == len(answers)
    assert len(list((tmp_path / "runs").iterdir())) == len(answers)


def claims(start: Start, run_dir: str, keep: float) -> list[str]:
    """What six processes say that claim the directory at the same moment."""
    moment = time.time() + 25
    processes = [start("-c", CLAIM, run_dir, str(moment), str(keep)) for _ in range(6)]
    return [process.communicate(timeout=LIMIT)[0].strip() for process in processes]


PLAN = """
baseline: a
seeds: [0, 1]
settings: [train.steps=2, train.epochs=null, train.batch_size=4, eval.size=0, eval.before=false, data.eval_size=4]
methods:
  a: {settings: [peft.r=2], rates: [1.0e-3]}
  b: {settings: [peft.r=4], rates: [1.0e-3]}
"""


def test_two_processes_share_one_comparison(workplace: Path, tmp_path: Path, start: Start) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    where = [f"model={workplace / 'model'}", f"data={workplace / 'rows.jsonl'}"]
    both = [start("-m", "lorafa.cli.main", "compare", "plan.yaml", "out", *where) for _ in range(2)]
    assert [ended(process)[0] for process in both] == [0, 0]
    runs = sorted((tmp_path / "out").glob("*/lr-*"))
    assert len(runs) == 4
    for run in runs:
        assert [row["step"] for row in metrics(run)] == [1, 2]
        assert read(run / "result.json")["status"] == "finished"


def test_a_comparison_waits_for_a_run_that_somebody_continues(workplace: Path, tmp_path: Path, start: Start) -> None:
    """An unfinished run is set aside, but one that is being written to is left alone, and counts when it is done."""
    plan = PLAN.replace("seeds: [0, 1]", "seeds: [0]").replace(
        "train.steps=2", "train.steps=4, train.checkpoint_every=1"
    )
    (tmp_path / "plan.yaml").write_text(plan)
    compare = ["compare", "plan.yaml", "out", f"model={workplace / 'model'}", f"data={workplace / 'rows.jsonl'}"]
    killed = paused(start, "step 2", tmp_path / "first", *compare)
    killed.send_signal(signal.SIGKILL)
    killed.wait(LIMIT)
    (run,) = (tmp_path / "out").glob("a/lr-*")
    continued = paused(start, "step 3", tmp_path / "second", "train", f"train.resume={run}")
    second = start("-m", "lorafa.cli.main", *compare)
    deadline = time.monotonic() + LIMIT
    while not list((tmp_path / "out").glob("b/lr-*/adapter")):  # all that is free is done first
        assert second.poll() is None, second.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (tmp_path / "second" / "go").touch()
    assert (ended(continued)[0], ended(second)[0]) == (0, 0)
    assert [path.name for path in (tmp_path / "out" / "a").iterdir()] == [run.name]
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
