"""What scripts pass when they load and save adapters: every argument does what it says, or is refused by name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from lorafa.errors import CheckpointError, ConfigError, SourceError
from lorafa.surgery.walk import lora_layers
from toys.adapters import adapted, train
from toys.layers import KINDS, input_for
from toys.several import Model, config, run, three, trains

UNREAD: list[dict[str, Any]] = [
    {"device_map": "auto"},
    {"device_map": {"": "cpu"}},
    {"max_memory": {"cpu": "1GiB"}},
    {"offload_folder": "somewhere", "offload_buffers": True},
    {"offload_dir": "somewhere", "offload_index": {}},
    {"trust_remote_code": True},
    {"torch_device": "cpu"},
    {"ephemeral_gpu_offload": True},
    {"use_safetensors": True},
    {"use_safetensors": None},
    {"ignore_mismatched_sizes": False},
    {"dtype": None},
    {"torch_dtype": "auto"},
    {"proxies": {"https": "http://127.0.0.1:9"}, "use_auth_token": True},
]


def saved(folder: Path, **settings: Any) -> PeftModel:
    model = get_peft_model(Model().double(), config(**settings))
    train(model)
    model.eval().save_pretrained(folder)
    return model


def load(folder: Path, way: str, base: nn.Module | None = None, **options: Any) -> PeftModel:
    """Load by one of the two ways, and let the adapter count."""
    base = Model().double() if base is None else base
    if way == "from_pretrained":
        return PeftModel.from_pretrained(base, folder, **options)
    model = PeftModel(base)
    model.load_adapter(folder, "default", **options)
    model.set_adapter("default", inference_mode=True)
    return model.eval()


WAYS = pytest.mark.parametrize("way", ["from_pretrained", "load_adapter"])


@WAYS
@pytest.mark.parametrize("options", UNREAD, ids=str)
def test_arguments_about_the_base_change_nothing_for_its_adapter(
    options: dict[str, Any], way: str, tmp_path: Path
) -> None:
    model = saved(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(tmp_path, way, **options)
    torch.testing.assert_close(run(loaded), run(model), rtol=0, atol=0)


@WAYS
def test_an_argument_that_does_not_exist_is_refused_by_name_and_no_value_is_shown(way: str, tmp_path: Path) -> None:
    saved(tmp_path)
    base = Model().double()
    names = [name for name, _ in base.named_modules()]
    text = (
        rf"{way} has no argument 'ignore_mismatched_size'\. Did you mean 'ignore_mismatched_sizes'\? Beside those of "
    )
    with pytest.raises(ConfigError, match=text) as caught:
        load(tmp_path, way, base, ignore_mismatched_size="hf_secret")
    assert "hf_secret" not in str(caught.value)
    assert [name for name, _ in base.named_modules()] == names


# ---- dtype


@pytest.mark.parametrize("named", [{"dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}, {"dtype": "torch.bfloat16"}],
                         ids=str)  # fmt: skip
@WAYS
def test_factors_are_kept_in_the_dtype_that_is_asked_for(named: dict[str, Any], way: str, tmp_path: Path) -> None:
    model = saved(tmp_path)
    loaded = load(tmp_path, way, **named)
    own = {p.dtype for name, p in loaded.named_parameters() if "lora_" in name}
    assert own == {torch.bfloat16}
    assert loaded.get_base_model().head.weight.dtype == torch.float64
    for key, value in get_peft_model_state_dict(model).items():
        assert torch.equal(get_peft_model_state_dict(loaded)[key], value.to(torch.bfloat16))
    torch.testing.assert_close(run(loaded), run(model), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_layers_of_every_kind_run_with_factors_of_another_dtype(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = adapted(kind).eval(), input_for(kind)
    model.save_pretrained(tmp_path)
    y, base = model(x), model.unload()
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True, dtype=dtype)
    assert {p.dtype for _, p in loaded.named_parameters() if p.requires_grad} == {dtype}
    torch.testing.assert_close(loaded.eval()(x), y, rtol=2e-2, atol=2e-2)
    assert loaded(x).dtype == y.dtype


REFUSED_DTYPES: list[tuple[dict[str, Any], str]] = [
    (
        {"dtype": "bfloat61"},
        r"dtype is that of the adapter's factors, .* found 'bfloat61' \(str\)\. Did you mean 'bfloat16'",
    ),
    ({"torch_dtype": torch.int8}, r"torch_dtype is that of .* float32, bfloat16, float16, float64, found torch\.int8"),
    ({"dtype": "float32", "torch_dtype": "float16"}, r"dtype='float32' and torch_dtype='float16' differ\. Pass one"),
]


@pytest.mark.parametrize(("options", "text"), REFUSED_DTYPES, ids=str)
@WAYS
def test_dtypes_that_cannot_be(options: dict[str, Any], text: str, way: str, tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ConfigError, match=text):
        load(tmp_path, way, **options)


def test_an_adapter_that_is_there_keeps_its_dtype(tmp_path: Path) -> None:
    model = saved(tmp_path)
    before = run(model)
    text = r"has an adapter 'default' already, in torch\.float64, and it keeps its dtype: torch\.float16 was asked for"
    with pytest.raises(ConfigError, match=text):
        model.load_adapter(tmp_path, "default", dtype="float16")
    model.load_adapter(tmp_path, "default", dtype="float64")
    torch.testing.assert_close(run(model), before, rtol=0, atol=0)


# ---- pickles


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")


@WAYS
def test_use_safetensors_false_reads_the_pickle_where_that_is_allowed(way: str, tmp_path: Path) -> None:
    model = saved(tmp_path)
    as_pickle(tmp_path)
    other = get_peft_model(Model().double(), config())
    randomize(other)
    other.save_pretrained(tmp_path)  # other values than the pickle's
    with pytest.raises(ConfigError, match=r"use_safetensors=False asks for the pickle.* pass allow_pickle=True"):
        load(tmp_path, way, use_safetensors=False)
    loaded = load(tmp_path, way, use_safetensors=False, allow_pickle=True)
    torch.testing.assert_close(run(loaded), run(model), rtol=0, atol=0)
    torch.testing.assert_close(run(load(tmp_path, way, allow_pickle=True)), run(other.eval()), rtol=0, atol=0)


@WAYS
def test_use_safetensors_true_reads_no_pickle(way: str, tmp_path: Path) -> None:
    saved(tmp_path)
    as_pickle(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"has no adapter_model\.safetensors; it holds"):
        load(tmp_path, way, use_safetensors=True, allow_pickle=True)
    load(tmp_path, way, allow_pickle=True)


# ---- other sizes


class Classifier(nn.Module):
    def __init__(self, classes: int = 3, vocabulary: int = 7, hidden: int = 4) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.body, self.wide = nn.Linear(6, 6), nn.Linear(6, hidden)
        self.score, self.embed = nn.Linear(6, classes), nn.Embedding(vocabulary, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(self.embed(x))
        return self.score(h) + self.wide(h).sum(-1, keepdim=True)


TOKENS = torch.tensor([[0, 2, 5]])
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "kasa": {"init_lora_weights": "kasa"},
}


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter))


@WAYS
@pytest.mark.parametrize("settings", SETTINGS)
def test_tensors_of_another_size_are_left_out_if_asked_and_named(settings: str, way: str, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"r": 2, "target_modules": ["body", "wide"], "modules_to_save": ["score"]}
    model = get_peft_model(Classifier(), LoraConfig(**asked | SETTINGS[settings]))
    randomize(model)
    model.eval().save_pretrained(tmp_path)
    base = Classifier(classes=5, hidden=9)
    with pytest.raises(CheckpointError, match="made for another base model"):
        load(tmp_path, way, base)
    with pytest.raises(CheckpointError, match="does not fit adapter 'default'"):
        load(tmp_path, way, base, ignore_base_mismatch=True)
    text = (
        r"tensors have another shape in the model and were not loaded.*score\.bias \(3 in the file, 5 here\), score\."
    )
    with pytest.warns(UserWarning, match=text + r"weight \(3x6 in the file, 5x6 here\), wide\.lora_B"):
        loaded = load(tmp_path, way, base, ignore_mismatched_sizes=True)
    fresh = Classifier(classes=5, hidden=9)
    inner = loaded.get_base_model()
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(inner.score, name), getattr(fresh.score, name), rtol=0, atol=0)
    h = torch.randn(4, 6)
    torch.testing.assert_close(inner.wide(h), fresh.wide(h), rtol=1e-6, atol=1e-6)  # the base alone
    torch.testing.assert_close(inner.body(h), model.get_base_model().body(h), rtol=1e-6, atol=1e-6)  # as trained


@WAYS
def test_a_larger_vocabulary_leaves_the_embedding_with_the_base_alone(way: str, tmp_path: Path) -> None:
    model = get_peft_model(Classifier(), LoraConfig(r=2, target_modules=["embed", "body"]))
    randomize(model)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"embed\.lora_embedding_A \(2x7 in the file, 2x9 here\)"):
        loaded = load(tmp_path, way, Classifier(vocabulary=9), ignore_mismatched_sizes=True)
    torch.testing.assert_close(loaded.get_base_model().embed(TOKENS), Classifier(vocabulary=9).embed(TOKENS))


def test_other_layers_and_names_are_refused_all_the_same(tmp_path: Path) -> None:
    saved(tmp_path)
    asked = config("first", modules_to_save=["head"])
    with pytest.raises(CheckpointError, match="not in the model"):
        PeftModel.from_pretrained(Model().double(), tmp_path, config=asked, ignore_mismatched_sizes=True)


def test_what_has_no_start_cannot_keep_it(tmp_path: Path) -> None:
    saved(tmp_path)
    text = "ignore_mismatched_sizes=True keeps the start of .* low_cpu_mem_usage=True makes none"
    with pytest.raises(ConfigError, match=text):
        PeftModel.from_pretrained(Model().double(), tmp_path, ignore_mismatched_sizes=True, low_cpu_mem_usage=True)


def test_other_base_weights_of_the_same_shape_are_refused_all_the_same(tmp_path: Path) -> None:
    saved(tmp_path)
    base = Model().double()
    with torch.no_grad():
        base.first.weight.add_(1)
    with pytest.raises(CheckpointError, match="1 of 2 adapted layers have other weights"):
        PeftModel.from_pretrained(base, tmp_path, ignore_mismatched_sizes=True)


# ---- whether it is trained


def test_the_config_of_a_loaded_adapter_says_whether_it_is_trained(tmp_path: Path) -> None:
    saved(tmp_path)
    for trained in (True, False):
        model = PeftModel.from_pretrained(Model().double(), tmp_path, is_trainable=trained)
        assert model.peft_config["default"].inference_mode is not trained
        again = get_peft_model(Model().double(), model.peft_config["default"])
        assert bool(trains(again)) is trained
        model.load_adapter(tmp_path, "other", is_trainable=trained)
        assert model.peft_config["other"].inference_mode is not trained
        assert any("other" in name for name in trains(model)) is trained
        given = config()
        wrapped = PeftModel.from_pretrained(Model().double(), tmp_path, is_trainable=trained, config=given)
        assert wrapped.peft_config["default"].inference_mode is not trained
        assert given.inference_mode is False


# ---- saving


def test_arguments_of_other_savers_are_taken_and_change_nothing(tmp_path: Path) -> None:
    model = three()
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "asked", max_shard_size="1KB", save_function=torch.save, save_peft_format=True)
    plain, asked = (sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*")) for n in ("plain", "asked"))
    assert plain == asked
    for path in plain:
        if path.suffix == ".safetensors":
            one, other = load_file(tmp_path / "plain" / path), load_file(tmp_path / "asked" / path)
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_what_cannot_be_saved_so_is_refused(tmp_path: Path) -> None:
    model = three()
    with pytest.raises(
        ConfigError, match=r"save_pretrained has no argument 'max_shardsize'\. Did you mean 'max_shard_size'"
    ):
        model.save_pretrained(tmp_path / "a", max_shardsize=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="selected_adapters names no adapter, so there is nothing to save"):
        model.save_pretrained(tmp_path / "a", selected_adapters=[])
    assert not (tmp_path / "a").exists()


def test_a_pickle_is_asked_for_and_safetensors_are_written_with_a_warning(tmp_path: Path) -> None:
    model = get_peft_model(Model(), config())
    with pytest.warns(
        UserWarning, match="safe_serialization=False asks for a pickle.* writes safetensors all the same"
    ):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert sorted(p.suffix for p in tmp_path.glob("adapter_model.*")) == [".safetensors"]


def test_dtypes_of_factors_on_layers_that_an_adapter_shares(tmp_path: Path) -> None:
    saved(tmp_path)
    model = PeftModel.from_pretrained(Model().double(), tmp_path)
    model.load_adapter(tmp_path, "small", dtype="float16")
    dtypes = {name: layer.lora_A["small"].weight.dtype for name, layer in lora_layers(model.get_base_model())}
    assert set(dtypes.values()) == {torch.float16}
    assert model.get_base_model().first.lora_A["default"].weight.dtype == torch.float64
