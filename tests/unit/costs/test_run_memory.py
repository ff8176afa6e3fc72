"""What a run will take: weights by their headers, a step by its own code, and the parts add up."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lorafa import LoraConfig, get_peft_model
from lorafa.conf.compose import compose
from lorafa.costs.batches import Asked, Batch, Batches, bounds
from lorafa.costs.memory import Counted, Memory, count, covered, shape_of
from lorafa.models.attention import use_blocks
from lorafa.models.head_loss import supervised_loss
from toys.watch import Kept
from toys.workplace import make_workplace

BATCHES = Batches(Batch(4, 64, 100), None, None, 10, "a test")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_workplace(tmp_path_factory.mktemp("work")) / "model")


def counted(model: str, *more: str, batches: Batches | None = BATCHES) -> Counted:
    config = compose([f"model={model}", "peft.r=4", *more])
    return count(shape_of(config.model), config, batches)


def parts(found: Counted) -> Memory:
    """Without the process, which grows in tests."""
    return replace(found.memory, process=0)


def test_the_parts_add_up(model: str) -> None:
    memory = counted(model).memory
    assert memory.total == sum(getattr(memory, field.name) for field in fields(memory))
    assert memory.weights
    assert memory.adapter
    assert memory.state
    assert memory.activations
    assert memory.workspace


def test_adapter_and_state_are_those_of_the_trained_model(model: str) -> None:
    from transformers import AutoModelForCausalLM

    found = counted(model)
    base: Any = AutoModelForCausalLM.from_pretrained(model)
    size = sum(t.nbytes for t in {id(t): t for t in [*base.parameters(), *base.buffers()]}.values())
    assert found.memory.weights == size
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert found.memory.adapter == sum(p.nbytes for p in trained)
    assert found.memory.state == 2 * found.memory.adapter


@pytest.mark.parametrize("more", [[], ["optim=lora_fa"], ["peft.lora_dropout=0"]])
def test_activations_are_what_autograd_keeps_in_a_training_step(model: str, more: list[str]) -> None:
    from transformers import AutoModelForCausalLM

    found = counted(model, *more)
    config = LoraConfig(r=4, target_modules="all-linear", freeze_A=bool(more and "fa" in more[0]), lora_dropout=0.05)
    if more and "dropout" in more[0]:
        config = replace(config, lora_dropout=0.0)
    base: nn.Module = AutoModelForCausalLM.from_pretrained(model)
    use_blocks(base)  # as a run loads it
    adapted = get_peft_model(base, config).train()
    ids = torch.randint(0, 50, (4, 64))
    labels = ids.clone()
    labels[:, :-25] = -100  # 100 of them count
    known = [*adapted.parameters(), *adapted.buffers()]
    with Kept(*known) as kept:
        loss = supervised_loss(
            adapted, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}, num_items=1
        )
    assert loss.requires_grad
    assert found.course is not None
    # Beside what autograd keeps there are the batch's ids, mask and labels, moved by one, and the loss.
    assert kept.bytes <= found.course.kept() <= 1.02 * kept.bytes + 4 * 64 * 8 * 4


@pytest.mark.parametrize("inside", ["peft.use_dora=false", "peft.use_dora=true"])
def test_an_adapter_that_reads_the_call_is_counted_by_the_places_it_counts_at(model: str, inside: str) -> None:
    invoked = "peft.alora_invocation_tokens=[1]"
    asked = replace(BATCHES, heldout=Batch(2, 64, 50), asked=Asked(2, 30, 4))
    found, everywhere = counted(model, invoked, inside, batches=asked), counted(model, inside, batches=asked)
    assert found.uncounted is None
    assert found.course is not None
    assert everywhere.course is not None
    assert found.course.kept() < everywhere.course.kept()  # 100 of 256 places


def test_what_saves_memory_is_counted_so(model: str) -> None:
    default, fa = parts(counted(model)), parts(counted(model, "optim=lora_fa"))
    assert fa.activations < 0.9 * default.activations
    assert fa.state < default.state
    checkpointed = parts(counted(model, "train.gradient_checkpointing=true"))
    assert checkpointed.activations < 0.5 * default.activations
    small = parts(counted(model, batches=replace(BATCHES, training=Batch(1, 64, 25))))
    assert 0.2 < small.activations / default.activations < 0.35


def test_a_run_of_one_step_has_no_state_when_its_activations_are_there(model: str) -> None:
    assert counted(model, batches=replace(BATCHES, steps=1)).memory.state == 0


def test_an_evaluation_counts_where_it_is_larger(model: str) -> None:
    asked = replace(BATCHES, heldout=Batch(64, 64, 4000), asked=Asked(64, 200, 50))
    assert counted(model).memory.evaluation == 0
    assert counted(model, batches=asked).memory.evaluation > 0


def test_the_models_own_loss_holds_all_logits(model: str) -> None:
    found = counted(model, "train.chunked_loss=false")
    assert found.own_loss == "train.chunked_loss=false"
    assert found.memory.activations + found.memory.workspace > counted(model).memory.activations


def test_without_batches_it_is_the_least_a_run_needs(model: str) -> None:
    found = counted(model, batches=None)
    assert found.uncounted == "a lower bound was asked for"
    assert (found.memory.activations, found.memory.workspace, found.memory.gaps) == (0, 0, 0)
    assert found.memory.weights
    assert found.memory.state


def test_all_weights_in_float32_have_moments_and_gradients(model: str) -> None:
    config = compose([f"model={model}", "peft=full_ft", "model.dtype=bfloat16"])
    shape = shape_of(config.model)
    numbers, found = shape.parameters, count(shape, config, BATCHES)
    assert found.uncounted is None
    assert found.memory.weights + found.memory.adapter >= 4 * numbers
    assert found.memory.state == 8 * numbers
    assert found.memory.activations + found.memory.gradients + found.memory.workspace > 4 * numbers / 4
    assert covered(shape, config) == []


def test_a_start_that_moves_the_base_keeps_copies_of_its_factors(model: str) -> None:
    assert counted(model, "init=pissa").memory.adapter == 2 * counted(model).memory.adapter


def test_weights_that_are_converted_lie_beside_what_they_become(model: str) -> None:
    converted = shape_of(compose([f"model={model}", "model.dtype=bfloat16"]).model)
    as_stored = shape_of(compose([f"model={model}"]).model)
    assert as_stored.loading_bytes == as_stored.loaded_bytes
    assert as_stored.stored is not None
    assert converted.loading_bytes == converted.loaded_bytes + as_stored.stored.bytes
    least = count(converted, compose([f"model={model}", "model.dtype=bfloat16", "peft.r=1"]), None).memory
    assert least.total - least.process == converted.loading_bytes


def test_quantized_weights_are_counted_by_their_bytes_on_disk(model: str, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(model, tmp_path / "quantized"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    found = shape_of(compose([f"model={folder}"]).model)
    assert found.quantized
    assert found.stored is not None
    assert found.loaded_bytes == found.stored.bytes


def test_a_model_without_headers_is_counted_by_its_config() -> None:
    found = shape_of(compose(["model=opt-125m"]).model)
    assert found.stored is None
    assert found.parameters == 125_239_296


def test_a_config_without_a_number_format_goes_by_the_files(model: str, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(model, tmp_path / "halves"))
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    assert shape_of(compose([f"model={folder}", "model.dtype=auto"]).model).model.dtype == torch.bfloat16


def test_bounds_are_rows_as_long_as_allowed() -> None:
    config = compose(["data.max_length=100", "train.batch_size=3", "eval.batch_size=5", "eval.max_new_tokens=30"])
    small = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=64,
        vocab_size=8,
    ))  # fmt: skip
    found = bounds(config, small, "no rows")
    assert (found.training.rows, found.training.tokens, found.training.supervised) == (3, 64, 3 * 63)
    assert found.asked == Asked(5, 34, 30)
    assert "rows of 64 tokens (no rows)" in found.source


def test_code_that_needs_numbers_is_said_and_the_rest_is_counted(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    def forward(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no numbers here")

    config = compose([f"model={model}", "peft.r=4"])
    shape = shape_of(config.model)
    monkeypatch.setattr(LlamaModel, "forward", forward)
    found = count(shape, config, BATCHES)
    assert found.uncounted is not None
    assert "no numbers here" in found.uncounted
    assert found.memory.activations == 0
    assert found.memory.weights
