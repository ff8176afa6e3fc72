"""An adapter on a base model: fit, size beside the weights, intruders; by dense matrices in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.inspection.adapter import inspect
from lorafa.inspection.base import OnBase, on_base
from lorafa.inspection.effect import effect_of
from lorafa.io.adapter_files import read_adapter
from lorafa.storage.tensors import read_tensors, write_tensors
from lorafa.surgery.walk import lora_layers
from toys.adapters import train
from toys.compare import close
from toys.kinds import make_t5
from toys.language_models import byte_tokenizer, llama, tiny_llama
from toys.models import Convolution, Mixture, Two


def saved(folder: Path, base: nn.Module | None = None, size: float = 0.3, **settings: Any) -> PeftModel:
    """A trained adapter, and its file."""
    torch.manual_seed(3)
    config = LoraConfig(**{"r": 4, "target_modules": ["first", "second"]} | settings)
    model = get_peft_model(base or Two().double(), config)
    train(model, size)
    model.save_pretrained(folder)
    return model


def found(folder: Path, base: nn.Module) -> OnBase:
    return on_base(base, str(folder), read_adapter(folder))[0]


def update_of(model: PeftModel, path: str) -> tuple[Tensor, Tensor]:
    """W and the update as dense matrices."""
    layer = dict(lora_layers(model.get_base_model()))[path]
    W = layer.base_weight().double()
    return W, layer.merged_weight(["default"]).double() - W


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"use_rslora": True}])
def test_numbers_on_the_base_are_those_of_the_whole_update(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = saved(tmp_path, **settings)
    on = found(tmp_path, Two().double())
    assert on.fit.fits
    for path, measured in on.measures.items():
        W, D = update_of(model, path)
        values = torch.linalg.svdvals(D)
        close(torch.tensor(measured.values), values[: len(measured.values)].float(), 1e-4)
        assert on.weights[path].ratio == pytest.approx(float(D.norm() / W.norm()), rel=1e-5)
        U = torch.linalg.svd(W, full_matrices=False).U
        U1, S1, _ = torch.linalg.svd(W + D, full_matrices=False)
        cosines = (U1[:, :10].mT @ U).abs().amax(1)
        wanted = [(j, float(S1[j]), float(cosines[j])) for j in range(10) if cosines[j] < 0.5]
        named = [(one.place, one.singular_value, one.cosine) for one in on.weights[path].intruders or ()]
        assert [one[0] for one in named] == [one[0] for one in wanted]
        assert named == [pytest.approx(one, rel=1e-4) for one in wanted]
        assert on.weights[path].largest == pytest.approx(float(S1[0]), rel=1e-5)


def test_dora_alone_is_told_by_its_low_rank_part_and_says_so(tmp_path: Path) -> None:
    model = saved(tmp_path, use_dora=True)
    alone = inspect(str(tmp_path))
    whole = inspect(str(tmp_path), base=lambda: (Two().double(), None))
    assert any("dora depends on the base weights" in note and "--base" in note for note in alone.notes)
    assert not any("depends on the base weights" in note for note in whole.notes)
    _, D = update_of(model, "first")
    assert whole.layers[0].measured.frobenius == pytest.approx(float(D.norm()), rel=1e-5)
    adapter = dict(lora_layers(model.get_base_model()))["first"].adapters["default"]
    assert alone.layers[0].measured.frobenius == pytest.approx(float(adapter.product().detach().norm()), rel=1e-5)


def test_other_weights_are_counted_and_the_rest_is_told(tmp_path: Path) -> None:
    saved(tmp_path)
    base = Two().double()
    with torch.no_grad():
        base.second.weight.add_(1.0)
    on = found(tmp_path, base)
    assert (on.fit.fits, on.fit.different, on.fit.recorded) == (False, ["second"], 2)
    assert on.fit.words.startswith("1 of 2 layers have other weights in this base than in the one the adapter was made")
    assert set(on.weights) == {"first", "second"}


@pytest.mark.filterwarnings("ignore:target_modules")
def test_a_base_without_the_layers_is_named_and_nothing_measured(tmp_path: Path) -> None:
    saved(tmp_path)
    on = found(tmp_path, nn.ModuleDict({"first": nn.Linear(12, 10)}))
    assert not on.fit.fits
    assert on.fit.missing == ["second"]
    assert "does not fit the base" in on.fit.words
    assert on.weights == {}


def test_a_base_of_another_width_is_refused_in_words(tmp_path: Path) -> None:
    saved(tmp_path)
    on = found(tmp_path, Two(hidden=11).double())
    assert "of another shape" in on.fit.words
    assert on.updates == {}
    told = inspect(str(tmp_path), base=lambda: (Two(hidden=11).double(), byte_tokenizer()))
    assert told.base is not None
    assert len(told.layers) == 2
    assert told.intruders is None
    assert told.effect is None


def test_a_file_of_another_library_says_nothing_of_its_base(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    write_tensors(path, read_tensors(path)[0])
    on = found(tmp_path, Two().double())
    assert (on.fit.fits, on.fit.recorded) == (True, 0)
    assert "its file does not say which weights it was made for" in on.fit.words


def test_a_weight_that_cannot_be_read_is_said_and_its_update_measured(tmp_path: Path) -> None:
    saved(tmp_path, Convolution(1, groups=2), target_modules=["conv", "head"])
    on = found(tmp_path, Convolution(1, groups=2))
    assert set(on.weights) == {"head"}
    assert "groups=2 has no weight that could hold this update" in on.unreadable["conv"]
    assert on.measures["conv"].frobenius > 0


def test_a_weight_that_is_not_finite_is_said_and_its_update_measured(tmp_path: Path) -> None:
    saved(tmp_path)
    base = Two().double()
    with torch.no_grad():
        base.first.weight[0, 0] = torch.inf
    on = found(tmp_path, base)
    assert set(on.weights) == {"second"}
    assert "its weight or the update holds inf or nan" in on.unreadable["first"]
    assert on.measures["first"].frobenius > 0


def test_stacks_are_measured_matrix_by_matrix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Mixture().double()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    saved(tmp_path, base, 1.0, target_modules=[], target_parameters=["up", "down"], r=2)
    again = Mixture().double()
    again.load_state_dict(state)
    told = inspect(str(tmp_path), base=lambda: (again, None))
    assert [layer.update.name for layer in told.layers] == ["experts.down", "experts.up"]
    assert told.base is not None
    experts = {one.expert for on in told.base.weights.values() for one in on.intruders or ()}
    assert experts <= {0, 1, 2}
    assert experts != set()


def test_replicated_layers_fit_the_stack_they_are_made_of(tmp_path: Path) -> None:
    saved(tmp_path, llama(), target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)])
    on = found(tmp_path, llama())
    assert on.fit.fits, on.fit.words
    assert len(on.weights) == on.fit.recorded == 3


def test_a_router_has_no_one_update(tmp_path: Path) -> None:
    settings = {"init_lora_weights": "goat", "init_config": {"experts": 2}}
    saved(tmp_path, Two(), **settings)
    told = inspect(str(tmp_path), base=lambda: (Two(), None))
    assert told.base is not None
    assert {on.intruders for on in told.base.weights.values()} == {None}
    assert told.intruders is None
    assert any("goat" in note and "some tokens, or parts of it to each" in note for note in told.notes)


# ---- the effect on logits


def test_effect_is_that_of_the_two_models(tmp_path: Path) -> None:
    saved(tmp_path, tiny_llama(), 0.05, target_modules="all-linear")
    text, tokenizer = "Ann has 3 apples and gets 4 more.", byte_tokenizer()
    told = inspect(str(tmp_path), base=lambda: (tiny_llama(), tokenizer), text=text)
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        plain = tiny_llama().eval()(ids).logits
        adapted = PeftModel.from_pretrained(tiny_llama(), tmp_path)(ids).logits
    effect = told.effect
    assert effect is not None
    assert effect.positions == ids.shape[1]
    assert effect.difference == pytest.approx(float((plain - adapted).abs().max()), rel=1e-4)
    p, q = plain.double().log_softmax(-1), adapted.double().log_softmax(-1)
    assert effect.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_an_adapter_that_was_not_trained_has_none(tmp_path: Path) -> None:
    saved(tmp_path, tiny_llama(), 0.0, target_modules="all-linear")
    told = inspect(str(tmp_path), base=lambda: (tiny_llama(), byte_tokenizer()))
    assert told.effect is not None
    assert (told.effect.kl, told.effect.difference, told.effect.changed) == (0, 0, 0)
    assert told.frobenius == 0


def test_a_long_text_is_cut_at_the_context_and_the_model_keeps_its_modes(tmp_path: Path) -> None:
    model = saved(tmp_path, llama(vocab_size=259), target_modules="all-linear").train()
    effect = effect_of(model, byte_tokenizer(), "word " * 100)
    assert (effect.positions, effect.cut) == (64, True)
    assert model.training
    assert model.active_adapters == ["default"]
    assert model.has_active_enabled_adapter


def test_an_encoder_with_a_decoder_reads_the_text_on_both_sides(tmp_path: Path) -> None:
    import transformers

    make_t5(tmp_path)
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    model = saved(tmp_path / "adapter", base, target_modules=["q", "v"])
    effect = effect_of(model, tokenizer, "Ann has 3 apples")
    assert effect.positions > 1
    assert effect.kl > 0


def test_a_text_without_the_invocation_is_said(tmp_path: Path) -> None:
    saved(tmp_path, tiny_llama(), target_modules="all-linear", alora_invocation_tokens=[65, 66])
    tokenizer = byte_tokenizer()
    without = inspect(str(tmp_path), base=lambda: (tiny_llama(), tokenizer), text="zzz")
    assert without.effect is None
    assert "the adapter counts nowhere in the text, which has no invocation" in without.notes[-1]
    invocation = tokenizer.decode([65, 66])
    within = inspect(str(tmp_path), base=lambda: (tiny_llama(), tokenizer), text=f"zzz{invocation}zzz")
    assert within.effect is not None
    assert within.effect.kl > 0
    assert within.intruders is not None


def test_what_cannot_be_compared_is_noted(tmp_path: Path) -> None:
    saved(tmp_path)
    told = inspect(str(tmp_path), base=lambda: (Two().double(), None))
    assert told.notes[-1].startswith("The effect on the outputs was not measured")
