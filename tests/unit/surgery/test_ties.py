"""ensure_weight_tying: modules that share a weight have one adapter, one copy, one set of rows, whatever is done."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from lorafa.errors import CheckpointError, ConfigError, TargetError
from lorafa.optimizers import create_lorafa_optimizer
from lorafa.optimizers.pairs import pairs_of
from lorafa.surgery.ties import tied_groups
from lorafa.surgery.walk import places
from toys.adapters import train
from toys.compare import assert_unchanged, close, everything
from toys.models import Tied as OneTable

X = torch.tensor([[1, 3, 3], [9, 0, 7]])
ROWS = [3, 7]


class Tied(OneTable):
    """With a second input, and a bias on the head."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__(bias=True, second=True, tied=tied)


def adapted(base: nn.Module | None = None, **settings: Any) -> PeftModel:
    config = {"target_modules": ["proj", "head"], "r": 2, "ensure_weight_tying": True} | settings
    model = get_peft_model(base or Tied(), LoraConfig(**config))
    train(model)
    return model


def dense(model: PeftModel) -> tuple[Tied, Tensor, Tensor]:
    """The model with the update written into the one table, differentiable in A (r, 10) and B (6, r)."""
    user = model.get_base_model()
    A, B = (
        p["default"].detach().clone().requires_grad_()
        for p in (user.embed.lora_embedding_A, user.embed.lora_embedding_B)
    )
    table = user.embed.base_layer.weight.detach() + user.embed.scaling["default"] * (B @ A).T
    plain = Tied()
    plain.proj = copy.deepcopy(user.proj)
    plain.head.bias = user.head.base_layer.bias
    for layer in (plain.embed, plain.second, plain.head):
        del layer.weight
        layer.weight = table
    return plain, A, B


# ---- one adapter


@pytest.mark.parametrize(
    "targets", [["proj", "embed"], ["proj", "head"], ["proj", "head", "embed", "second"], ".*(proj|head)"], ids=str
)
def test_naming_one_end_adapts_all_with_one_adapter(targets: Any) -> None:
    model = adapted(target_modules=targets)
    assert sorted(model.targeted_module_names) == ["embed", "head", "proj", "second"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "proj" not in name}
    prefix = "base_model.model.embed.lora_embedding_"
    assert trained == {f"{prefix}A.default", f"{prefix}B.default"}
    assert model.get_nb_trainable_parameters()[0] == 2 * (10 + 6) + 2 * (6 + 6)
    close(model(X), dense(model)[0](X))


def test_one_adapter_gets_the_gradient_of_every_end() -> None:
    model = adapted()
    plain, A, B = dense(model)
    for each in (model, plain):
        each(X).square().sum().backward()
    embed = model.get_base_model().embed
    close(embed.lora_embedding_A["default"].grad, A.grad)
    close(embed.lora_embedding_B["default"].grad, B.grad)


@pytest.mark.parametrize("start", [True, "gaussian", "pissa", "orthogonal"])
def test_every_start_begins_at_the_function_of_the_base(start: bool | str) -> None:
    model = get_peft_model(
        Tied(), LoraConfig(r=2, target_modules=["head"], ensure_weight_tying=True, init_lora_weights=start)
    )
    close(model(X), Tied()(X))
    train(model)
    changed = model(X)
    assert not torch.allclose(changed, Tied()(X))
    close(model.merge_and_unload()(X), changed)


def test_dropout_acts_on_the_input_of_the_head_in_training_only() -> None:
    with pytest.warns(UserWarning, match="embed: lora_dropout does not act on embedding"):
        model = adapted(lora_dropout=0.5)
    still = adapted()
    close(model.eval()(X), still.eval()(X))
    torch.manual_seed(1)
    assert not torch.allclose(model.train()(X), still.train()(X))


def test_a_second_adapter_of_the_head_alone_stands_beside_the_shared_one() -> None:
    model = adapted()
    before = model(X)
    model.add_adapter("alone", LoraConfig(r=1, target_modules=["head"]))
    model.set_adapter("alone")
    train(model)
    assert not torch.allclose(model(X), before)
    model.set_adapter("default")
    close(model(X), before)
    model.add_adapter("shared", LoraConfig(r=3, target_modules=["embed"], ensure_weight_tying=True))
    model.delete_adapter("default")
    assert set(model.get_base_model().head.adapters) == {"alone", "shared"}


def test_reports_count_the_adapter_once_and_know_that_it_trains() -> None:
    model = adapted()
    status = {layer.name: layer for layer in model.get_layer_status()}
    assert status["model.head"].requires_grad == status["model.embed"].requires_grad == {"default": True}
    assert status["model.head"].devices == {"default": ["cpu"]}
    model.set_adapter("default", inference_mode=True)
    assert model.get_layer_status()[-1].requires_grad == {"default": False}
    assert model.get_nb_trainable_parameters()[0] == 0


# ---- ties last


def tied_to_the_embedding(model: PeftModel) -> bool:
    user = model.get_base_model()
    return all(layer.adapters["default"].owner is user.embed for layer in (user.second, user.head))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "dtype"])
def test_copies_and_casts_keep_the_tie(how: str) -> None:
    model = adapted()
    before = model(X)
    acts = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        "dtype": lambda m: m.float().double(),
    }
    twin = acts[how](model)
    assert tied_to_the_embedding(twin)
    torch.testing.assert_close(twin(X), before, rtol=1e-5, atol=1e-5)
    train(twin)
    close(twin(X), dense(twin)[0](X))
    if how != "dtype":
        assert torch.equal(model(X), before)


def test_merging_keeps_one_table() -> None:
    model, base = adapted(), Tied()
    table, expected = model.get_base_model().embed.base_layer.weight, model(X)
    model.merge_adapter()
    user = model.get_base_model()
    assert user.embed.weight is user.second.weight is user.head.weight is not table
    close(model(X), expected)
    model.unmerge_adapter()
    assert user.embed.weight is user.second.weight is user.head.weight is table
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = copy.deepcopy(model).merge_and_unload()
    assert merged.embed.weight is merged.second.weight is merged.head.weight
    close(merged(X), expected)
    assert torch.equal(model.unload()(X), base(X))


def test_ends_that_are_scaled_apart_are_merged_apart() -> None:
    model = adapted()
    model.get_base_model().head.set_scale("default", 3.0)
    expected = model(X)
    model.merge_adapter()
    close(model(X), expected)


def test_the_pairs_of_optimizers_are_those_that_own_their_factors() -> None:
    model = adapted()
    assert [pair.path.rpartition(".")[2] for pair in pairs_of(model)] == ["embed", "proj"]
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=0.1)
    before = model(X)
    model(X).square().sum().backward()
    optimizer.step()
    assert model(X).square().sum() < before.square().sum()


# ---- files


@pytest.mark.parametrize("settings", [{}, {"init_lora_weights": "pissa"}, {"use_rslora": True, "r": 1}], ids=str)
@pytest.mark.parametrize("low_cpu", [False, True])
def test_a_file_holds_every_end_and_loads_tied(tmp_path: Path, settings: dict[str, Any], low_cpu: bool) -> None:
    model = adapted(**settings)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    A, B = (stored[f"base_model.model.embed.lora_embedding_{factor}"] for factor in "AB")
    assert torch.equal(stored["base_model.model.head.lora_A.weight"], B.T)
    assert torch.equal(stored["base_model.model.head.lora_B.weight"], A.T)
    assert torch.equal(stored["base_model.model.second.lora_embedding_A"], A)
    loaded = PeftModel.from_pretrained(Tied(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu)
    assert tied_to_the_embedding(loaded)
    assert torch.equal(loaded.eval()(X), model.eval()(X))
    state = get_peft_model_state_dict(model)
    set_peft_model_state_dict(loaded, {key: 2 * value for key, value in state.items()})
    assert torch.equal(
        loaded.get_base_model().embed.lora_embedding_A["default"],
        2 * model.get_base_model().embed.lora_embedding_A["default"],
    )
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    close(model(X), PeftModel.from_pretrained(Tied(), tmp_path)(X))


NAMED = ["proj", "head", "embed", "second"]


def test_factors_that_were_trained_apart_are_not_loaded_into_a_shared_one(tmp_path: Path) -> None:
    apart = adapted(target_modules=NAMED, ensure_weight_tying=False)
    apart.save_pretrained(tmp_path)
    tied = adapted()
    before = everything(tied)
    with pytest.raises(CheckpointError, match=r"'embed\.lora.*different values, but the model ties them \(ensure_w"):
        tied.load_adapter(tmp_path, "default")
    assert_unchanged(before, tied)
    close(PeftModel.from_pretrained(Tied(), tmp_path)(X), apart.eval()(X))


def test_copies_that_were_trained_apart_are_not_loaded_into_a_shared_one(tmp_path: Path) -> None:
    tied = adapted(target_modules=["proj"], modules_to_save=NAMED[1:])
    tied.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.head.weight"] += 1
    save_file(tensors, file)
    base = Tied()
    before = everything(base)
    with pytest.raises(CheckpointError, match=r"'embed\.weight' and 'head\.weight' have different values.*config="):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(before, base)
    config = replace(tied.peft_config["default"], ensure_weight_tying=False)
    loaded = PeftModel.from_pretrained(base, tmp_path, config=config).get_base_model()
    assert torch.equal(loaded.head.weight, tensors["base_model.model.head.weight"])
    assert torch.equal(loaded.embed.weight, tensors["base_model.model.embed.weight"])


# ---- copies and rows


@pytest.mark.parametrize("name", ["embed", "head"])
def test_naming_one_end_copies_all_as_one(name: str) -> None:
    model = adapted(target_modules=["proj"], modules_to_save=[name])
    user = model.get_base_model()
    copies = [layer.modules_to_save["default"].weight for layer in (user.embed, user.second, user.head)]
    assert copies[0] is copies[1] is copies[2] is not user.embed.original_module.weight
    assert set(model.peft_config["default"].modules_to_save or ()) == {"embed", "second", "head"}
    merged = copy.deepcopy(model).merge_and_unload()
    assert merged.embed.weight is merged.second.weight is merged.head.weight
    close(merged(X), model(X))


def test_copies_of_all_ends_are_tied_unasked_and_the_config_of_a_pair_says_so() -> None:
    def saved(base: Tied, *names: str) -> PeftModel:
        return adapted(base, target_modules=["proj"], modules_to_save=list(names), ensure_weight_tying=False)

    pair = Tied()
    pair.second = nn.Embedding(10, 6).double()
    for base, names, says in ((pair, ("embed", "head"), True), (Tied(), ("embed", "second", "head"), False)):
        model = saved(base, *names)
        assert model.get_base_model().embed.weight is model.get_base_model().head.weight
        assert model.peft_config["default"].ensure_weight_tying is says
    alone = saved(Tied(), "head")
    assert alone.get_base_model().embed.weight is not alone.get_base_model().head.weight


@pytest.mark.parametrize(
    "rows",
    [ROWS, {"embed": ROWS}, {"embed": ROWS, "head": ROWS}, {"head": ROWS, "second": ROWS, "embed": ROWS}],
    ids=str,
)
@pytest.mark.parametrize("ensure", [False, True])
def test_rows_of_a_table_are_trained_for_all_that_share_it(rows: Any, ensure: bool) -> None:
    model = adapted(target_modules=["proj"], trainable_token_indices=rows, ensure_weight_tying=ensure)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "proj" not in name]
    assert trained == ["base_model.model.embed.token_adapter.trainable_tokens_delta.default"]
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(merged.embed.weight[ROWS], model.get_parameter(trained[0]))
    assert torch.equal(merged.embed.weight, merged.second.weight)
    assert torch.equal(merged.embed.weight, merged.head.weight)
    close(merged(X), model(X))


def test_rows_of_their_own_are_trained_apart() -> None:
    model = adapted(
        target_modules=["proj"], trainable_token_indices={"embed": ROWS, "head": [2]}, ensure_weight_tying=False
    )
    user = model.get_base_model()
    assert (user.embed.token_adapter.token_indices, user.head.token_adapter.token_indices) == (
        {"default": ROWS},
        {"default": [2]},
    )
    merged = copy.deepcopy(model).merge_and_unload()
    close(merged(X), model(X))
    for first, second in (
        ({"embed": ROWS}, {"head": [2], "embed": ROWS}),
        ({"embed": ROWS, "head": [2]}, {"embed": [5]}),
    ):
        model = adapted(target_modules=["proj"], trainable_token_indices=first, ensure_weight_tying=False)
        before = everything(model)
        with pytest.raises(
            TargetError, match=r"'head' (follows the rows of another|shares the table of 'embed', .* own)"
        ):
            model.add_adapter("b", LoraConfig(target_modules=["proj"], trainable_token_indices=second))
        assert_unchanged(before, model)


# ---- where nothing is tied, and where it cannot be


@pytest.mark.parametrize(
    ("base", "settings"),
    [(Tied(tied=False), {}), (Tied(), {"target_modules": ["proj"]})],
    ids=["nothing shares a weight", "what shares one is not adapted"],
)
def test_nothing_to_tie_is_said(base: nn.Module, settings: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="ensure_weight_tying=True has nothing to tie"):
        adapted(copy.deepcopy(base), **settings)


CANNOT: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "'embed' and 'second' and 'head' share one weight .* but dora is no plain B A"),
    "ranks": ({"target_modules": ["embed", "head"], "rank_pattern": {"head": 3}}, "different ranks or alphas"),
    "alphas": ({"target_modules": ["embed", "head"], "alpha_pattern": {"embed": 3}}, "different ranks or alphas"),
    "excluded": ({"exclude_modules": ["embed"]}, "exclude_modules or modules_to_save takes 'embed' away"),
    "parameter": (
        {"target_modules": ["proj"], "target_parameters": ["head.weight"]},
        "shared by linear and embedding layers only, not by other layers or parameters",
    ),
    "in full": ({"modules_to_save": ["embed"]}, "one is trained in full .* and one gets an adapter"),
    "head rows": (
        {"target_modules": ["proj"], "trainable_token_indices": {"head": ROWS}},
        r"share one table, but trainable_token_indices names rows of \{'head': \[3, 7\]\}. Name those of 'embed'",
    ),
    "other rows": (
        {"target_modules": ["proj"], "trainable_token_indices": {"embed": ROWS, "head": [1]}},
        r"names rows of \{'embed': \[3, 7\], 'head': \[1\]\}. Name those of 'embed'",
    ),
    "bias": ({"lora_bias": True}, "embed: lora_bias is not defined on embedding layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_tied_is_refused_and_changes_nothing(case: str) -> None:
    settings, text = CANNOT[case]
    base = Tied()
    before = everything(base)
    config = {"target_modules": ["proj", "head"], "r": 2, "ensure_weight_tying": True} | settings
    with pytest.raises(ConfigError, match=text):
        get_peft_model(base, LoraConfig(**config))
    assert_unchanged(before, base)
    assert base.embed.weight is base.head.weight


def test_groups_begin_with_an_embedding_and_look_into_wrappers() -> None:
    class Late(Tied):
        def __init__(self) -> None:
            super().__init__()
            self._modules = dict(reversed(self._modules.items()))

    names = [place.name for place in tied_groups(list(places(Late())))[0]]
    assert names == ["second", "embed", "head"]
    model = adapted(target_modules=["head"], ensure_weight_tying=False).get_base_model()
    assert [place.name for place in tied_groups(list(places(model)))[0]] == ["embed", "second", "head"]
