"""`lorafa export`: what it prints and writes, and how it ends."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import pytest

from lorafa.cli.main import main
from toys.compare import close
from toys.exported import by_vllm, on_disk, updates_of


def test_it_says_what_was_made_of_scalings_and_how_the_server_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = on_disk(tmp_path, rank_pattern={"q_proj": 2}, use_rslora=True)
    out = tmp_path / "out"
    capsys.readouterr()
    assert main(["export", folder, "--for", "vllm", "--out", str(out), "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 14 layers have a lower rank: zeros fill them up to 4." in printed
    assert "Layers are scaled by 2 factors; what differs is in B." in printed
    assert "--enable-lora --max-lora-rank 8" in printed
    assert "Read back: 14 updates, the largest relative difference" in printed
    assert f"Written: {out} (adapter_config.json, adapter_model.safetensors)" in printed
    for path, update in updates_of(model).items():
        close(by_vllm(out)[path], update, 1e-5)


def test_with_a_base_it_compares_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = on_disk(tmp_path)
    words = ["export", folder, "--for", "gguf", "--out", str(tmp_path / "out"), "--base", str(tmp_path / "base")]
    assert main([*words, "--verify"]) == 0
    assert "logits on the base differ by" in capsys.readouterr().out


def test_dora_is_written_at_a_rank_with_what_it_loses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = on_disk(tmp_path, use_dora=True)
    out, base = str(tmp_path / "out"), str(tmp_path / "base")
    assert main(["export", folder, "--for", "vllm", "--out", out]) == 2
    assert "Give the base model" in capsys.readouterr().err
    assert main(["export", folder, "--for", "vllm", "--out", out, "--base", base]) == 2
    assert "--merged" in capsys.readouterr().err
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["export", folder, "--for", "vllm", "--out", out, "--base", base, "--rank", "0.95"]) == 0
    printed = capsys.readouterr().out
    assert "At ranks from" in printed
    assert "% of the energy of 14 updates is lost" in printed
    assert len(re.findall(r"^ +\d\.\d{3}%  model\.layers\.", printed, flags=re.MULTILINE)) == 14


def test_what_cannot_be_held_ends_with_1_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = on_disk(tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    before = sorted(os.listdir(tmp_path))
    assert main(["export", folder, "--for", "gguf", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "modules_to_save" in error
    assert "Traceback" not in error
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("rank", ["x", "1.5", "0", "-3"])
def test_ranks_that_are_none_end_with_2(rank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = on_disk(tmp_path)
    assert main(["export", folder, "--for", "vllm", "--out", str(tmp_path / "out"), f"--rank={rank}"]) == 2
    assert "rank is a whole number" in capsys.readouterr().err


def test_a_target_that_is_none_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["export", str(tmp_path), "--for", "vlm", "--out", "x"])
    assert left.value.code == 2
    assert "invalid choice: 'vlm'" in capsys.readouterr().err


def test_help_has_the_targets_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    text = capsys.readouterr().out
    assert "targets: gguf, ollama, peft, sglang, vllm" in text
    assert "lorafa export runs/a --for vllm --out served" in text
