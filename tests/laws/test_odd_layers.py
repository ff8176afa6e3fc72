"""The law of sure back ends: on a layer that is not what its type says, each operation is exact or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, get_peft_model, mutate_base
from lorafa.backends import BACKENDS, backend_of
from lorafa.backends.base import Backend
from lorafa.backends.dense import DenseBackend
from lorafa.backends.nf4 import NF4Linear
from lorafa.errors import BackendError, LoraError, TargetError
from toys.adapters import only_layer, train
from toys.compare import close
from toys.layers import Single
from toys.odd_layers import IN, ODD, OUT, Odd, Packed, Wrapped, dense, hooked, with_weight

CARRYING = [name for name, odd in ODD.items() if odd.carries is None]
RUNNING = [name for name in CARRYING if ODD[name].runs]
REFUSED = [name for name, odd in ODD.items() if odd.carries is not None]
NO_DORA = ("attention", "experts")
START = {"pissa": {"init_lora_weights": "pissa"}, "dora": {"use_dora": True}}


def model_of(odd: Odd) -> Single:
    torch.manual_seed(0)
    return Single(odd.make()).eval()


def input_for(odd: Odd) -> Tensor:
    if odd.kind == "embedding":
        return torch.arange(IN).view(2, IN // 2)
    return torch.randn({"conv": (2, IN, 6), "attention": (2, 5, IN), "experts": (3, 5, IN)}.get(odd.kind, (5, 7, IN)))


def config_for(odd: Odd, **settings: Any) -> LoraConfig:
    if odd.kind == "experts":
        settings |= {"target_modules": [], "target_parameters": ["layer.weight"]}
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["layer"]} | settings)


def inside(tensor: Tensor) -> list[Tensor]:
    """Copies of the ordinary tensors that a tensor is made of."""
    if torch.nn.parameter.is_lazy(tensor):
        return []
    if hasattr(tensor, "__tensor_flatten__"):
        return [copied for name in tensor.__tensor_flatten__()[0] for copied in inside(getattr(tensor, name))]
    if tensor.layout is not torch.strided:
        return [tensor.detach().to_dense()]
    return [torch.empty(0) if tensor.is_meta else tensor.detach().as_subclass(Tensor).clone()]


def all_of(model: nn.Module) -> tuple[list[Tensor], list[Any]]:
    """Values, and everything else: which objects, flags, hooks, attributes of the layer, and the state of chance."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    values = [copied for _, tensor in named for copied in inside(tensor)]
    objects = [(name, id(tensor), tensor.requires_grad) for name, tensor in named]
    modules = [
        (name, id(m), m.training, sorted(vars(m)), list(m._forward_hooks), list(m._forward_pre_hooks))
        for name, m in model.named_modules(remove_duplicate=False)
    ]
    return [*values, torch.get_rng_state()], [objects, modules]


def is_refused(model: nn.Module, error: type[LoraError], text: str, call: Callable[[], object]) -> None:
    """The call raises what it should, and nothing in the model is another bit than before."""
    values, rest = all_of(model)
    with pytest.raises(error, match=text):
        call()
    after, rest_after = all_of(model)
    assert rest_after == rest
    assert all(torch.equal(now, before) for now, before in zip(after, values, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", RUNNING)
def test_fresh_adapter_changes_nothing(name: str, training: bool) -> None:
    x, outputs = input_for(ODD[name]), []
    for wrap in (False, True):
        model: nn.Module = model_of(ODD[name])
        if wrap:
            model = get_peft_model(model, config_for(ODD[name]))
        model.train(training)
        torch.manual_seed(1)
        outputs += [model(x), model(x)]
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3]), "it changed what the layer does at its second call"


@pytest.mark.parametrize("name", [name for name in RUNNING if ODD[name].kind == "linear"])
def test_trained_adapter_adds_its_product_to_what_the_layer_gives(name: str) -> None:
    model, x = get_peft_model(model_of(ODD[name]), config_for(ODD[name])), input_for(ODD[name])
    train(model)
    layer = only_layer(model)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    base = model_of(ODD[name])
    outputs = []
    for run in (model, base):
        torch.manual_seed(1)
        outputs.append(run(x))
    close(outputs[0], outputs[1] + 1.5 * x @ A.T @ B.T, torch.float32)


@pytest.mark.parametrize("name", CARRYING)
def test_merged_equals_unmerged_or_merging_is_refused(name: str) -> None:
    odd = ODD[name]
    model = get_peft_model(model_of(odd), config_for(odd))
    train(model)
    if odd.merges is not None:
        text = rf"layer: Nothing can be merged into this \w+ of \w+: .*{odd.merges}.*; nothing was changed\. Keep the"
        is_refused(model, BackendError, text, model.merge_adapter)
        is_refused(model, BackendError, text, model.merge_and_unload)
        is_refused(model, BackendError, odd.merges, only_layer(model).merge)
        return
    x = input_for(odd)
    unmerged = model(x)
    assert not torch.allclose(unmerged, model_of(odd)(x), atol=1e-2)
    model.merge_adapter()
    close(model(x), unmerged, torch.float32)
    model.unmerge_adapter()
    assert torch.equal(model(x), unmerged)
    close(model.merge_and_unload()(x), unmerged, torch.float32)


@pytest.mark.parametrize("settings", START.values(), ids=START)
@pytest.mark.parametrize("name", CARRYING)
def test_what_reads_the_weight_is_exact_or_refused(name: str, settings: dict[str, Any]) -> None:
    odd = ODD[name]
    if odd.kind in NO_DORA and "use_dora" in settings:
        return  # not defined there, on any layer
    model = model_of(odd)
    if odd.reads is not None:
        asking = "dora" if "use_dora" in settings else "init_lora_weights='pissa'"
        text = (
            odd.reads
            if "meta" in odd.reads
            else rf"layer: {asking} needs the weight .* no back end is sure: {odd.reads}"
        )
        is_refused(model, BackendError, text, lambda: get_peft_model(model, config_for(odd, **settings)))
        return
    x = input_for(odd)
    plain = model(x)
    adapted = get_peft_model(model, config_for(odd, **settings))
    close(adapted(x), plain, torch.float32)
    train(adapted)
    trained = adapted(x)
    assert not torch.allclose(trained, plain, atol=1e-2)
    if odd.merges is None:
        adapted.merge_adapter()
        close(adapted(x), trained, torch.float32)


@pytest.mark.parametrize("name", [n for n in RUNNING if ODD[n].kind == "linear" and ODD[n].reads is None])
def test_weight_that_is_read_is_the_one_the_layer_multiplies_with(name: str) -> None:
    """Measured by running the layer on one-hot inputs: PiSSA takes its leading directions, DoRA its row norms."""
    base = model_of(ODD[name])
    W = (base(torch.eye(IN)) - base(torch.zeros(IN))).T
    layer = only_layer(get_peft_model(model_of(ODD[name]), config_for(ODD[name], **START["pissa"])))
    start = 1.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    close(
        torch.linalg.matrix_norm(W - start), torch.linalg.svdvals(W)[4:].norm(), torch.float32
    )  # the nearest of rank 4
    layer = only_layer(get_peft_model(model_of(ODD[name]), config_for(ODD[name], **START["dora"])))
    close(layer.lora_magnitude_vector["default"].weight, W.norm(dim=1), torch.float32)


@pytest.mark.parametrize("name", REFUSED)
def test_layer_no_back_end_is_sure_of_is_refused_by_name(name: str) -> None:
    odd = ODD[name]
    model = model_of(odd)
    text = f"layer.*{odd.carries}.*"
    text += "Take it out of target_parameters" if odd.kind == "experts" else "exclude_modules"
    is_refused(model, TargetError, text, lambda: get_peft_model(model, config_for(odd)))


@pytest.mark.parametrize("name", [name for name in REFUSED if ODD[name].kind == "linear"])
def test_all_linear_does_not_pass_over_it(name: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": dense(), "odd": ODD[name].make()})
    config = LoraConfig(r=4, target_modules="all-linear")
    is_refused(model, TargetError, "'odd'.*exclude_modules", lambda: get_peft_model(model, config))
    config.exclude_modules = ["odd"]
    adapted = get_peft_model(model, config)
    assert [path for path, _ in adapted.base_model.lora_layers()] == ["first"]


def test_modules_that_only_look_like_linear_layers_are_no_linear_layers() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.weight = IN, nn.Parameter(torch.randn(OUT, IN))

    model = nn.ModuleDict({"first": dense(), "router": Router()})
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert [path for path, _ in adapted.base_model.lora_layers()] == ["first"]


def test_start_is_not_taken_out_of_a_weight_that_cannot_take_another() -> None:
    model = get_peft_model(model_of(ODD["weight norm"]), config_for(ODD["weight norm"], **START["pissa"]))
    is_refused(
        model,
        BackendError,
        f"layer: Nothing can be merged into .*{ODD['weight norm'].merges}",
        lambda: mutate_base(model),
    )


def test_hook_that_comes_later_is_seen_when_merging() -> None:
    model = get_peft_model(Single(dense()), LoraConfig(r=4, target_modules=["layer"]))
    only_layer(model).base_layer.register_forward_hook(lambda module, x, y: 2 * y)
    is_refused(model, BackendError, r"layer: .* a hook is on it \(.*<lambda>\)", model.merge_adapter)


def test_quantized_layer_of_ours_with_a_hook_that_may_change_values_is_not_merged_into() -> None:
    layer = hooked(NF4Linear(torch.randn(OUT, IN)), after=lambda module, x, y: None)
    model = get_peft_model(Single(layer), LoraConfig(r=4, target_modules=["layer"]))
    is_refused(model, BackendError, r"layer: .* a hook is on it \(.*<lambda>\)", model.merge_adapter)


@pytest.mark.parametrize("make", [lambda x: (x, x), lambda x: x[..., :1]], ids=["a tuple", "another shape"])
def test_output_of_another_form_is_refused_and_not_broadcast(make: Callable[[Tensor], Any]) -> None:
    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return make(super().forward(x))

    model = get_peft_model(Single(Other(IN, OUT)), LoraConfig(r=4, target_modules=["layer"]))
    with pytest.raises(BackendError, match=r"A Other of .* gives .* where an adapter .* \(5, 24\).* exclude_modules"):
        model(torch.randn(5, IN))


@pytest.mark.parametrize("rows", [NF4Linear(torch.randn(OUT, IN)), Packed(), dense()])
def test_codes_and_numbers_are_told_apart(rows: nn.Module) -> None:
    """A subclass of a quantized layer of ours may compute in another way: no back end knows it."""
    rows.__class__ = type("Mine", (type(rows),), {})
    assert (backend_of(rows) is None) == (not isinstance(rows, nn.Linear))


@pytest.mark.parametrize("name", ["ScaledNormedTable", "codes"])
def test_rows_of_an_odd_table_are_not_trained_as_if_it_were_none(name: str) -> None:
    table = ODD["a table with a scale that normalizes"].make() if name != "codes" else nn.Embedding(IN, OUT)
    if name == "codes":
        with_weight(table, torch.ones(IN, OUT, dtype=torch.int8))
    model = nn.ModuleDict({"layer": dense(), "table": table})
    config = LoraConfig(r=4, target_modules=["layer"], trainable_token_indices={"table": [1, 2]})
    reason = "its weight is quantized" if name == "codes" else "it has a forward of its own"
    text = f"trainable_token_indices: rows of 'table' cannot be trained: of this .*, {reason}"
    is_refused(model, TargetError, text, lambda: get_peft_model(model, config))


class WrappedBackend(DenseBackend):
    """Knows the tensor, and so every layer of torch's with such a weight."""

    def serves(self, layer: nn.Module) -> str | None:
        return None


def test_back_end_of_a_type_of_tensor_goes_before_that_of_the_layer() -> None:
    layer = with_weight(dense(), torch.randn(OUT, IN).as_subclass(Wrapped))
    assert type(backend_of(layer)) is DenseBackend
    with BACKENDS.added("tensor:toys.odd_layers.Wrapped", WrappedBackend):
        assert type(backend_of(layer)) is WrappedBackend
        assert type(backend_of(dense())) is DenseBackend
        model = get_peft_model(Single(layer), LoraConfig(r=4, target_modules=["layer"]))
        x = torch.randn(3, IN)
        close(model(x).as_subclass(Tensor), layer(x).as_subclass(Tensor), torch.float32)


@pytest.mark.parametrize("kind", BACKENDS.names())
def test_every_back_end_says_none_of_what_it_was_made_for(kind: str) -> None:
    backend: Backend = BACKENDS.get(kind)()
    layer = backend.example(torch.randn(OUT, IN), None)
    assert [backend.serves(layer), backend.reads(layer), backend.merges(layer)] == [None, None, None]


def test_sharded_weight_is_one_that_is_stored_as_it_is() -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        layer, x = dense(), torch.randn(3, IN)
        plain = layer(x)
        mesh = init_device_mesh("cpu", (1,))
        for name, value in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(distribute_tensor(value.detach(), mesh, [Replicate()])))
        assert isinstance(layer.weight, DTensor)
        assert DenseBackend().serves(layer) is None
        get_peft_model(Single(layer), LoraConfig(r=4, target_modules=["layer"]))
        close(layer(distribute_tensor(x, mesh, [Replicate()])).full_tensor(), plain, torch.float32)
    finally:
        distributed.destroy_process_group()
