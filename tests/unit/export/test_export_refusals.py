"""What a program cannot hold is refused by its name, before anything is written."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorafa import LoraConfig, get_peft_model
from lorafa.errors import CheckpointError, ConfigError, LoraError, SourceError
from lorafa.export.entry import Exporter
from lorafa.export.job import export_adapter
from lorafa.export.peft import PEFT
from lorafa.export.proof import prove
from lorafa.export.source import of_files
from toys.exported import on_disk
from toys.language_models import bert, gpt2, llama, mixtral, t5
from toys.models import Convolution

Q = "model.layers.0.self_attn.q_proj"
SERVERS = ("vllm", "sglang", "gguf", "ollama")


def refused(source: str | Path, target: str, out: Path, kind: type[LoraError], text: str, **options: Any) -> None:
    """Nothing is left where it was to be written, nor beside it."""
    before = sorted(os.listdir(out.parent))
    with pytest.raises(kind, match=text) as caught:
        export_adapter(source, target, out, **options)
    assert type(caught.value) is kind
    assert sorted(os.listdir(out.parent)) == before


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            r"no modules trained as a whole \(modules_to_save\): lm_head.weight",
        ),
        (
            {"target_modules": ["q_proj"], "trainable_token_indices": [2]},
            r"no trained rows of a table \(trainable_token_indices\): model.embed_tokens.token_adapter",
        ),
        (
            {"target_modules": ["q_proj"], "lora_bias": True},
            r"no bias of B \(lora_bias\): model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj",
        ),
        ({"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}, r"no copies of layers"),
    ],
    ids=["modules_to_save", "rows", "lora_bias", "replication"],
)
def test_what_is_trained_beside_the_factors(settings: dict[str, Any], text: str, tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path, **settings)
    for target in SERVERS:
        refused(folder, target, tmp_path / "out", CheckpointError, text)


def test_biases_of_the_base(tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path, gpt2(), target_modules=["c_attn"], bias="lora_only")
    for target in SERVERS:
        refused(folder, target, tmp_path / "out", CheckpointError, r"no biases of the base \(bias='lora_only'\)")


def test_updates_that_change_with_the_input(tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path, alora_invocation_tokens=[3])
    text = "The update of alora changes with the input"
    for target in ("peft", *SERVERS):
        refused(folder, target, tmp_path / "out", ConfigError, text)
        refused(folder, target, tmp_path / "out", ConfigError, text, base=tmp_path / "base")


def test_dora_without_its_base_or_a_rank(tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path, use_dora=True)
    text = "The update of dora is of full rank: that of 'model.layers.0.self_attn.q_proj' is no product.*--rank"
    for target in ("peft", *SERVERS):
        refused(folder, target, tmp_path / "out", ConfigError, "the update of dora is made with the base weights")
    refused(folder, "vllm", tmp_path / "out", ConfigError, text, base=tmp_path / "base")


def test_an_adapter_on_codes_that_its_start_has_made(tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path, init_lora_weights="loftq", loftq_config={"loftq_iter": 1})
    text = "has quantized the base, and the adapter belongs to those codes"
    refused(folder, "vllm", tmp_path / "out", ConfigError, text)
    refused(folder, "vllm", tmp_path / "out", ConfigError, text, base=tmp_path / "base")


def test_what_llama_cpp_has_no_tensor_for_is_named(tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path, mixtral(), target_modules=["q_proj"], target_parameters=["gate_up_proj"])
    refused(folder, "gguf", tmp_path / "out", ConfigError, "which parameters target_parameters means")
    refused(
        folder, "gguf", tmp_path / "out", CheckpointError,
        r"reads no adapters of layers of kind experts: model.layers.0.mlp.experts", base=tmp_path / "base",
    )  # fmt: skip


def test_an_architecture_that_is_not_known(tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path, t5(), target_modules=["q"], task_type="SEQ_2_SEQ_LM")
    text = "order of rows of a T5ForConditionalGeneration there are not known here; known are Cohere2ForCausalLM"
    refused(folder, "gguf", tmp_path / "out", CheckpointError, text)
    refused(folder, "ollama", tmp_path / "out", CheckpointError, text)


def test_a_tensor_to_which_llama_cpp_adds_nothing(tmp_path: Path) -> None:
    """Positions of GPT-2 are looked up, and no adapter is added to what is found."""
    _, folder = on_disk(tmp_path, gpt2(), target_modules=["wpe", "c_fc"])
    text = r"it adds no adapter to transformer.wpe \(position_embd.weight\)"
    refused(folder, "gguf", tmp_path / "out", CheckpointError, text, base=tmp_path / "base")


def test_a_module_without_a_name_in_llama_cpp(tmp_path: Path) -> None:
    base = llama()
    base.model.extra = nn.Linear(16, 16)  # type: ignore[union-attr]
    _, folder = on_disk(tmp_path, base, target_modules=["extra", "q_proj"])
    refused(folder, "gguf", tmp_path / "out", CheckpointError, "'llama' has no tensor there for model.extra")


def test_convolutions(tmp_path: Path) -> None:
    model = get_peft_model(Convolution(2), LoraConfig(r=2, target_modules=["conv"]))
    model.save_pretrained(tmp_path / "adapter")
    text = "reads no adapters of convolutions: conv"
    refused(tmp_path / "adapter", "vllm", tmp_path / "out", CheckpointError, text)


def test_ranks_that_vllm_cannot_be_started_with(tmp_path: Path) -> None:
    base = llama(hidden_size=1028, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    _, folder = on_disk(tmp_path, base, r=513, target_modules=["q_proj"])
    refused(folder, "vllm", tmp_path / "out", CheckpointError, r"rank 513 is larger than 512.*\(--rank 512\)")


def test_layers_that_sglang_does_not_know(tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path, gpt2(), target_modules=["c_attn"])
    refused(folder, "sglang", tmp_path / "out", CheckpointError, "layers of these names only.*transformer.h.0.attn")
    _, tables = on_disk(tmp_path / "tables", target_modules=["embed_tokens", "q_proj"])
    text = "SGLang reads no adapters of embedding tables: model.embed_tokens"
    refused(tables, "sglang", tmp_path / "out", CheckpointError, text, base=tmp_path / "tables" / "base")


def test_a_table_that_may_be_another_than_the_bases(tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path, target_modules=["embed_tokens", "q_proj"])
    text = r"no whole table beside an adapter on it: model.embed_tokens.base_layer.weight .*--base"
    refused(folder, "vllm", tmp_path / "out", CheckpointError, text)
    export_adapter(folder, "vllm", tmp_path / "out", base=tmp_path / "base")


def test_all_that_is_in_the_way_is_said_at_once(tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"], lora_bias=True)
    with pytest.raises(CheckpointError, match=r"lora_bias.*; .*modules_to_save.*Nothing was written.*--merged"):
        export_adapter(folder, "vllm", tmp_path / "out")


def test_bases_that_are_not_named_or_not_there(tmp_path: Path) -> None:
    model, folder = on_disk(tmp_path)
    refused(folder, "gguf", tmp_path / "out", SourceError, "No model '.*none': there is no", base=tmp_path / "none")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{}")
    text = "config of the base model '.*bad' could not be read"
    refused(folder, "gguf", tmp_path / "out", SourceError, text, base=tmp_path / "bad")
    model.peft_config["default"].base_model_name_or_path = None
    model.get_base_model().name_or_path = ""
    model.save_pretrained(tmp_path / "unnamed")
    refused(tmp_path / "unnamed", "gguf", tmp_path / "out", ConfigError, "does not name its base model")
    export_adapter(tmp_path / "unnamed", "vllm", tmp_path / "out")


def test_a_base_the_adapter_was_not_made_for(tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path)
    other = llama()
    torch.nn.init.normal_(other.model.layers[0].self_attn.q_proj.weight)  # type: ignore[union-attr, index, operator]
    other.save_pretrained(tmp_path / "other")  # type: ignore[operator]
    text = "was made for another base model"
    refused(folder, "vllm", tmp_path / "out", CheckpointError, text, base=tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(f"base_model.model.{Q}.lora_B.weight"), f"has A or B alone of 1 layers: {Q}"),
        (lambda t: t.update({"base_model.model.x.lora_C.weight": torch.ones(2)}), "config does not speak of: x.lora_C"),
        (lambda t: [t.pop(key) for key in [*t]] and t.update(head=torch.ones(2)), "no factors of a LoRA adapter"),
    ],
    ids=["half", "unknown", "none"],
)
def test_files_that_are_no_adapter(change: Any, text: str, tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path)
    path = Path(folder) / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    refused(folder, "vllm", tmp_path / "out", CheckpointError, text)


def test_a_config_of_another_rank_than_the_factors(tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path)
    path = Path(folder) / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 4', '"r": 5'))
    refused(folder, "vllm", tmp_path / "out", CheckpointError, "not of one save: r is 5 and was 4 when the tensors")
    weights = Path(folder) / "adapter_model.safetensors"
    save_file({name: tensor.clone() for name, tensor in load_file(weights).items()}, weights)  # its header says nothing
    text = r"are \(4, 24\) and \(16, 4\), and the config says rank 5"
    refused(folder, "vllm", tmp_path / "out", CheckpointError, text)


@pytest.mark.parametrize("rank", [0, 1.5, -2, True])
def test_a_rank_that_is_none(rank: Any, tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path)
    refused(folder, "vllm", tmp_path / "out", ConfigError, "rank is a whole number", rank=rank)


def test_convolutions_at_another_rank_need_the_base(tmp_path: Path) -> None:
    model = get_peft_model(Convolution(2), LoraConfig(r=2, target_modules=["conv"]))
    model.save_pretrained(tmp_path / "adapter")
    text = "'conv' is one of the convolutions, which are given another rank with the base model at hand only"
    refused(tmp_path / "adapter", "peft", tmp_path / "out", ConfigError, text, rank=1)


def test_ranks_beyond_a_layer_and_beside_merging(tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path)
    text = r"rank 9 is larger than 8, the smaller side of the weight of 'model.layers.0.self_attn.k_proj'"
    refused(folder, "vllm", tmp_path / "out", ConfigError, text, rank=9)
    refused(folder, "vllm", tmp_path / "out", ConfigError, text, rank=9, base=tmp_path / "base")
    refused(folder, "vllm", tmp_path / "out", ConfigError, "a rank changes nothing", rank=2, merged=True)


def test_merged_models_for_what_reads_none(tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path)
    text = r"A merged model is no adapter, and llama.cpp \(GGUF\) reads models of its own"
    refused(folder, "gguf", tmp_path / "out", ConfigError, text, merged=True)
    _, other = on_disk(tmp_path / "gpt2", gpt2(), target_modules=["c_attn"])
    text = "Ollama imports no folder of GPT2LMHeadModel, only of Gemma2ForCausalLM"
    refused(other, "ollama", tmp_path / "out", CheckpointError, text, merged=True)


@pytest.mark.parametrize("shape", [(-1,), (1, 1, -1), (-1, 1)])
def test_factors_that_are_no_matrices_of_the_rank(shape: tuple[int, ...], tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path)
    place = Path(folder) / "adapter_model.safetensors"
    tensors = load_file(place)
    key = next(key for key in tensors if "lora_B" in key)
    save_file(tensors | {key: tensors[key].reshape(shape).clone()}, place)
    for target in ("peft", "vllm"):
        text = "are no matrices of numbers|says rank 4. Config and tensors are not of one adapter"
        refused(folder, target, tmp_path / "out", CheckpointError, text)


def test_targets_and_folders(tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path)
    refused(folder, "vlm", tmp_path / "out", ConfigError, "Unknown export target 'vlm'. Did you mean 'vllm'")
    refused(tmp_path / "base", "vllm", tmp_path / "out", ConfigError, "is a model and no adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    refused(folder, "vllm", tmp_path / "out", ConfigError, "exists and is not empty.*--overwrite")
    assert (tmp_path / "out" / "mine").read_text() == "kept"
    refused(folder, "vllm", tmp_path / "out", ConfigError, "so it is not replaced", overwrite=True)
    assert (tmp_path / "out" / "mine").read_text() == "kept"
    (tmp_path / "out" / "adapter_config.json").touch()
    export_adapter(folder, "vllm", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()
    (tmp_path / "file").write_text("x")
    refused(folder, "vllm", tmp_path / "file", ConfigError, "is no folder. Choose another place")
    for place, what in ((Path(folder), "the adapter"), (tmp_path / "base", "its base model")):
        assert any(place.iterdir())
        text = f"is, or holds, {what} .*which is read. Choose another folder"
        refused(folder, "vllm", place, ConfigError, text, overwrite=True)
        assert any(place.iterdir())


def test_a_disk_that_fills_up_leaves_the_folder_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = on_disk(tmp_path)
    export_adapter(folder, "vllm", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(folder, "vllm", tmp_path / "out", CheckpointError, r"out.*No space left on device", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_what_reads_back_otherwise_is_an_error(tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path)
    adapter = of_files(folder)

    class Wrong(type(PEFT)):  # type: ignore[misc]
        words = "a wrong program"

        def read(self, *args: Any) -> Any:
            first, *rest = super().read(*args)
            return [first.with_factors(first.A, first.B, 1.01 * first.scaling), *rest]

    wrong: Exporter = Wrong()
    wrong.write(adapter, tmp_path / "out", None)
    with pytest.raises(CheckpointError, match=r"the update of 'model.layers.[\w.]+' differs by 1.00e-02"):
        prove(wrong, adapter, tmp_path / "out", None, None)


def test_a_classifier_goes_to_peft_and_to_no_server(tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path, bert(), target_modules=["query", "value"], task_type="SEQ_CLS")
    export_adapter(folder, "peft", tmp_path / "peft")
    assert re.search("classifier", (tmp_path / "peft" / "adapter_config.json").read_text())
    peft.PeftConfig.from_pretrained(tmp_path / "peft")
    refused(folder, "vllm", tmp_path / "out", CheckpointError, "modules_to_save.: classifier")
