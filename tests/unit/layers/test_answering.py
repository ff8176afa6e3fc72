"""A wrapper answers for what it lacks as the layer it wraps would: model code reads ``stride``, ``num_heads`` ..."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lorafa import LoraConfig, get_peft_model
from lorafa.layers.base import LoraLayer
from toys.adapters import adapted, only_layer
from toys.layers import KINDS


def public_names(module: nn.Module) -> set[str]:
    """What a layer says of itself, apart from its tensors and children: sizes, switches, properties of its class."""
    own = {name for name in vars(module) if not name.startswith("_")}
    return own | {name for cls in type(module).__mro__ if cls is not nn.Module for name in vars(cls) if name[0] != "_"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_public_attribute_of_the_base_layer_is_there(kind: str) -> None:
    layer = only_layer(adapted(kind))
    base = layer.base_layer
    missing = [name for name in public_names(base) if hasattr(base, name) and not hasattr(layer, name)]
    assert missing == []
    for name in vars(base).keys() - vars(layer).keys():
        if not name.startswith("_") and name != "extra_repr":  # torchao describes the weight there, we the adapters
            assert getattr(layer, name) is getattr(base, name), name


@pytest.mark.parametrize("kind", ["torch.nn.modules.conv.Conv2d", "torch.nn.modules.sparse.Embedding"])
def test_sizes_are_the_layers_own(kind: str) -> None:
    layer = only_layer(adapted(kind))
    if "Conv2d" in kind:
        assert layer.kernel_size == layer.base_layer.kernel_size
        assert (layer.in_channels, layer.out_channels) == (layer.base_layer.in_channels, layer.base_layer.out_channels)
    else:
        assert (layer.num_embeddings, layer.embedding_dim) == tuple(layer.base_layer.weight.shape)


def linear() -> LoraLayer:
    return only_layer(adapted("torch.nn.modules.linear.Linear"))


def test_private_names_and_those_of_adapters_are_never_the_base_layers() -> None:
    """accelerate takes off what it finds as ``_hf_hook``, torch.compile unwraps what has ``_orig_mod``."""
    layer = linear()
    layer.base_layer._orig_mod = layer.base_layer._hf_hook = layer.base_layer.lora_core = 1
    for name in ("_orig_mod", "_hf_hook", "lora_core"):
        assert hasattr(layer.base_layer, name)
        assert not hasattr(layer, name)
    assert hasattr(layer, "lora_magnitude_vector")


def test_layers_of_several_parameters_do_not_answer_for_each_others_adapters() -> None:
    model = nn.ModuleDict({"block": nn.Module()})
    model["block"].up, model["block"].down = (nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    wrapped = get_peft_model(model, LoraConfig(target_modules=[], target_parameters=["up", "down"], r=2))
    outer = wrapped.base_model.model["block"]
    outer.base_layer.lora_core = nn.ModuleDict()
    assert not hasattr(outer, "lora_core")
    assert outer.up is outer.get_base_layer().up


def test_what_nobody_has_is_missing_under_the_wrappers_name() -> None:
    with pytest.raises(AttributeError, match="'LoraLinear' object has no attribute 'nonsense'"):
        _ = linear().nonsense


def test_fault_inside_a_property_is_not_hidden_by_the_base_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python asks ``__getattr__`` when a property raises AttributeError, and the base layer may have the name."""
    layer = linear()
    layer.base_layer.backend = "of the base"

    def broken(_: LoraLayer) -> None:
        raise AttributeError("inside")

    monkeypatch.setattr(LoraLayer, "backend", property(broken))
    with pytest.raises(AttributeError):
        _ = layer.backend


def test_merged_layer_answers_as_the_merged_one_and_the_pristine_one_while_disabled() -> None:
    model = adapted("torch.nn.modules.linear.Linear")
    layer = only_layer(model)
    layer.base_layer.mark = "pristine"
    model.merge_adapter()
    layer.base_layer.mark = "merged"
    assert layer.mark == "merged"
    with model.disable_adapter():
        assert layer.mark == "pristine"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_answer_as_the_original(copied: object) -> None:
    layer = only_layer(adapted("torch.nn.modules.conv.Conv2d"))
    twin = copied(layer)  # type: ignore[operator]
    assert twin.stride == layer.stride
    assert twin.base_layer is not layer.base_layer
    assert not hasattr(LoraLayer.__new__(LoraLayer), "stride")
