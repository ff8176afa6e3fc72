"""Writers that the system ends: what they leave is read, and removed by the next; a living one's is not."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import nn

import lorafa
from lorafa import LoraConfig, PeftModel
from lorafa.cli.main import main
from lorafa.io.adapter_files import read_adapter
from lorafa.storage.leavings import own_file, own_folder
from lorafa.storage.whole import write_json
from toys.compare import assert_equal_bits
from toys.workplace import make_workplace, metrics, read, settings

KILLS = int(os.environ.get("LORAFA_KILLS", "200"))
"""How many savers are killed at random moments; of trainings a twentieth."""
CONFIG = "adapter_config.json"
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


def adapted(alpha: int) -> PeftModel:
    model = lorafa.get_peft_model(nn.Sequential(nn.Linear(5, 4)), LoraConfig(lora_alpha=alpha, target_modules=["0"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.fill_(alpha)
    return model


def forked(act: Callable[[], None]) -> int:
    """The process that does it, and ends without cleaning up."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(1)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_an_adapter_of_a_killed_process_is_read_and_the_next_save_clears_up(renamed: int, tmp_path: Path) -> None:
    """Killed when so many files have their new names."""
    adapted(8).save_pretrained(tmp_path)
    model, replace, done = adapted(64), os.replace, 0

    def save() -> None:
        def counted(source: object, target: object) -> None:
            nonlocal done
            if done == renamed:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)  # type: ignore[arg-type]
            done += 1

        os.replace = counted  # type: ignore[assignment]
        model.save_pretrained(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)

    assert ended(forked(save)) == -signal.SIGKILL
    if renamed < 2:
        with pytest.warns(UserWarning, match="was killed before its end"):
            stored = read_adapter(tmp_path)
        assert sum(path.name.endswith(".tmp") for path in tmp_path.iterdir()) == 1
    else:
        stored = read_adapter(tmp_path)
    assert stored.config.lora_alpha == (64 if renamed else 8)
    assert all(bool((tensor == stored.config.lora_alpha).all()) for tensor in stored.tensors.values())
    adapted(5).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", CONFIG, "adapter_model.safetensors"]
    assert read_adapter(tmp_path).config.lora_alpha == 5


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()

    def write() -> None:
        with own_file(tmp_path, "a.json"), own_folder(tmp_path / "adapter"):
            (tmp_path / "ready").touch()
            time.sleep(60)

    child = forked(write)
    try:
        for _ in range(500):
            if (tmp_path / "ready").exists():
                break
            time.sleep(0.01)
        write_json(tmp_path / "a.json", {})
        adapted(8).save_pretrained(tmp_path / "adapter")
        assert len(list(tmp_path.rglob(".*.tmp"))) == 2
    finally:
        os.kill(child, signal.SIGKILL)
        ended(child)
    write_json(tmp_path / "a.json", {})
    adapted(8).save_pretrained(tmp_path / "adapter")
    assert not list(tmp_path.rglob(".*.tmp"))


def killed_after(seconds: float, act: Callable[[], None]) -> bool:
    """Whether a process that does it lived for so long, and was killed then."""
    child = forked(act)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return ended(child) == -signal.SIGKILL


@pytest.mark.slow
def test_an_adapter_is_whole_whenever_its_saver_is_killed(tmp_path: Path) -> None:
    models, moments = {alpha: adapted(alpha) for alpha in (8, 64)}, random.Random(f"saves {KILLS}")
    models[8].save_pretrained(tmp_path)

    start = time.monotonic()
    models[8].save_pretrained(tmp_path)
    length, found = time.monotonic() - start, list[int | float]()
    for _ in range(KILLS):
        heard, says = os.pipe()

        def save(says: int = says) -> None:
            while True:
                for alpha in (64, 8):
                    os.write(says, b".")
                    models[alpha].save_pretrained(tmp_path)

        child = forked(save)
        os.read(heard, 1)
        for _ in range(moments.randrange(3)):  # saves that come to their end
            os.read(heard, 1)
        time.sleep(moments.uniform(0.0, length))
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        os.close(heard)
        os.close(says)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*was killed before its end")
            stored = read_adapter(tmp_path)
        alpha = stored.config.lora_alpha
        assert all(bool((tensor == alpha).all()) for tensor in stored.tensors.values())
        found.append(alpha)
    assert {*found} == {8, 64}
    models[8].save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", CONFIG, "adapter_model.safetensors"]
    print(f"{KILLS} savers killed, {found.count(64)} of them left the new adapter", file=sys.stderr)


@pytest.mark.slow
def test_a_training_comes_to_the_same_bits_whenever_it_is_killed(tmp_path: Path) -> None:
    workplace, moments = make_workplace(tmp_path), random.Random(f"trainings {KILLS}")
    short = ["train.steps=6", "train.checkpoint_every=2", "eval.size=0", "eval.before=false", "if_exists=resume"]

    def work(run: Path) -> Callable[[], None]:
        def act() -> None:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            os._exit(main(["train", *settings(workplace, run), *short]))

        return act

    whole = tmp_path / "whole"
    start = time.monotonic()
    assert ended(forked(work(whole))) == 0
    length = time.monotonic() - start
    killed = 0
    for number in range(max(1, KILLS // 20)):
        run = tmp_path / f"run-{number}"
        for _ in range(2):  # twice in a row: what was continued may be killed as well
            killed += killed_after(moments.uniform(0.0, length), work(run))
        assert ended(forked(work(run))) == 0
        one, other = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (run, whole))
        assert_equal_bits(one, other)
        assert [row["loss"] for row in metrics(run)] == [row["loss"] for row in metrics(whole)]
        assert read(run / "result.json")["after"] == read(whole / "result.json")["after"]
    print(f"{killed} trainings killed", file=sys.stderr)
