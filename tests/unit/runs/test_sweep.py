"""Sweeps: which points the grammar names, where their runs go, and what becomes of one that fails or is cut short."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from rich.console import Console

from lorafa.conf.compose import compose, options
from lorafa.errors import ConfigError, DivergedError
from lorafa.runs import sweep as sweeps
from lorafa.runs.record import RunDirectory
from lorafa.runs.sweep import planned, points_of, rows, split, sweep
from lorafa.train.settings.run import RunConfig
from toys.processes import enter_group, leave_group, run_group

QUIET = Console(quiet=True)


class Runs:
    """Stands in for a training: makes the run directory, and writes down which runs were started."""

    def __init__(self, failing: Sequence[str] = ()) -> None:
        self.started: list[str] = []
        self.failing = failing

    def __call__(self, config: RunConfig, console: Console, command: Sequence[str]) -> Path:
        path = Path(str(config.run_dir))
        self.started.append(path.name)
        run = RunDirectory.create(path, config)
        if path.name in self.failing:
            run.update_result(status="failed", error="it went wrong")
            raise DivergedError("It went wrong. Lower the rate.")
        run.update_result(status="finished", after={"loss": config.optim.lr})
        return path


def plan_of(folder: Path, *words: str) -> sweeps.Sweep:
    own, launch = split(words)
    points = points_of([*own, f"run_dir={folder}"], options)
    return planned(points, [compose(point.words) for point in points], launch)


def names(*words: str) -> list[str]:
    return [point.name for point in points_of(words, options)]


# ---- which points ---------------------------------------------------------------------------------------------------


def test_every_combination_is_a_point_named_by_what_varies() -> None:
    points = points_of(["++peft.r=4,8", "train.steps=3", "train.seed=range(1,3)", "optim=choice(sgd)"], options)
    assert [point.name for point in points] == [
        "peft.r=4,train.seed=1,optim=sgd",
        "peft.r=4,train.seed=2,optim=sgd",
        "peft.r=8,train.seed=1,optim=sgd",
        "peft.r=8,train.seed=2,optim=sgd",
    ]
    assert points[0].settings == ("peft.r=4", "train.seed=1", "optim=sgd")
    assert points[3].words == ("++peft.r=8", "train.steps=3", "train.seed=2", "optim=sgd")


def test_glob_chooses_among_the_options_of_a_group() -> None:
    assert names("peft=glob(*ora)") == ["peft=dora", "peft=lora", "peft=rslora"]
    assert names("optim=glob(lora_*,exclude=lora_pro)") == ["optim=lora_fa", "optim=lora_plus"]
    assert names("init=glob(lora_g*)") == ["init=lora_ga", "init=lora_ga_clipped", "init=lora_ga_peft"]


def test_lists_texts_and_what_the_grammar_cannot_read_are_one_value() -> None:
    assert names("peft.target_modules=[a,b]", "data='a,b.jsonl'", "run_dir=~/a (1)") == [""]
    assert names("peft.target_modules=[a],[b]") == [
        "peft.target_modules=_a_-" + names("peft.target_modules=[a],[b]")[0].rpartition("-")[2],
        "peft.target_modules=_b_-" + names("peft.target_modules=[a],[b]")[1].rpartition("-")[2],
    ]


def test_a_later_value_of_a_key_takes_the_place_of_an_earlier_one() -> None:
    assert names("peft.r=4,8", "+peft.r=16") == [""]
    assert names("peft.r=4", "peft.r=8,16") == ["peft.r=8", "peft.r=16"]
    assert names("peft.r=4,4,8") == ["peft.r=4", "peft.r=8"]


def test_names_are_names_of_folders_however_long_the_settings() -> None:
    long = names(f"data=a/{'b' * 300}.jsonl,c/d.jsonl")
    assert all("/" not in name and len(name) < 140 for name in long)
    assert len(set(long)) == 2


def test_values_without_a_list_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"The values of 'optim\.lr=interval\(0,1\)' cannot be listed\. Name them"):
        names("optim.lr=interval(0,1)")
    with pytest.raises(ConfigError, match=r"'peft=glob\(x\*\)' names no value\. Check its bounds, or the pattern"):
        names("peft=glob(x*)")


def test_settings_of_hydra_are_no_settings_of_a_run(tmp_path: Path) -> None:
    assert split(["a=1", "hydra/launcher=joblib", "+hydra.launcher.n_jobs=2"]) == (
        ["a=1"],
        ["hydra/launcher=joblib", "+hydra.launcher.n_jobs=2"],
    )
    with pytest.raises(ConfigError, match=r"'hydra/launcher=joblib' says how a sweep is launched, and this is one run"):
        compose(["hydra/launcher=joblib"])


# ---- where ----------------------------------------------------------------------------------------------------------


def test_each_point_is_a_run_directory_in_the_folder_of_the_sweep(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "s", "optim.lr=1e-3,2e-3")
    assert [config.run_dir for config in plan.configs] == [str(tmp_path / f"s/optim.lr={lr}") for lr in (0.001, 0.002)]
    assert {config.if_exists for config in plan.configs} == {"resume"}
    points = points_of(["optim.lr=1e-3,2e-3"], options)
    configs = [compose(point.words) for point in points]
    assert planned(points, configs, [f"hydra.sweep.dir={tmp_path}/h"]).folder == tmp_path / "h"
    assert planned(points, configs, []).folder.match("runs/*-sweep")
    own = [replace(config, run_dir=f"r{number}") for number, config in enumerate(configs)]
    with pytest.raises(ConfigError, match=r"would lie in several places, r0, r1, and a sweep has one folder"):
        planned(points, own, [])


def test_a_mistake_in_a_point_and_a_folder_that_is_taken_are_found_before_the_first_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr is 0"):
        plan_of(tmp_path, "optim.lr=1e-3,0")
    RunDirectory.create(tmp_path / "run", compose())
    with pytest.raises(ConfigError, match=r"run' is a run, and a sweep is a folder of runs\. Give it another run_dir"):
        plan_of(tmp_path / "run", "peft.r=4,8")
    with pytest.raises(ConfigError, match=r"data\.name holds a secret, and settings are recorded\. Give it by an"):
        plan_of(tmp_path / "s", "peft.r=4,8", "data=https://ann:pass-word@host/rows.jsonl")
    with pytest.raises(ConfigError, match=r"A sweep continues its own runs, found train\.resume"):
        plan_of(tmp_path / "s", "peft.r=4,8", "train.resume=x")
    RunDirectory.create(tmp_path / "s" / "peft.r=4", compose(["peft.r=4", "train.steps=7"]))
    with pytest.raises(ConfigError, match=r"has other settings, so it is not resumed: train\.steps was 7 then"):
        plan_of(tmp_path / "s", "peft.r=4,8")


# ---- running --------------------------------------------------------------------------------------------------------


def test_all_points_are_run_and_a_row_says_what_came_out(tmp_path: Path) -> None:
    runs, plan = Runs(), plan_of(tmp_path / "s", "optim.lr=1e-3,2e-3")
    found = sweep(plan, QUIET, ["lorafa"], runs)
    assert runs.started == ["optim.lr=0.001", "optim.lr=0.002"]
    assert found[1] == {
        "name": "optim.lr=0.002", "settings": ["optim.lr=0.002"], "status": "finished", "error": None, "loss": 0.002,
        "directory": str(tmp_path / "s/optim.lr=0.002"),
    }  # fmt: skip
    assert sweeps.read_json(tmp_path / "s" / "sweep.json") == {"points": found}


def test_a_failed_point_is_recorded_the_others_are_run_and_only_it_is_run_again(tmp_path: Path) -> None:
    plan, failing = plan_of(tmp_path / "s", "peft.r=2,4,8"), Runs(["peft.r=4"])
    found = sweep(plan, QUIET, ["lorafa"], failing)
    assert failing.started == ["peft.r=2", "peft.r=4", "peft.r=8"]
    assert [row["status"] for row in found] == ["finished", "failed", "finished"]
    assert found[1]["error"] == "DivergedError: It went wrong. Lower the rate"
    again = Runs()
    assert [row["status"] for row in sweep(plan, QUIET, ["lorafa"], again)] == ["finished"] * 3
    assert again.started == ["peft.r=4"]
    assert not any((tmp_path / "s" / ".failed").iterdir())


def test_a_point_that_was_cut_short_is_unfinished_and_begun_again(tmp_path: Path) -> None:
    def interrupted(config: RunConfig, console: Console, command: Sequence[str]) -> Path:
        RunDirectory.create(Path(str(config.run_dir)), config).update_result(status="failed", error="interrupted")
        raise KeyboardInterrupt

    plan = plan_of(tmp_path / "s", "peft.r=2,4")
    with pytest.raises(KeyboardInterrupt):
        sweep(plan, QUIET, ["lorafa"], interrupted)
    assert [row["status"] for row in rows(plan)] == ["unfinished", "not begun"]
    runs = Runs()
    sweep(plan, QUIET, ["lorafa"], runs)
    assert runs.started == ["peft.r=2", "peft.r=4"]


def test_a_point_another_process_is_at_is_left_to_it_and_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, runs = plan_of(tmp_path / "s", "peft.r=2,4"), Runs()
    lock = FileLock(tmp_path / "s" / ".locks" / "peft.r=2.lock")
    lock.lock_file and Path(lock.lock_file).parent.mkdir(parents=True)
    lock.acquire()

    def other_ends(seconds: float) -> None:
        assert runs.started == ["peft.r=4"]
        run = RunDirectory.create(tmp_path / "s" / "peft.r=2", plan.configs[0])
        run.update_result(status="finished", after={"loss": 1.0})
        lock.release()

    monkeypatch.setattr(sweeps.time, "sleep", other_ends)
    found = sweep(plan, QUIET, ["lorafa"], runs)
    assert runs.started == ["peft.r=4"]
    assert [row["status"] for row in found] == ["finished", "finished"]


def walk(rank: int, folder: str) -> None:
    """A sweep in one of two processes; only the first one's runs leave anything."""
    enter_group(rank, Path(folder))
    own = Path(folder) / str(rank)
    runs, plan = Runs(["peft.r=8"]), plan_of(Path(folder) / "s", "peft.r=2,8,4")
    here = replace(plan, configs=tuple(replace(c, run_dir=str(own / Path(str(c.run_dir)).name)) for c in plan.configs))
    sweep(here if rank else plan, QUIET, ["lorafa"], runs)
    (Path(folder) / f"walked-{rank}").write_text(" ".join(runs.started))
    leave_group()


@pytest.mark.slow
def test_processes_of_one_training_walk_the_same_points_in_the_same_order(tmp_path: Path) -> None:
    """Without locks, and whatever the others have finished meanwhile; the first one alone writes the table."""
    run_group(walk, str(tmp_path))
    walked = [(tmp_path / f"walked-{rank}").read_text() for rank in (0, 1)]
    assert walked[0] == walked[1] == "peft.r=2 peft.r=8 peft.r=4"
    assert (tmp_path / "s" / "sweep.json").is_file()
    assert not (tmp_path / "s" / ".locks").exists()


def test_a_launcher_that_is_not_installed_is_answered_with_the_packages(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "s", "peft.r=2,4", "hydra/launcher=jobli")
    with pytest.raises(ConfigError, match=r"launched with 'hydra/launcher=jobli': .*Could not find 'hydra/launcher/jo"):
        sweep(plan, QUIET, ["lorafa"], Runs())
    with pytest.raises(ConfigError, match=r"hydra-joblib-launcher \(joblib\), hydra-ray-launcher \(ray\)"):
        sweep(plan, QUIET, ["lorafa"], Runs())
    assert not (tmp_path / "s").exists()


def test_the_last_loss_of_the_training_stands_where_nothing_is_held_out(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "s", "peft.r=2,4")

    def without_heldout(config: RunConfig, console: Console, command: Sequence[str]) -> Path:
        run = RunDirectory.create(Path(str(config.run_dir)), config)
        run.add_metrics({"step": 1, "loss": 3.0})
        run.add_metrics({"step": 2, "loss": 2.5})
        run.update_result(status="finished", after={})
        return run.path

    assert [row["loss"] for row in sweep(plan, QUIET, ["lorafa"], without_heldout)] == [2.5, 2.5]


def test_jobs_can_be_carried_to_other_processes(tmp_path: Path) -> None:
    import pickle

    plan = plan_of(tmp_path / "s", "peft.r=2,4")
    job = sweeps._Job(plan, ("lorafa",), 0.0, False, sweeps.start_run, sweeps._Screen(QUIET))
    there: Any = pickle.loads(pickle.dumps(job))
    assert there.plan.configs == plan.configs
    assert there.screen.get().quiet
