"""`lorafa train` in two processes, as torchrun and accelerate start them, is one run and gives what one gives."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorafa.cli.main import main
from lorafa.errors import DataError
from lorafa.peft_model import PeftModel
from lorafa.train.sharding import ASKED
from toys.compare import assert_equal_bits
from toys.processes import STARTS, free_ports, launched
from toys.workplace import make_workplace, metrics, read, settings

LIMIT = 300
SHORT = ["train.steps=6", "train.checkpoint_every=2", "eval.batch_size=3", "data.eval_size=5", "train.eval_every=3"]
"""15 rows are trained on and 5 held out, neither of which comes out even."""
FSDP2 = {ASKED: "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
DROPPED = ["peft.lora_dropout=0.2", "eval.size=0", "eval.before=false"]
FROM_DATA = ["init=lora_ga", "init.iters=3", "eval.size=0", "train.steps=1"]
Act = Callable[[], None]


def fail() -> None:
    raise DataError("a row of mine is bad.")


def at_step(step: int, act: Act) -> None:
    """Do something in this process after that step."""
    from lorafa.train import recipe

    original = recipe.RunCallback.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        original(self, args, state, control, **rest)
        if state.global_step == step:
            act()

    recipe.RunCallback.on_step_end = on_step_end  # type: ignore[method-assign]


def of_two(workplace: Path, run: Path, *more: str) -> list[str]:
    return ["train", *settings(workplace, run), *SHORT, "peft.lora_dropout=0", "train.batch_size=2", *more]


def jobs(workplace: Path, folder: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Name -> arguments and environment of a command, in this order."""

    def train(name: str, *more: str) -> list[str]:
        return of_two(workplace, folder / name, *more)

    return {
        "two": (train("two", "train.save_merged=true", "report_to=tensorboard"), {}),
        "spread": (train("spread", "train.save_merged=true"), FSDP2),
        "whole": (train("whole", *DROPPED), FSDP2),
        "continued": (["train", f"train.resume={folder / 'cut'}"], FSDP2),
        "taken": (train("two"), {}),
        "wrong": (train("wrong", "train.batch_sise=2"), {}),
        "cached": (train("cached", "data.cache=true"), {"LORAFA_CACHE": str(folder / "cache")}),
        "dry": (["train", "--dry-run", *train("dry")[1:]], {}),
        "started": (train("started", *FROM_DATA), {}),
        "old": (train("old"), {ASKED: "true", "FSDP_VERSION": "1"}),
        "deepspeed": (train("deepspeed"), {"ACCELERATE_USE_DEEPSPEED": "true"}),
        "compare": (["compare", "plan.yaml", str(folder / "compared")], {}),
    }


def said(folder: Path, name: str, rank: int) -> tuple[str, str]:
    """What a process has printed, to both of its streams."""
    out, err = ((folder / f"{name}-{rank}.{stream}").read_text() for stream in ("out", "err"))
    return " ".join(out.split()), " ".join(line for line in err.splitlines() if line.startswith(("error", "warning")))


def command(folder: Path, name: str, rank: int, arguments: list[str]) -> int:
    """Run a command of this process and keep what it prints."""
    for descriptor, stream in ((1, "out"), (2, "err")):
        with (folder / f"{name}-{rank}.{stream}").open("w") as file:
            os.dup2(file.fileno(), descriptor)
    return main(arguments)


def work(rank: int, workplace: Path, folder: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    os.environ["COLUMNS"] = "200"
    before = dict(os.environ)
    gc.collect()
    gc.freeze()
    for (name, (arguments, environ)), port in zip(jobs(workplace, folder).items(), ports, strict=True):
        os.environ.clear()
        os.environ.update(before | environ)
        launched(rank, port)
        (folder / f"{name}-{rank}.status").write_text(str(command(folder, name, rank, arguments)))
    os._exit(0)


def ending(rank: int, folder: Path, port: int, how: str, arguments: list[str], environ: dict[str, str]) -> None:
    """A command during which something happens to one of the two."""
    from lorafa import launch

    launch.GRACE = 2.0
    os.environ.update(environ, COLUMNS="200")
    torch.set_num_threads(1)
    launched(rank, port)
    acts: dict[tuple[str, int], Act] = {
        ("cut", 1): fail,
        ("killed", 1): lambda: os.kill(os.getpid(), signal.SIGKILL),
        ("stuck", 0): lambda: time.sleep(LIMIT),
        ("stuck", 1): fail,
    }
    if (how, rank) in acts:
        at_step(3, acts[how, rank])
    status = command(folder, how, rank, arguments)
    sys.stdout.flush()
    os._exit(status)


def end(processes: list[Any], within: float = LIMIT) -> list[int | None]:
    """Wait for processes; how each has ended."""
    until = time.monotonic() + within
    try:
        while any(process.is_alive() for process in processes) and time.monotonic() < until:
            time.sleep(0.1)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def start(target: Callable[..., None], *arguments: Any) -> list[Any]:
    processes = [STARTS.Process(target=target, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    return processes


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def ran(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    cut = of_two(workplace, folder / "cut", *DROPPED)
    assert end(start(ending, folder, free_ports(1)[0], "cut", cut, FSDP2)) == [1, 1]
    running = start(work, workplace, folder, free_ports(len(jobs(workplace, folder))))
    for name, more in {"one": [], "started one": FROM_DATA}.items():
        arguments = [*settings(workplace, folder / name), *SHORT, "peft.lora_dropout=0", "train.batch_size=4", *more]
        assert main(["train", *arguments]) == 0
    assert end(running) == [0, 0]
    return folder


def statuses(ran: Path, name: str) -> list[int]:
    return [int((ran / f"{name}-{rank}.status").read_text()) for rank in range(2)]


def numbers(run: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in metrics(run)]


@pytest.mark.matrix(3, each_word=False)
@pytest.mark.parametrize("name", ["two", "spread", "cached"])
def test_two_processes_measure_and_train_what_one_does(ran: Path, name: str) -> None:
    assert statuses(ran, name) == [0, 0]
    one, two = read(ran / "one" / "result.json"), read(ran / name / "result.json")
    assert two["before"] == one["before"]
    assert two["samples"] == one["samples"]
    torch.testing.assert_close(two["after"], one["after"], rtol=1e-5, atol=0)
    for found, wanted in zip(numbers(ran / name), numbers(ran / "one"), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    found, wanted = (load_file(ran / run / "adapter" / "adapter_model.safetensors") for run in (name, "one"))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["two", "spread"])
def test_the_merged_model_of_two_processes_is_the_base_with_the_adapter_in_its_weights(
    ran: Path, workplace: Path, name: str
) -> None:
    merged = load_file(ran / name / "merged" / "model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(workplace / "model")
    wanted = PeftModel.from_pretrained(base, ran / name / "adapter").merge_and_unload().state_dict()
    assert merged.keys() == wanted.keys()
    torch.testing.assert_close(merged, wanted, rtol=1e-6, atol=1e-7)


def test_processes_share_one_file_of_tokens(ran: Path) -> None:
    (file,) = (ran / "cache" / "tokens").iterdir()
    assert "were in the cache" not in said(ran, "cached", 0)[0]
    digests = {read(ran / name / "result.json")["samples_sha256"] for name in ("one", "cached")}
    assert len(digests) == 1
    assert file.suffix == ".tokens"


def test_only_the_first_process_prints_and_writes(ran: Path) -> None:
    out, err = said(ran, "two", 0)
    assert "A step is of 4 samples: 2 in each of 2 processes." in out
    assert f"Report: {ran / 'two' / 'report.html'}" in out
    assert said(ran, "two", 1) == ("", "")
    assert err == ""
    assert read(ran / "two" / "environment.json")["processes"] == 2
    assert len(list((ran / "two" / "tensorboard").iterdir())) == 1
    assert [row["step"] for row in metrics(ran / "two") if "loss" in row] == [1, 2, 3, 4, 5, 6]
    names = {path.name for path in (ran / "two" / "checkpoints" / "checkpoint-6").iterdir()}
    assert {"optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"} <= names
    assert not [name for name in names if "fsdp" in name]


def test_a_run_of_two_processes_that_one_of_them_has_ended_is_continued_bit_for_bit(ran: Path) -> None:
    assert statuses(ran, "continued") == statuses(ran, "whole") == [0, 0]
    assert numbers(ran / "cut") == numbers(ran / "whole")
    found, wanted = (load_file(ran / name / "adapter" / "adapter_model.safetensors") for name in ("cut", "whole"))
    assert_equal_bits(found, wanted)


def test_an_error_in_one_process_is_the_error_of_all(ran: Path) -> None:
    assert said(ran, "cut", 1)[1] == "error: a row of mine is bad."
    assert said(ran, "cut", 0)[1] == "error: Process 1 has stopped: a row of mine is bad."


def test_a_start_from_data_reads_its_rows_once(ran: Path) -> None:
    assert statuses(ran, "started") == [0, 0]
    one, two = (read(ran / name / "result.json") for name in ("started one", "started"))
    assert two["start"]["rows"] == one["start"]["rows"]
    torch.testing.assert_close(two["start"]["spectra"], one["start"]["spectra"], rtol=1e-2, atol=1e-6)
    assert numbers(ran / "started")[0] == pytest.approx(numbers(ran / "started one")[0], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "status", "text"),
    [
        ("taken", 2, "exists and is not empty; a run overwrites nothing."),
        ("wrong", 2, "train.batch_sise"),
        ("old", 2, "accelerate asks for the first FSDP, which flattens adapters and base into one. Give it fsdp"),
        ("deepspeed", 2, "accelerate asks for DeepSpeed, with which no run was ever tried. Spread the model by FSDP2"),
        ("compare", 2, "lorafa compare is no work for a group of processes, and torchrun has started 2 processes"),
    ],
)
def test_what_is_refused_is_refused_in_all(ran: Path, name: str, status: int, text: str) -> None:
    assert statuses(ran, name) == [status, status]
    assert text in said(ran, name, 0)[1]
    assert not (ran / "old").exists()
    assert not (ran / "wrong").exists()


def test_a_dry_run_writes_nothing(ran: Path) -> None:
    assert statuses(ran, "dry") == [0, 0]
    assert "Dry run: nothing was trained" in said(ran, "dry", 0)[0]
    assert not (ran / "dry").exists()


def test_a_run_of_two_processes_is_not_continued_by_one(
    ran: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = read(ran / "two" / "result.json")
    run = ran / "two"
    assert main(["train", f"train.resume={run}", "train.steps=8", "--dry-run"]) == 1
    text = " ".join(capsys.readouterr().err.split())
    assert "checkpoint-6 was written by 2 processes and there is 1 now, whose batches would be others. Start 2" in text
    assert read(ran / "two" / "result.json") == before


# ---- processes that do not end by themselves


KILLED = "The connection to another process is lost, which has ended without a word, killed perhaps for its memory:"
STUCK = "Process 1 has stopped: a row of mine is bad."


@pytest.mark.matrix(2, each_word=False)
@pytest.mark.parametrize(
    ("how", "statuses", "text", "recorded"),
    [
        ("killed", [1, -signal.SIGKILL], KILLED, f"TrainingError: {KILLED}"),
        ("stuck", [1, 1], STUCK, f"DataError: {STUCK}"),
    ],
)
def test_a_process_that_ends_ends_the_others(
    workplace: Path, tmp_path: Path, how: str, statuses: list[int], text: str, recorded: str
) -> None:
    arguments = of_two(workplace, tmp_path / how, *DROPPED)
    assert end(start(ending, tmp_path, free_ports(1)[0], how, arguments, {}), within=120) == statuses
    assert f"error: {text}" in said(tmp_path, how, 0)[1]
    result = read(tmp_path / how / "result.json")
    assert result["status"] == "failed"
    assert result["error"].startswith(recorded)
