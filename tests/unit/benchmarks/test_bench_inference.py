"""The inference benchmark: its arguments are checked before a model is loaded, and its contenders do the same work."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import transformers

from lorafa.models import MODELS
from toys.places import ROOT

BENCHMARKS = ROOT / "benchmarks"
SIZE = {"targets": "all-linear", "rows": 2, "length": 5, "tokens": 3}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "bench_inference", raising=False)
    import bench_inference

    return bench_inference


@pytest.fixture
def read_arguments(bench: Any) -> Any:
    return bench.read_arguments


def tiny_opt(name: str) -> Any:
    """An OPT with an inner width of its embeddings, as OPT-350M has one."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "vocab_size": 50}
    config = transformers.OPTConfig(**sizes, word_embed_proj_dim=16, do_layer_norm_before=False)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "x", ""])
@pytest.mark.parametrize("option", ["rows", "length", "tokens", "repeats", "threads"])
def test_what_is_counted_is_at_least_one(read_arguments: Any, capsys: Any, option: str, value: str) -> None:
    with pytest.raises(SystemExit) as stop:
        read_arguments([f"--{option}={value}"])
    assert stop.value.code == 2
    assert f"argument --{option}: must be an integer >= 1, found {value!r}" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "positions"), [("smollm2-135m", 8192), ("opt-125m", 2048)])
def test_prompt_and_tokens_must_fit_the_model(read_arguments: Any, capsys: Any, model: str, positions: int) -> None:
    words = [f"--model={model}", f"--length={positions - 100}"]
    assert read_arguments([*words, "--tokens=100"]).length == positions - 100
    with pytest.raises(SystemExit) as stop:
        read_arguments([*words, "--tokens=101"])
    assert stop.value.code == 2
    message = f"--length and --tokens together are {positions + 1} positions, the model has {positions}"
    assert message in capsys.readouterr().err


def test_a_case_is_timed_once(read_arguments: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        read_arguments(["--cases", "base", "LoRA", "base"])
    assert stop.value.code == 2
    assert "--cases names base more than once: each is timed once" in capsys.readouterr().err


def test_models_of_the_benchmark_are_known_with_their_positions(bench: Any) -> None:
    opt = {name: positions for name, positions in bench.KNOWN.items() if name.startswith("opt")}
    assert {name: MODELS.get(name).shape["max_position_embeddings"] for name in opt} == opt
    assert bench.KNOWN.keys() <= {*MODELS.names()}


def test_all_adapted_models_answer_alike_and_not_as_the_base_does(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "plain_model", tiny_opt)
    found = {case: bench.Answers(case, "tiny", exact=True, **SIZE).logits() for case in bench.CASES}
    assert {tuple(logits.shape) for logits in found.values()} == {(4, 2, 50)}
    base = found.pop(bench.BASE)
    for logits in found.values():
        torch.testing.assert_close(logits, found[bench.PEFT_LORA], rtol=1e-4, atol=1e-5)
        assert float((logits - base).norm() / base.norm()) > 1e-3


def test_a_merged_model_is_as_large_as_the_base_and_an_adapter_adds_its_float32_numbers(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "plain_model", tiny_opt)
    answering = {case: bench.Answers(case, "tiny", **SIZE) for case in bench.CASES}
    assert not any(p.requires_grad for answers in answering.values() for p in answers.model.parameters())
    mib = {case: answers.sizes()["weights_mib"] for case, answers in answering.items()}
    # of each block q, k, v, out (32, 32), fc1 and fc2; the two projections of the embeddings (16, 32)
    numbers = 16 * (2 * (4 * (32 + 32) + 2 * (32 + 64)) + 2 * (16 + 32))
    assert mib[bench.MERGED] == mib[bench.PEFT_MERGED] == mib[bench.BASE]
    for case in (bench.LORA, bench.LORA_FA, bench.PEFT_LORA):
        assert mib[case] - mib[bench.BASE] == pytest.approx(4 * numbers / 2**20)


def test_the_table_has_each_part_beside_the_bases(bench: Any) -> None:
    seconds = {"prefill": {"base": 1.0, "LoRA": 1.5}, "decode": {"base": 0.25, "LoRA": 0.5}}
    sizes = {"base": {"weights_mib": 10.0, "above_mib": 3.0}, "LoRA": {"weights_mib": 1012.5, "above_mib": 4.0}}
    assert bench.table("opt-125m", seconds, sizes, 4).splitlines() == [
        "| opt-125m | base | LoRA |",
        "|---|---|---|",
        "| prefill, s | 1.0000 | 1.5000 |",
        "| a token, s | 0.2500 | 0.5000 |",
        "| prefill and 4 tokens, s | 2.0000 | 3.5000 |",
        "| prefill / base | 1.00 | 1.50 |",
        "| a token / base | 1.00 | 2.00 |",
        "| prefill and 4 tokens / base | 1.00 | 1.75 |",
        "| weights and adapter, MiB | 10.00 | 1,012.50 |",
        "| peak above these, MiB | 3 | 4 |",
    ]
