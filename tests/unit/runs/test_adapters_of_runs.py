"""Commands that take an adapter take a run directory for the adapter in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lorafa.cli.main import main
from lorafa.config import LoraConfig
from lorafa.errors import ConfigError
from lorafa.runs.adapters import adapter_in, run_in
from lorafa.storage.tensors import read_tensors
from toys.exported import on_disk


def folder(path: Path, *files: str) -> Path:
    path.mkdir()
    for file in files:
        (path / file).parent.mkdir(exist_ok=True)
        (path / file).write_text("{}")
    return path


def test_a_run_stands_for_its_adapter_and_anything_else_for_itself(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", "config.yaml", "adapter/adapter_config.json")
    assert adapter_in(str(run)) == str(run / "adapter")
    assert adapter_in(str(run / "adapter")) == str(run / "adapter")
    assert adapter_in("owner/adapter") == "owner/adapter"
    assert run_in("owner/adapter") is None


def test_an_adapter_with_settings_of_another_program_beside_it_is_no_run(tmp_path: Path) -> None:
    adapter = folder(tmp_path / "adapter", "config.yaml", "adapter_config.json")
    assert run_in(str(adapter)) is None
    assert adapter_in(str(adapter)) == str(adapter)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        (("config.yaml",), r"has no adapter yet \(status: not begun\)\. Let it finish first\."),
        (("config.yaml", "model/config.json"), r"has no adapter: it has trained the whole model\."),
        (("config.json",), r"is a model and no adapter\. Name the folder of an adapter, or a run\."),
    ],
)
def test_what_has_no_adapter_says_why(files: tuple[str, ...], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        adapter_in(str(folder(tmp_path / "run", *files)))


def test_the_commands_find_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, adapter = on_disk(tmp_path, target_modules=["q_proj"])
    run = folder(tmp_path / "run", "config.yaml")
    shutil.copytree(adapter, run / "adapter")
    assert main(["export", str(run), "--for", "peft", "--out", str(tmp_path / "exported")]) == 0
    assert main(["combine", str(run), "--type", "cat", "--weights", "2", "--out", str(tmp_path / "both")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(run), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 2
    config = LoraConfig.from_pretrained(adapter)
    assert LoraConfig.from_pretrained(tmp_path / "both").r == config.r
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    A = [read_tensors(place / "adapter_model.safetensors")[0][key] for place in (Path(adapter), tmp_path / "exported")]
    assert torch.equal(*A)
