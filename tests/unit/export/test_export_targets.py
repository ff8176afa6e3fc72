"""What is exported is the adapter, to readers that know one rank and one scaling, by their own rules."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import CheckpointError, ConfigError
from lorafa.export.job import export_adapter
from lorafa.export.peft import PEFT
from lorafa.export.source import of_files, of_model
from lorafa.export.update import relative_error
from toys.adapters import STARTS, VARIANT, initializer_of, train
from toys.compare import close
from toys.exported import by_llama_cpp, by_sglang, by_vllm, on_disk, updates_of
from toys.gguf import interleaved
from toys.language_models import inference, llama, mixtral
from toys.models import Attention, Convolution, Linears, Mixture

SCALINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "whole": {"r": 4, "lora_alpha": 16},
    "thirds": {"r": 3, "lora_alpha": 1},
    "ranks": {"rank_pattern": {"q_proj": 2, "down_proj": 7}},
    "alphas": {"alpha_pattern": {"v_proj": 1, "layers.1.mlp.up_proj": 11.5}},
    "both": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 9}, "use_rslora": True},
}
"""Scalings that one r and one alpha do not say as they are, beside those that they do."""
FORMULAS = {name: settings for name, settings in VARIANT.items() if "dora" not in name}
ALONE = [start for start in STARTS if not (initializer_of(start).needs or initializer_of(start).quantizer)]
"""Starts that read no data and leave the base as it is."""
PARAMETERS = ["experts.up", "experts.down"]
EXACT = 1e-5
NAMES = {
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}


def in_llama_cpp(updates: dict[str, Tensor], heads: int = 2, kv_heads: int = 1) -> dict[str, Tensor]:
    """Updates of a Llama by the names and with the rows of llama.cpp's file of it."""
    found = {}
    for path, update in updates.items():
        _, _, layer, rest = path.split(".", 3)
        rows = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(rest)
        found[f"blk.{layer}.{NAMES[rest]}.weight"] = update if rows is None else interleaved(update, rows)
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        close(found[name], wanted[name], EXACT)


@pytest.mark.parametrize("settings", SCALINGS.values(), ids=SCALINGS)
def test_every_reader_finds_the_updates_whatever_ranks_and_scalings_are(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    model, folder = on_disk(tmp_path, **settings)
    wanted = updates_of(model)
    for target in ("peft", "vllm", "sglang", "gguf", "ollama"):
        done = export_adapter(folder, target, tmp_path / target, verify=True)
        assert done.proof is not None
        assert done.proof.error < EXACT
    assert_same(by_vllm(tmp_path / "vllm"), wanted)
    assert_same(by_vllm(tmp_path / "sglang"), wanted)
    assert_same(by_sglang(tmp_path / "vllm"), wanted)
    assert_same(by_sglang(tmp_path / "sglang"), wanted)
    for target in ("gguf", "ollama"):
        found, fields = by_llama_cpp(tmp_path / target / "adapter.gguf")
        assert fields["general.architecture"] == "llama"
        assert fields["adapter.lora.alpha"] > 0
        assert_same(found, in_llama_cpp(wanted))


@pytest.mark.parametrize("name", ["plain", "thirds", "both"])
def test_our_loader_and_pefts_read_it_too(name: str, tmp_path: Path) -> None:
    model, folder = on_disk(tmp_path, **SCALINGS[name])
    expected = inference(model)
    assert not torch.allclose(expected, inference(llama()), atol=1e-3)
    for target in ("peft", "vllm", "sglang"):
        export_adapter(folder, target, tmp_path / target)
        close(inference(PeftModel.from_pretrained(llama(), tmp_path / target)), expected, EXACT)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / target)
        close(inference(theirs), expected, EXACT)


def _quick_first() -> list[Any]:
    """A formula from its file alone, and those that need the base or are the usual example of it; the rest are slow."""
    quick = [(name, name in ("bdlora", "kasa")) for name in FORMULAS]
    others = [(name, not base) for name, base in quick if name != "bdlora"]
    return [*quick, *(pytest.param(*case, marks=pytest.mark.slow) for case in others)]


@pytest.mark.parametrize(("name", "with_base"), _quick_first())
def test_formulas_that_are_plain_lora_in_the_end_are_written_exactly(
    name: str, with_base: bool, tmp_path: Path
) -> None:
    model, folder = on_disk(tmp_path, **FORMULAS[name])
    base = tmp_path / "base" if with_base else None
    for target in ("vllm", "gguf"):
        done = export_adapter(folder, target, tmp_path / target, base=base, verify=True)
        assert done.proof is not None
        assert (done.proof.logits is not None) == with_base
        if done.proof.logits:
            difference, effect = done.proof.logits
            assert difference < EXACT < effect
    assert_same(by_vllm(tmp_path / "vllm"), updates_of(model))
    assert_same(by_llama_cpp(tmp_path / "gguf" / "adapter.gguf")[0], in_llama_cpp(updates_of(model)))


@pytest.mark.parametrize(
    "start", [s for s in STARTS if not initializer_of(s).needs and not initializer_of(s).quantizer]
)
def test_starts_are_on_the_pristine_base(start: bool | str, tmp_path: Path) -> None:
    model, folder = on_disk(tmp_path, init_lora_weights=start, use_rslora=True)
    export_adapter(folder, "vllm", tmp_path / "out")
    assert_same(by_vllm(tmp_path / "out"), updates_of(model))


def test_a_file_of_peft_is_exported_as_one_of_ours(tmp_path: Path) -> None:
    ours, _ = on_disk(tmp_path)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"], use_rslora=True)
    theirs = peft.get_peft_model(llama(), config)
    train(theirs, 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    export_adapter(tmp_path / "theirs", "sglang", tmp_path / "out", verify=True)
    close(inference(PeftModel.from_pretrained(llama(), tmp_path / "out")), inference(theirs), EXACT)
    assert ours is not None


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_peft_leaves_in_its_base_needs_the_base(start: str, tmp_path: Path) -> None:
    on_disk(tmp_path)
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=start))
    train(theirs, 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="is taken out of the base weights, and its weights are not here"):
        export_adapter(tmp_path / "theirs", "vllm", tmp_path / "out")
    export_adapter(tmp_path / "theirs", "vllm", tmp_path / "out", base=tmp_path / "base")
    close(inference(PeftModel.from_pretrained(llama(), tmp_path / "out")), inference(theirs), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaling_a_factor_of_half_precision_loses_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    base = llama().to(dtype)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 7})
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    train(model, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    for target in ("vllm", "gguf"):
        export_adapter(tmp_path / "adapter", target, tmp_path / target, verify=True)
    assert_same(by_vllm(tmp_path / "vllm"), updates_of(model))
    assert_same(by_llama_cpp(tmp_path / "gguf" / "adapter.gguf")[0], in_llama_cpp(updates_of(model)))


def test_factors_that_need_no_change_keep_their_bits(tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path, r=4, lora_alpha=8)
    before = load_file(Path(folder) / "adapter_model.safetensors")
    for target in ("peft", "vllm", "sglang"):
        export_adapter(folder, target, tmp_path / target)
        after = load_file(tmp_path / target / "adapter_model.safetensors")
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("tied", [False, True])
def test_tables_and_heads_go_where_a_reader_has_them(tied: bool, tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=tied)
    model, folder = on_disk(tmp_path, base, target_modules=["embed_tokens", "q_proj", "lm_head"][: 2 if tied else 3])
    loaded = tmp_path / "base"
    export_adapter(folder, "vllm", tmp_path / "vllm", base=loaded, verify=True)
    assert_same(by_vllm(tmp_path / "vllm"), updates_of(model))
    if tied:
        with pytest.raises(CheckpointError, match=r"embedding and head of this model are one table.*embed_tokens"):
            export_adapter(folder, "gguf", tmp_path / "gguf", base=loaded)
        return
    export_adapter(folder, "gguf", tmp_path / "gguf", base=loaded, verify=True)
    found, _ = by_llama_cpp(tmp_path / "gguf" / "adapter.gguf")
    updates = updates_of(model)
    close(found["token_embd.weight"], updates["model.embed_tokens"], EXACT)
    close(found["output.weight"], updates["lm_head"], EXACT)


def test_peft_keeps_what_is_trained_beside_the_layers(tmp_path: Path) -> None:
    model, folder = on_disk(
        tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[3, 5], bias="all"
    )
    export_adapter(folder, "peft", tmp_path / "out", verify=True)
    close(inference(PeftModel.from_pretrained(llama(), tmp_path / "out")), inference(model), EXACT)


@pytest.mark.parametrize("kind", ["convolution", "experts", "attention"])
def test_peft_takes_every_kind_of_layer(kind: str, tmp_path: Path) -> None:
    models: dict[str, tuple[Any, dict[str, Any], Tensor]] = {
        "convolution": (lambda: Convolution(2), {"target_modules": ["conv"]}, torch.randn(2, 4, 6, 6)),
        "experts": (
            Mixture,
            {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]},
            torch.randn(3, 12),
        ),
        "attention": (Attention, {"target_modules": ["attention"]}, torch.randn(2, 5, 12)),
    }
    make, targets, x = models[kind]
    torch.manual_seed(3)
    base: nn.Module = make()
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=7, use_rslora=True, **targets))
    train(model)
    PEFT.write(of_model(model, "toy"), tmp_path, None)
    fresh = make()
    fresh.load_state_dict(weights)
    with torch.no_grad():
        close(PeftModel.from_pretrained(fresh, tmp_path)(x), model.eval()(x), 1e-4)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("rank", [None, 8])
def test_biases_of_attention_are_those_of_both_ends(twice: bool, rank: int | None, tmp_path: Path) -> None:
    x = torch.randn(2, 5, 12)
    torch.manual_seed(3)
    base = Attention()
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    config = LoraConfig(
        r=4, lora_alpha=7, target_modules=["attention"], lora_bias=True, attention_out_proj_twice=twice
    )
    model = get_peft_model(base, config)
    train(model)
    model.get_base_model().attention.base_layer.out_proj.set_scale("default", 3.0)
    PEFT.write(of_model(model, "toy", rank=rank), tmp_path, None)
    fresh = Attention()
    fresh.load_state_dict(weights)
    with torch.no_grad():
        close(PeftModel.from_pretrained(fresh, tmp_path)(x), model.eval()(x), 1e-5)


def test_experts_of_a_model_on_disk_are_read_back_and_proved(tmp_path: Path) -> None:
    base = mixtral()
    settings = {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}
    model, folder = on_disk(tmp_path, base, rank_pattern={"down_proj": 2}, use_rslora=True, **settings)
    done = export_adapter(folder, "peft", tmp_path / "out", base=tmp_path / "base", verify=True)
    assert done.proof is not None
    assert done.proof.logits is not None
    assert done.proof.logits[0] < EXACT < done.proof.logits[1]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(again, tmp_path / "out")
    close(inference(loaded), inference(model), 1e-4)


def test_dora_at_a_rank_states_what_each_layer_loses(tmp_path: Path) -> None:
    model, folder = on_disk(tmp_path, use_dora=True)
    with pytest.warns(UserWarning, match="as plain LoRA of rank 6"):
        done = export_adapter(folder, "vllm", tmp_path / "out", rank=6, base=tmp_path / "base", verify=True)
    assert done.rank == 6
    assert done.notes[0].startswith("At rank 6, ")
    for path, update in updates_of(model).items():
        values = torch.linalg.svdvals(update.double()).square()
        share = float(values[6:].sum() / values.sum())
        found = by_vllm(tmp_path / "out")[path]
        assert float((found - update).square().sum() / update.square().sum()) == pytest.approx(share, abs=1e-5)
        assert done.lost is not None
        assert done.lost.shares[path] == pytest.approx(share, abs=1e-5)
    assert done.proof is not None
    assert done.proof.logits is not None
    assert 1e-4 < done.proof.logits[0] < done.proof.logits[1]


def test_a_share_of_the_energy_gives_ranks_that_differ(tmp_path: Path) -> None:
    model, folder = on_disk(tmp_path)
    done = export_adapter(folder, "vllm", tmp_path / "out", rank=0.9, verify=True)
    found, wanted = by_vllm(tmp_path / "out"), updates_of(model)
    assert done.rank is not None
    for path, update in wanted.items():
        assert float((found[path] - update).square().sum() / update.square().sum()) <= 0.1
    assert "of the energy of 14 updates is lost" in done.notes[0]


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_rank_is_given_without_the_base_too(rank: int, tmp_path: Path) -> None:
    model, folder = on_disk(tmp_path)
    export_adapter(folder, "sglang", tmp_path / "out", rank=rank)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == rank
    for path, update in updates_of(model).items():
        U, S, Vh = torch.linalg.svd(update, full_matrices=False)
        close(by_sglang(tmp_path / "out")[path], U[:, :rank] * S[:rank] @ Vh[:rank], 1e-4)


def test_factors_in_float64_are_given_another_rank_in_float64(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Linears().double(), LoraConfig(r=4, target_modules=["first", "second"]))
    model.double()
    train(model)
    model.save_pretrained(tmp_path)
    whole, cut = of_files(tmp_path), of_files(tmp_path, 4)
    assert all(update.B.dtype is torch.float64 for update in cut.updates)
    assert max(relative_error(*pair) for pair in zip(whole.updates, cut.updates, strict=True)) < 1e-13


@pytest.mark.parametrize("name", ["kasa", "lora_sb", "velora", "monteclora"])
def test_for_peft_there_is_nothing_in_the_file_but_factors(name: str, tmp_path: Path) -> None:
    model, folder = on_disk(tmp_path, **FORMULAS[name])
    own = load_file(Path(folder) / "adapter_model.safetensors")
    assert [key for key in own if not key.endswith(("lora_A.weight", "lora_B.weight"))]
    export_adapter(folder, "peft", tmp_path / "out", verify=True)
    plain = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert [key for key in plain if not key.endswith(("lora_A.weight", "lora_B.weight"))] == []
    close(inference(peft.PeftModel.from_pretrained(llama(), tmp_path / "out")), inference(model), EXACT)


def test_a_merged_adapter_on_codes_is_the_model_that_was_trained(tmp_path: Path) -> None:
    model, folder = on_disk(tmp_path, init_lora_weights="loftq", loftq_config={"loftq_iter": 1})
    export_adapter(folder, "vllm", tmp_path / "out", merged=True)
    whole_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    close(inference(whole_model), inference(model), 1e-3)


def test_vllm_is_started_with_a_rank_of_its_list(tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path, r=9)
    done = export_adapter(folder, "vllm", tmp_path / "out")
    assert "--max-lora-rank 16" in done.notes[-1]


def test_the_modelfile_names_base_and_adapter(tmp_path: Path) -> None:
    _, folder = on_disk(tmp_path)
    done = export_adapter(folder, "ollama", tmp_path / "out")
    assert done.files == ("Modelfile", "adapter.gguf")
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert lines == [f"FROM {tmp_path / 'base'}", "ADAPTER ./adapter.gguf"]


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_a_merged_model_is_the_adapted_one(settings: dict[str, Any], tmp_path: Path) -> None:
    model, folder = on_disk(tmp_path, **settings)
    done = export_adapter(folder, "vllm", tmp_path / "out", merged=True, verify=True)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    close(inference(whole), inference(model), 1e-4)
    assert done.proof is not None
    assert done.proof.logits is not None
    assert done.proof.logits[0] < 1e-5 < done.proof.logits[1]
    assert any("has a tokenizer" in note for note in done.notes)
    export_adapter(folder, "ollama", tmp_path / "ollama", merged=True)
    assert (tmp_path / "ollama" / "Modelfile").read_text() == "FROM .\n"


def test_a_run_directory_stands_for_its_adapter(tmp_path: Path) -> None:
    model, _ = on_disk(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("{}")
    export_adapter(tmp_path / "run", "vllm", tmp_path / "out")
    assert_same(by_vllm(tmp_path / "out"), updates_of(model))
