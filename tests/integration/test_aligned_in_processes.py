"""A teacher in two processes: one run, that decides alike in both, measures what one does, and resumes in mid-phase."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorafa.cli.main import main
from lorafa.errors import DataError
from toys.compare import assert_equal_bits
from toys.processes import STARTS, free_ports, launched
from toys.workplace import make_teacher, make_workplace, metrics, read, settings

SHORT = [
    *("train.steps=8", "train.checkpoint_every=1", "eval.size=0", "eval.before=false", "eval.batch_size=3"),
    *("data.eval_size=5", "peft.lora_dropout=0", "optim.schedule=constant"),
]
CYCLE = [
    *("align=snapshot", "align.schedule=cyclic", "align.task_steps=2", "align.teacher_steps=2", "align.rewarm_steps=1"),
    *("align.gate=false", "align.probe_rows=3", "align.divergence=fkl"),
]
CYCLES = [*CYCLE, "align.weight=balanced", "align.reorient=true"]


def mapped(workplace: Path) -> list[str]:
    teacher = ["align=external", f"align.teacher={workplace / 'teacher'}"]
    return [*teacher, "align.map=proj", "align.map_weight=2", "align.weight=balanced"]


def kept(folder: Path) -> list[str]:
    return ["align=base", "align.divergence=rkl", f"align.cache={folder / 'kept'}", "align.top_k=6"]


def of_two(workplace: Path, run: Path, *more: str) -> list[str]:
    return ["train", *settings(workplace, run), *SHORT, "train.batch_size=2", *more]


def stop_at(step: int) -> None:
    """This process ends after that step."""
    from lorafa.train import recipe

    original = recipe.RunCallback.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        original(self, args, state, control, **rest)
        if state.global_step == step:
            raise DataError("a row of mine is bad.")

    recipe.RunCallback.on_step_end = on_step_end  # type: ignore[method-assign]


def keeping_maps(rank: int, folder: Path) -> None:
    """With each checkpoint this process keeps its own linear maps."""
    from lorafa.train.aligned import Aligning

    original = Aligning._save_optimizer_and_scheduler

    def saving(self: Any, output_dir: str) -> None:
        original(self, output_dir)
        maps = [p.detach().clone() for p in self.alignment.parameters()]
        torch.save(maps, folder / f"{Path(output_dir).parts[-3]}-{rank}.maps")

    Aligning._save_optimizer_and_scheduler = saving  # type: ignore[method-assign]


def work(rank: int, workplace: Path, folder: Path, ports: list[int]) -> None:
    from lorafa import launch

    launch.GRACE = 2.0
    torch.set_num_threads(1)
    keeping_maps(rank, folder)
    before = dict(os.environ)
    gc.collect()
    gc.freeze()
    jobs = {
        "whole": of_two(workplace, folder / "whole", *CYCLES),
        "continued": ["train", f"train.resume={folder / 'cut'}"],
        "cycle": of_two(workplace, folder / "cycle", *CYCLE),
        "mapped": of_two(workplace, folder / "mapped", *mapped(workplace)),
        "kept": of_two(workplace, folder / "kept run", *kept(folder)),
    }
    for (name, arguments), port in zip(jobs.items(), ports, strict=True):
        os.environ.clear()
        os.environ.update(before)
        launched(rank, port)
        (folder / f"{name}-{rank}.status").write_text(str(main(arguments)))
    os._exit(0)


def cut(rank: int, workplace: Path, folder: Path, port: int) -> None:
    from lorafa import launch

    launch.GRACE = 2.0
    torch.set_num_threads(1)
    launched(rank, port)
    if rank == 1:
        stop_at(4)
    status = main(of_two(workplace, folder / "cut", *CYCLES))
    os._exit(status)


def start(target: Any, *arguments: Any) -> list[int | None]:
    processes = [STARTS.Process(target=target, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workplace, folder = make_workplace(tmp_path_factory.mktemp("work")), tmp_path_factory.mktemp("runs")
    make_teacher(workplace)
    assert start(cut, workplace, folder, free_ports(1)[0]) == [1, 1]
    assert start(work, workplace, folder, free_ports(5)) == [0, 0]
    alone = [text for text in settings(workplace, folder / "x") if not text.startswith(("run_dir", "train.batch_size"))]
    for name, more in {"one cycle": CYCLE, "one mapped": mapped(workplace), "one kept": kept(folder)}.items():
        assert main(["train", *alone, f"run_dir={folder / name}", *SHORT, "train.batch_size=4", *more]) == 0
    for name in ("whole", "continued", "cycle", "mapped", "kept"):
        assert [(folder / f"{name}-{rank}.status").read_text() for rank in range(2)] == ["0", "0"], name
    return folder


def numbers(run: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in metrics(run)]


@pytest.mark.slow
def test_a_run_that_was_cut_in_a_reoriented_phase_goes_on_to_the_bit(ran: Path) -> None:
    assert numbers(ran / "cut") == numbers(ran / "whole")
    found, wanted = (load_file(ran / name / "adapter" / "adapter_model.safetensors") for name in ("cut", "whole"))
    assert_equal_bits(found, wanted)
    decisions = [read(ran / name / "result.json")["decisions"] for name in ("cut", "whole")]
    assert decisions[0] == decisions[1]
    kinds = {row["kind"] for row in decisions[0]}
    assert {"switch", "reoriented", "compressed", "balanced"} <= kinds


@pytest.mark.slow
def test_two_processes_measure_and_decide_what_one_does(ran: Path) -> None:
    two, one = read(ran / "cycle" / "result.json"), read(ran / "one cycle" / "result.json")
    assert {row["kind"] for row in two["decisions"]} >= {"switch", "ended"}
    for found, wanted in zip(two["decisions"], one["decisions"], strict=True):
        assert (found["kind"], found["step"], found["phase"]) == (wanted["kind"], wanted["step"], wanted["phase"])
        for key in {"task", "divergence"} & found.keys():
            assert found[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-6)
    for row, other in zip(numbers(ran / "cycle"), numbers(ran / "one cycle"), strict=True):
        assert row == pytest.approx(other, rel=2e-3, abs=1e-6)
    assert any(row.get("divergence", 0) > 0 for row in numbers(ran / "cycle"))


@pytest.mark.slow
def test_two_processes_train_one_map_and_have_one_weight(ran: Path) -> None:
    """Distances of states are those of each process's batch, so that one process with all rows has others."""
    first, second = (torch.load(ran / f"mapped-{rank}.maps", weights_only=True) for rank in range(2))
    assert_equal_bits(first, second)
    assert all(float((P - torch.eye(32)).abs().max()) > 1e-2 for P in first)
    two, one = (read(ran / name / "result.json")["decisions"] for name in ("mapped", "one mapped"))
    assert [row["kind"] for row in two] == ["balanced"]
    of_task = [row["why"].split("of the teacher")[0] for row in (two[0], one[0])]
    assert of_task[0] == of_task[1]


@pytest.mark.slow
def test_two_processes_share_what_the_teacher_says(ran: Path) -> None:
    (line,) = [row for row in read(ran / "kept run" / "result.json")["decisions"] if row["kind"] == "cached"]
    assert line["why"].startswith("15 rows of the base")
    assert len(list((ran / "kept").glob("*.safetensors"))) == 2  # each has asked of its share
    assert json.loads((ran / "kept" / "targets.json").read_text())["top_k"] == 6
    (alone,) = [row for row in read(ran / "one kept" / "result.json")["decisions"] if row["kind"] == "cached"]
    assert alone["why"].endswith("; 0 rows were asked now")
    for row, other in zip(numbers(ran / "kept run"), numbers(ran / "one kept"), strict=True):
        assert row == pytest.approx(other, rel=2e-3, abs=1e-6)
