"""Writers that the system ends: what they leave is read, and removed by the next; a living one's is not."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import lorafa
from lorafa import LoraConfig, PeftModel
from lorafa.io.adapter_files import read_adapter
from lorafa.storage.leavings import own_file, own_folder
from lorafa.storage.whole import write_json

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
