"""Several processes that start, continue or compare runs at the same time: each run is one process's alone."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorafa.cli.main import main
from lorafa.conf.compose import compose
from lorafa.errors import ConfigError
from lorafa.runs.record import RunDirectory
from lorafa.train.adapter_config import lora_config
from toys.processes import STARTS
from toys.workplace import make_workplace, metrics, read, settings

LIMIT = 300
"""Seconds after which a process that should be done has failed."""
STEPS = ["train.steps=6", "train.checkpoint_every=2", "eval.size=0", "eval.before=false"]
CLAIMS = 6
"""Processes that claim a run directory at the same moment."""


def command(folder: Path, signs: Path, at: str, arguments: tuple[str, ...]) -> None:
    """`lorafa` in a folder, which stops at a place in the work, says "there", and goes on at "go"."""
    from lorafa.runs import comparison
    from lorafa.train import recipe

    def pause() -> None:
        (signs / "there").touch()
        while not (signs / "go").exists():
            time.sleep(0.05)

    prepare, log = recipe.load_base, recipe.RunCallback.on_log

    def load_base(*args: Any, **kwargs: Any) -> Any:
        if at == "prepare":
            pause()
        return prepare(*args, **kwargs)

    def on_log(self: Any, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        log(self, args, state, *rest, **more)
        if at == f"step {state.global_step}":
            pause()

    recipe.load_base, recipe.RunCallback.on_log, comparison.WAIT = load_base, on_log, 0.2
    os.chdir(folder)
    os.environ["COLUMNS"] = "200"
    with (signs / "errors").open("w") as errors, open(os.devnull, "w") as nothing:
        os.dup2(errors.fileno(), 2)
        os.dup2(nothing.fileno(), 1)
    sys.exit(main(list(arguments)))


def claim(folder: Path, run_dir: str, keep: float, ready: Any, moment: Any, answers: Any) -> None:
    """Claim a run directory at a moment, when all are ready; the settings are all that is read of them."""
    os.chdir(folder)
    config = compose([f"run_dir={run_dir}"] if run_dir else [])
    lora_config(config)  # a name is made of it: what that loads is there before the moment
    if ready.wait(LIMIT) == 0:
        moment.value = time.time() + 0.5
    while not 0 < moment.value < time.time():
        pass
    try:
        with RunDirectory.claimed(config) as run:
            (run.path / "config.yaml").write_text("")
            answers.put(f"has {run.path.resolve()}")
            time.sleep(keep)
    except ConfigError as error:
        answers.put(f"refused {error}")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


class Command:
    """A command in a process of its own."""

    def __init__(self, process: Any, signs: Path) -> None:
        self.process, self.signs = process, signs

    def go(self) -> None:
        (self.signs / "go").touch()

    def kill(self) -> None:
        """With no clean-up of ours."""
        self.process.kill()
        self.process.join(LIMIT)

    def wait_for(self, sign: Callable[[], Any]) -> None:
        deadline = time.monotonic() + LIMIT
        while not sign():
            assert self.process.exitcode is None, self.ended()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def ended(self) -> tuple[int | None, str]:
        """Its exit status and what it said of errors."""
        self.process.join(LIMIT)
        return self.process.exitcode, (self.signs / "errors").read_text()


Start = Callable[..., Command]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a command in an empty folder, up to a place; what still runs at the end of the test is killed."""
    started: list[Command] = []

    def begin(*arguments: str, at: str = "") -> Command:
        signs = tmp_path / f"signs {len(started)}"
        signs.mkdir()
        process = STARTS.Process(target=command, args=(tmp_path, signs, at, arguments))
        process.start()
        started.append(Command(process, signs))
        if at:
            started[-1].wait_for((signs / "there").exists)
        return started[-1]

    yield begin
    for one in started:
        one.kill()


@pytest.mark.matrix(2, each_word=False)
@pytest.mark.parametrize("at", ["prepare", "step 3"])
def test_a_run_directory_somebody_is_at_is_refused_before_any_work(
    workplace: Path, tmp_path: Path, start: Start, at: str
) -> None:
    run = tmp_path / "run"
    first = start("train", *settings(workplace, run), *STEPS, "train.seed=1", at=at)
    before = sorted(path.name for path in run.iterdir())
    status, err = start("train", *settings(workplace, run), "model=there/is/none", "train.seed=2").ended()
    assert (status, "is not empty" in err if at == "step 3" else "is taken: another process" in err) == (2, True)
    assert sorted(path.name for path in run.iterdir()) == before
    first.go()
    assert first.ended()[0] == 0
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert "seed: 1\n" in (run / "config.yaml").read_text()
    assert read(run / "result.json")["status"] == "finished"


@pytest.mark.slow
def test_a_run_somebody_continues_is_not_continued_twice(workplace: Path, tmp_path: Path, start: Start) -> None:
    run = tmp_path / "run"
    killed = start("train", *settings(workplace, run), *STEPS, at="step 3")
    resume = ("train", f"train.resume={run}")
    status, err = start(*resume).ended()  # while it is still at it
    assert (status, "is taken: another process is writing to it" in err) == (2, True)
    killed.kill()  # the system lets go of the lock
    first = start(*resume, at="step 5")
    logged = (run / "metrics.jsonl").read_bytes()
    status, err = start(*resume).ended()
    assert (status, "is taken: another process is writing to it" in err) == (2, True)
    assert (run / "metrics.jsonl").read_bytes() == logged
    first.go()
    assert first.ended()[0] == 0
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_was_killed_before_it_began_leaves_its_directory_to_the_next(
    workplace: Path, tmp_path: Path, start: Start
) -> None:
    run = tmp_path / "run"
    killed = start("train", *settings(workplace, run), *STEPS, at="prepare")
    killed.kill()
    assert start("train", *settings(workplace, run), *STEPS).ended()[0] == 0
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False])
def test_one_of_many_that_start_at_the_same_moment_has_the_directory(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "run").mkdir()
    answers = claims(tmp_path, "run", keep=1.0)
    assert sorted(answer.split()[0] for answer in answers) == ["has", *["refused"] * (CLAIMS - 1)]
    assert all("taken" in answer or "not empty" in answer for answer in answers if not answer.startswith("has"))


def test_runs_that_start_at_the_same_moment_have_directories_of_their_own(tmp_path: Path) -> None:
    answers = claims(tmp_path, "", keep=0.0)
    assert all(answer.startswith("has") for answer in answers)
    assert len(set(answers)) == len(answers)
    assert len(list((tmp_path / "runs").iterdir())) == len(answers)


def claims(folder: Path, run_dir: str, keep: float) -> list[str]:
    """What processes say that claim the directory at the same moment."""
    ready, moment, answers = STARTS.Barrier(CLAIMS), STARTS.Value("d", 0.0), STARTS.SimpleQueue()
    arguments = (folder, run_dir, keep, ready, moment, answers)
    processes = [STARTS.Process(target=claim, args=arguments) for _ in range(CLAIMS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
        assert process.exitcode == 0
    return [answers.get() for _ in processes]


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
    both = [start("compare", "plan.yaml", "out", *where) for _ in range(2)]
    assert [one.ended()[0] for one in both] == [0, 0]
    runs = sorted((tmp_path / "out").glob("*/lr-*"))
    assert len(runs) == 4
    for run in runs:
        assert [row["step"] for row in metrics(run)] == [1, 2]
        assert read(run / "result.json")["status"] == "finished"


@pytest.mark.slow
def test_a_comparison_waits_for_a_run_that_somebody_continues(workplace: Path, tmp_path: Path, start: Start) -> None:
    """An unfinished run is set aside, but one that is being written to is left alone, and counts when it is done."""
    plan = PLAN.replace("seeds: [0, 1]", "seeds: [0]").replace(
        "train.steps=2", "train.steps=4, train.checkpoint_every=1"
    )
    (tmp_path / "plan.yaml").write_text(plan)
    compare = ["compare", "plan.yaml", "out", f"model={workplace / 'model'}", f"data={workplace / 'rows.jsonl'}"]
    killed = start(*compare, at="step 2")
    killed.kill()
    (run,) = (tmp_path / "out").glob("a/lr-*")
    continued = start("train", f"train.resume={run}", at="step 3")
    second = start(*compare)
    second.wait_for(lambda: list((tmp_path / "out").glob("b/lr-*/adapter")))  # all that is free is done first
    continued.go()
    assert (continued.ended()[0], second.ended()[0]) == (0, 0)
    assert [path.name for path in (tmp_path / "out" / "a").iterdir()] == [run.name]
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
