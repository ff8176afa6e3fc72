"""The law of files: what is saved comes back bit for bit, and what does not fit is refused whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lorafa import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from lorafa.errors import CheckpointError
from toys.adapters import (
    DEFINED,
    STARTED,
    VARIANT,
    config_for,
    hosts_of,
    initializer_of,
    quick_first,
    read_by,
    starts_of,
    stats_for,
    train,
    with_adapter,
    with_starts,
)
from toys.compare import assert_unchanged, everything
from toys.layers import KINDS, Single, backend_for, base_layer, input_for
from toys.models import Pair

LINEAR = "torch.nn.modules.linear.Linear"


def same_base(kind: str, dtype: torch.dtype = torch.bfloat16) -> Single:
    torch.manual_seed(1)
    return Single(base_layer(kind, dtype=dtype))


def own_start_reads_weight(variant: str) -> bool:
    return any(initializer_of(start).reads_weight for start in starts_of(variant))


def assert_same_adapter(one: PeftModel, other: PeftModel, name: str = "default", other_name: str | None = None) -> None:
    """Every tensor of the adapter, frozen starts included, bit for bit."""

    def tensors(model: PeftModel, adapter: str) -> dict[str, Tensor]:
        state = model.state_dict()
        return {key.replace(f".{adapter}", ".?"): state[key] for key in state if f".{adapter}" in key}

    first, second = tensors(one, name), tensors(other, other_name or name)
    assert first
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype, key
        assert torch.equal(first[key], second[key]), key


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("start", "variant", "kind"), quick_first(STARTED))
def test_saved_adapter_comes_back_bit_for_bit(tmp_path: Path, start: bool | str, variant: str, kind: str) -> None:
    settings = VARIANT[variant] | {"init_lora_weights": start}
    model = with_adapter(same_base(kind), kind, **settings).eval()
    train(model)
    x = input_for(kind, torch.bfloat16)
    with torch.no_grad():
        expected = model(x)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(same_base(kind), tmp_path)
        assert torch.equal(loaded(x), expected)
        assert_same_adapter(model, loaded)
        model.merge_adapter()
        loaded.merge_adapter()
        assert torch.equal(loaded(x), model(x))
    again = tmp_path / "again"
    loaded.unmerge_adapter()
    loaded.save_pretrained(again)
    files = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, again))
    for (key, first), (other, second) in zip(*(sorted(file.items()) for file in files), strict=True):
        assert key == other
        assert torch.equal(first, second), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("variant", "rank"), [(name, rank) for name in VARIANT for rank in (1, 8) if rank > 1 or "bdlora" not in name]
)
def test_outputs_come_back_bit_for_bit_at_a_size_where_strides_choose_the_kernel(
    tmp_path: Path, variant: str, rank: int, dtype: torch.dtype
) -> None:
    def base() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(96, 160), nn.Unflatten(1, (4, 40)), nn.Conv1d(4, 12, 3)).to(dtype)

    start = starts_of(variant, "pissa", False)[0]
    settings = VARIANT[variant] | {"init_lora_weights": start}
    targets = ["0", "2"] if "conv" in hosts_of(variant) else ["0"]
    config = LoraConfig(target_modules=targets, r=rank, lora_alpha=12, use_rslora=True, **settings)
    stats = read_by(start, {"0": stats_for(base()[0].weight)})  # type: ignore[arg-type]
    model = get_peft_model(base(), config, stats=stats).eval()
    train(model)
    model.save_pretrained(tmp_path)
    x = torch.randn(33, 96).to(dtype)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path)(x), model(x))


@pytest.mark.matrix(4)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
@pytest.mark.parametrize(("variant", "kind", "start"), with_starts(DEFINED, True, "pissa"))
def test_adapter_loads_beside_another_one_under_another_name(
    tmp_path: Path, variant: str, kind: str, start: bool | str, low_cpu_mem_usage: bool
) -> None:
    model = with_adapter(same_base(kind), kind, r=2, **VARIANT[variant] | {"init_lora_weights": start})
    train(model)
    model.save_pretrained(tmp_path)
    other = get_peft_model(same_base(kind), config_for(kind))
    other.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert other.active_adapters == ["default"]
    assert_same_adapter(model, other, "default", "second")
    other.set_adapter("second")
    x = input_for(kind, torch.bfloat16)
    assert torch.equal(other(x), model(x))


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("variant", "kind", "start"), with_starts(DEFINED, True, "pissa"))
def test_state_dict_of_an_adapter_fills_another_model(variant: str, kind: str, start: bool | str) -> None:
    settings = VARIANT[variant] | {"init_lora_weights": start}
    model = with_adapter(same_base(kind), kind, **settings)
    train(model)
    other = with_adapter(same_base(kind), kind, **settings, init_seed=9)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert_same_adapter(model, other)


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("variant", "kind"), [case for case in DEFINED if not own_start_reads_weight(case[0])])
def test_adapter_made_without_memory_is_filled_from_a_state_dict(variant: str, kind: str) -> None:
    model = with_adapter(same_base(kind), kind, **VARIANT[variant])
    train(model)
    other = get_peft_model(same_base(kind), config_for(kind, **VARIANT[variant]), low_cpu_mem_usage=True)
    other.add_adapter("second", config_for(kind, **VARIANT[variant]), low_cpu_mem_usage=True)
    trained = {name: p.requires_grad for name, p in other.named_parameters()}
    assert all(p.is_meta == (".default" in name or ".second" in name) for name, p in other.named_parameters())
    for name in ("default", "second"):
        set_peft_model_state_dict(other, get_peft_model_state_dict(model), adapter_name=name)
        assert_same_adapter(model, other, "default", name)
    assert {name: p.requires_grad for name, p in other.named_parameters()} == trained
    x = input_for(kind, torch.bfloat16)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_model_state_dict_fills_another_model(kind: str) -> None:
    """torch's own state_dict carries the frozen starts too."""
    model = get_peft_model(same_base(kind), config_for(kind, init_lora_weights="pissa"))
    train(model)
    other = get_peft_model(same_base(kind), config_for(kind, init_lora_weights="pissa", init_seed=9))
    if not backend_for(kind).fills:
        with pytest.raises(RuntimeError, match="Unexpected key"):  # torch's own: the bare layer does not take it either
            same_base(kind).load_state_dict(same_base(kind).state_dict())
        return
    other.load_state_dict(model.state_dict())
    x = input_for(kind, torch.bfloat16)
    assert torch.equal(other(x), model(x))


def pair(*targets: str, **settings: object) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(Pair(), LoraConfig(target_modules=list(targets), r=2, **settings))  # type: ignore[arg-type]


def test_file_with_too_little_loads_nothing() -> None:
    small, large = pair("q_proj"), pair("q_proj", "v_proj")
    before = everything(large)
    with pytest.raises(CheckpointError, match=r"v_proj\.lora_A\.weight"):
        set_peft_model_state_dict(large, get_peft_model_state_dict(small))
    assert_unchanged(before, large)


def test_file_with_too_much_loads_nothing() -> None:
    small, large = pair("q_proj"), pair("q_proj", "v_proj")
    before = everything(small)
    with pytest.raises(CheckpointError, match=r"v_proj\.lora_A\.weight"):
        set_peft_model_state_dict(small, get_peft_model_state_dict(large))
    assert_unchanged(before, small)


def test_file_of_another_shape_loads_nothing() -> None:
    model = pair("q_proj", "v_proj")
    tensors = get_peft_model_state_dict(model)
    tensors["base_model.model.v_proj.lora_B.weight"] = torch.zeros(8, 3)
    before = everything(model)
    with pytest.raises(CheckpointError, match=r"v_proj\.lora_B\.weight: the file has 8x3, the model 8x2\nNothing was"):
        set_peft_model_state_dict(model, tensors)
    assert_unchanged(before, model)


def test_file_for_other_base_weights_loads_nothing(tmp_path: Path) -> None:
    pair("q_proj").save_pretrained(tmp_path)
    torch.manual_seed(2)
    other = Pair()
    before = everything(other)
    with pytest.raises(CheckpointError, match="q_proj"):
        PeftModel.from_pretrained(other, tmp_path)
    assert_unchanged(before, other)
    PeftModel.from_pretrained(other, tmp_path, ignore_base_mismatch=True)


def test_merged_adapter_is_saved_with_the_fingerprint_of_the_pristine_base(tmp_path: Path) -> None:
    model = pair("q_proj", "v_proj")
    train(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(Pair(), tmp_path)
    x = torch.randn(3, 8)
    torch.testing.assert_close(loaded(x), model(x))


def test_keys_in_the_model_and_in_a_file_are_those_of_peft() -> None:
    model = pair("q_proj", use_dora=True)
    live = {key for key, value in model.named_parameters() if value.requires_grad}
    prefix = "base_model.model.q_proj"
    assert live == {
        f"{prefix}.lora_A.default.weight",
        f"{prefix}.lora_B.default.weight",
        f"{prefix}.lora_magnitude_vector.default.weight",
    }
    assert f"{prefix}.base_layer.weight" in model.state_dict()
    assert "base_model.model.v_proj.weight" in model.state_dict()
    assert set(get_peft_model_state_dict(model)) == {
        f"{prefix}.lora_A.weight",
        f"{prefix}.lora_B.weight",
        f"{prefix}.lora_magnitude_vector",
    }


def test_injected_adapter_has_keys_without_a_prefix() -> None:
    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], r=2), Pair())
    assert set(get_peft_model_state_dict(model)) == {"q_proj.lora_A.weight", "q_proj.lora_B.weight"}
