"""Models of transformers with ``device_map``: layers on disk are brought in by hooks, adapters on them are exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorafa import LoraConfig, PeftModel, collect_statistics, get_peft_model, initialize
from toys.adapters import train
from toys.compare import close

transformers = pytest.importorskip("transformers")
IDS = torch.arange(12).view(2, 6)
BATCHES = [{"input_ids": IDS, "labels": IDS}]
DEVICES = {
    "model.embed_tokens": "disk",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
    "model.rotary_emb": "cpu",
}
CONFIG: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_seed": 3}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=request.param,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path


def here(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "base")


def on_disk(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map=DEVICES, offload_folder=folder / "offloaded"
    )
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    return model


def trained(model: PeftModel) -> PeftModel:
    torch.manual_seed(1)
    train(model)
    return model


def step(model: PeftModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(**BATCHES[0]).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"trainable_token_indices": [1, 5]}, {"bias": "none"}],
    ids=str,
)
def test_a_step_of_training_and_the_file_are_those_of_the_model_in_memory(
    settings: dict[str, Any], folder: Path
) -> None:
    config = LoraConfig(**CONFIG, **settings)
    one, other = (trained(get_peft_model(base, config)) for base in (here(folder), on_disk(folder)))
    (loss, grads), (found, others) = step(one), step(other)
    close(found, loss, torch.float32)
    assert grads.keys() == others.keys()
    for name in grads:
        close(others[name], grads[name], torch.float32)
    other.eval().save_pretrained(folder / "adapter")
    logits, answer = other(input_ids=IDS).logits, other.generate(input_ids=IDS, max_new_tokens=3)
    for base in (here(folder), on_disk(folder)):
        loaded = PeftModel.from_pretrained(base, folder / "adapter")
        close(loaded(input_ids=IDS).logits, logits, torch.float32)
        assert torch.equal(loaded.generate(input_ids=IDS, max_new_tokens=3), answer)


def test_merged_into_layers_on_disk_it_computes_the_same(folder: Path) -> None:
    model = trained(get_peft_model(on_disk(folder), LoraConfig(**CONFIG))).eval()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        merged = model.merge_and_unload()
        close(merged(input_ids=IDS).logits, logits, torch.float32)
    assert merged.model.layers[1].self_attn.q_proj.weight.is_meta


@pytest.mark.filterwarnings("ignore:`loss_type")
def test_a_start_from_gradients_is_that_of_the_model_in_memory(folder: Path) -> None:
    config = LoraConfig(**CONFIG, init_lora_weights="lora_one")
    one, other = (initialize(base, config, BATCHES) for base in (here(folder), on_disk(folder)))
    close(other(input_ids=IDS).logits, one(input_ids=IDS).logits, torch.float32)
    others = dict(other.named_parameters())
    for name, mine in one.named_parameters():
        if "lora_" in name:
            close(others[name] @ others[name].mT, mine @ mine.mT, torch.float32)


def test_statistics_of_a_model_on_disk_are_cached_under_its_weights(folder: Path) -> None:
    config = LoraConfig(**CONFIG, init_lora_weights="lora_one")
    cache = folder / "statistics.safetensors"
    first = collect_statistics(here(folder), config, BATCHES, cache=cache)
    written = cache.stat().st_mtime_ns
    again = collect_statistics(on_disk(folder), config, BATCHES, cache=cache)
    assert cache.stat().st_mtime_ns == written
    assert first.keys() == again.keys()
