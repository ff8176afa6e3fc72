"""Files beside the weights of a model, and settings in its config."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorafa import LoraConfig, get_peft_model, merge_to_folder
from lorafa.errors import SourceError
from lorafa.models.carried import carried, with_settings
from lorafa.models.checkpoint_names import names_of, stored_name
from toys.language_models import llama
from toys.merging import place, tensors_in


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"vocab_size": 3}, {"vocab_size": 5}),
        ({}, {"vocab_size": 5}),
        ({"text_config": {"vocab_size": 3, "a": 1}}, {"text_config": {"vocab_size": 5, "a": 1}}),
        ({"vocab_size": 3, "text_config": {"vocab_size": 3}}, {"vocab_size": 5, "text_config": {"vocab_size": 5}}),
        ({"text_config": {"a": 1}}, {"vocab_size": 5, "text_config": {"a": 1}}),
    ],
)
def test_a_setting_is_changed_where_it_stands(config: dict[str, Any], wanted: dict[str, Any]) -> None:
    before = repr(config)
    assert with_settings(config, {"vocab_size": 5}) == wanted
    assert repr(config) == before


def test_whether_weights_are_tied_is_said_wherever_it_may_be_asked() -> None:
    for config in ({"text_config": {}}, {"text_config": {"tie_word_embeddings": True}}, {"tie_word_embeddings": True}):
        new = with_settings(config, {"tie_word_embeddings": False})
        assert new["tie_word_embeddings"] is False
        assert new.get("text_config", new)["tie_word_embeddings"] is False


def test_code_goes_along_only_with_a_config_that_names_it(tmp_path: Path) -> None:
    for name, text in {"config.json": "{}", "code.py": "x", "LICENSE": "free"}.items():
        (tmp_path / name).write_text(text)
    assert [path.name for path in carried(tmp_path, [])] == ["LICENSE"]
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "code.Model"}}')
    assert [path.name for path in carried(tmp_path, [])] == ["LICENSE", "code.py"]


def test_a_base_on_the_hub_is_fetched_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the revision that the adapter's config names, and no file that is not needed."""
    from huggingface_hub.errors import EntryNotFoundError

    there = place(tmp_path, llama, target_modules=["q_proj"])
    model = get_peft_model(there.loaded(), LoraConfig(r=2, target_modules=["q_proj"]), revision="abc")
    model.peft_config["default"].base_model_name_or_path = "owner/model"
    model.save_pretrained(there.adapter)
    (there.base / "README.md").write_text("of the base")
    (there.base / "tokenizer_config.json").write_text("{}")
    asked: list[tuple[str, Any]] = []

    def download(repo: str, filename: str, **options: Any) -> str:
        assert repo == "owner/model"
        asked.append((filename, options.get("revision")))
        if not (there.base / filename).is_file():
            raise EntryNotFoundError("404")
        return str(there.base / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    result = merge_to_folder(there.adapter, there.out)
    assert result.base == "owner/model"
    assert {revision for _, revision in asked} == {"abc"}
    names = {name for name, _ in asked}
    assert {path.name for path in there.base.glob("*.safetensors")} < names
    assert "README.md" not in names
    assert (there.out / "tokenizer_config.json").is_file()
    assert tensors_in(there.out).keys() == tensors_in(there.base).keys()
    sorted(there.base.glob("*.safetensors"))[0].unlink()
    with pytest.raises(SourceError, match="has no model-00001"):
        merge_to_folder(there.adapter, tmp_path / "other")


def test_a_tokenizer_beside_an_adapter_on_the_hub_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    there, cache = place(tmp_path, llama, target_modules=["q_proj"]), tmp_path / "cache"
    for name in ("tokenizer_config.json", "tokenizer.json", "README.md"):
        (there.adapter / name).write_text('{"of": "the adapter"}')

    def download(repo: str, filename: str, **options: Any) -> str:
        if repo != "owner/adapter" or not (there.adapter / filename).is_file():
            raise EntryNotFoundError("404")
        cache.mkdir(exist_ok=True)
        (cache / filename).write_bytes((there.adapter / filename).read_bytes())
        return str(cache / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    merge_to_folder("owner/adapter", there.out, base=there.base)
    assert not (cache / "README.md").exists()
    for name in ("tokenizer_config.json", "tokenizer.json"):
        assert (there.out / name).read_text() == '{"of": "the adapter"}'


# ---- names of checkpoints


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_prefixes_come_and_go_as_transformers_has_it() -> None:
    """A checkpoint of the body alone fits a model with a head, and the other way round."""
    with torch.device("meta"):
        model: Any = llama()
    body, whole = shapes_of(model.model), shapes_of(model)
    assert names_of(model, body).by_name()["model.norm.weight"].stored == ("norm.weight",)
    of_body = names_of(model.model, whole)
    assert of_body.by_name()["norm.weight"].stored == ("model.norm.weight",)
    assert of_body.unused == ("lm_head.weight",)
    assert stored_name(model, "lm_head.weight") == "lm_head.weight"


def test_experts_one_by_one_are_a_stack_and_back() -> None:
    from toys.language_models import mixtral

    torch.manual_seed(0)
    model: Any = mixtral()
    one_by_one: dict[str, torch.Tensor] = {}
    for layer in range(2):
        for expert in range(3):
            start = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            one_by_one |= {f"{start}.{w}.weight": torch.randn(20, 16) for w in ("w1", "w3")}
            one_by_one[f"{start}.w2.weight"] = torch.randn(16, 20)
    names = names_of(model, {name: tuple(tensor.shape) for name, tensor in one_by_one.items()})
    assert not names.unused
    group = names.by_name()["model.layers.1.mlp.experts.gate_up_proj"]
    assert len(group.stored) == 6
    made = group.to_model(one_by_one, model)["model.layers.1.mlp.experts.gate_up_proj"]
    first = one_by_one["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    assert torch.equal(made[2][:20], first)
    back = group.to_stored({"model.layers.1.mlp.experts.gate_up_proj": made}, model)
    assert back.keys() == set(group.stored)
    assert all(torch.equal(tensor, one_by_one[name]) for name, tensor in back.items())


def test_a_checkpoint_without_a_prefix_keeps_its_names(tmp_path: Path) -> None:
    """As GPT-2's on the Hub is: the merged one loads as the base does."""
    from safetensors.torch import save_file

    there = place(tmp_path, partial(llama, tie_word_embeddings=True), target_modules=["q_proj", "lm_head"])
    wanted = tensors_in(there.merged_in_memory())
    tensors = {name.removeprefix("model."): one for name, one in tensors_in(there.base).items()}
    for path in there.base.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, there.base / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="the output head and the input embedding hold different weights"):
        merge_to_folder(there.adapter, there.out, base=there.base)
    assert tensors_in(there.out).keys() == {*tensors, "lm_head.weight"}
    model = transformers.AutoModelForCausalLM.from_pretrained(there.out, dtype="auto")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
