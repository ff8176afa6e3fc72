"""Adapters on the quantized layers of bitsandbytes: they compute what its own layers do, and train through them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lorafa import LoraConfig, get_peft_model
from lorafa.backends import backend_of
from lorafa.backends.bnb4 import Bnb4Backend, linear_4bit
from lorafa.backends.bnb8 import linear_8bit
from lorafa.errors import AdapterError, BackendError
from toys.adapters import on_layer, only_layer, train
from toys.compare import close
from toys.layers import Single
from toys.of_libraries import packed_bnb

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

IN, OUT = 64, 96
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) / IN**0.5


def four_bits(**settings: Any) -> Any:
    return linear_4bit(weight(), torch.randn(OUT), **settings)


def eight_bits(**settings: Any) -> Any:
    return linear_8bit(weight(), torch.randn(OUT), **settings)


def of_users(name: str = "Linear4bit", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A layer as scripts make it: dense weights are loaded, and moving it to a device quantizes them."""
    layer = getattr(bitsandbytes.nn, name)(IN, OUT, compute_dtype=dtype, **settings)
    layer.load_state_dict({"weight": weight(), "bias": torch.ones(OUT)})
    return layer.to("cpu")


MADE = {"4 bits": four_bits, "8 bits": eight_bits}


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("double", [True, False], ids=["double", "once"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bits_run_bit_for_bit_as_the_layer_alone(
    quant_type: str, double: bool, dtype: Any, x_dtype: torch.dtype
) -> None:
    x = torch.randn(3, 5, IN).to(x_dtype).requires_grad_()
    alone = of_users(dtype=dtype, quant_type=quant_type, compress_statistics=double)
    model = get_peft_model(Single(copy.deepcopy(alone)), LoraConfig(r=4, target_modules=["layer"]))
    outputs, grads = [], []
    for run in (alone, model):
        x.grad = None
        y = run(x)
        y.float().square().sum().backward()
        outputs.append(y)
        grads.append(x.grad)
    assert outputs[1].dtype is x_dtype
    assert torch.equal(*outputs)
    close(*grads, torch.bfloat16 if torch.bfloat16 in (dtype, x_dtype) else 5e-3)


@pytest.mark.parametrize("name", ["LinearNF4", "LinearFP4"])
def test_its_subclasses_are_served_as_long_as_they_run_as_it_does(name: str) -> None:
    layer = of_users(name)
    assert type(backend_of(layer)) is Bnb4Backend

    class Other(getattr(bitsandbytes.nn, name)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer.__class__ = Other
    model, x = get_peft_model(Single(layer), LoraConfig(r=4, target_modules=["layer"])), torch.randn(3, IN)
    assert torch.equal(model(x), layer(x)), "its own forward runs"
    with pytest.raises(BackendError, match="forward of its own"):
        model.merge_adapter()


@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_a_merged_layer_keeps_all_settings_of_its_codes(storage: torch.dtype, blocksize: int) -> None:
    layer = of_users(quant_type="fp4", quant_storage=storage, dtype=torch.bfloat16)
    layer.weight = bitsandbytes.nn.Params4bit(
        weight().bfloat16(), requires_grad=False, quant_type="fp4", blocksize=blocksize, quant_storage=storage
    ).to("cpu")
    model = on_layer(layer)
    old, delta = layer.weight.quant_state, only_layer(model).get_delta_weight("default")
    merged = model.merge_and_unload().layer
    new = merged.weight.quant_state
    for name in ("blocksize", "quant_type", "nested", "dtype", "shape"):
        assert getattr(new, name) == getattr(old, name), name
    assert (merged.weight.dtype, merged.compute_dtype) == (storage, torch.bfloat16)
    wanted = Bnb4Backend().weight(layer) + delta
    by_hand = bitsandbytes.nn.Params4bit(
        wanted, requires_grad=False, quant_type="fp4", blocksize=blocksize, quant_storage=storage
    ).to("cpu")
    codes = [one.data.view(torch.uint8) for one in (merged.weight, by_hand)]
    assert torch.equal(*codes), "rounded to codes once, from float32"
    assert layer.weight.quant_state is old


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_gradients_are_those_of_the_dequantized_weight(made: Any) -> None:
    model = on_layer(made()).train()
    layer, x = only_layer(model), torch.randn(7, IN, requires_grad=True)
    W, adapter = layer.base_weight(), layer.adapters["default"]
    grad = torch.randn(7, OUT)
    model(x).backward(grad)
    close(x.grad, grad @ (W + adapter.product()), torch.float32)
    close(adapter.A.grad, adapter.scaling * (grad @ adapter.B).T @ x, torch.float32)
    close(adapter.B.grad, adapter.scaling * grad.T @ (x @ adapter.A.T), torch.float32)


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
@pytest.mark.parametrize("freezes", [False, True], ids=["", "A frozen"])
def test_no_second_copy_of_x_no_mask_and_nothing_dequantized_is_kept(made: Any, freezes: bool) -> None:
    """Against the same formula in plain autograd, as PEFT has it: less than half of its bytes."""
    rows, rank = 512, 4
    model = on_layer(made(), lora_dropout=0.1, freeze_A=freezes).train()
    x = torch.randn(rows, IN).bfloat16().requires_grad_()
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    def bytes_of(tensors: list[Tensor]) -> int:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.dim()}
        return sum(storages.values())

    with saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    adapter = only_layer(model).adapters["default"]
    factors = bytes_of([adapter.A, adapter.B])
    ours = bytes_of(kept)
    product = 0 if adapter.B.requires_grad is False else rows * rank * 2
    assert ours <= (0 if freezes else x.nbytes) + product + factors
    kept.clear()
    with saved_tensors_hooks(note, lambda tensor: tensor):
        y = model.base_model.model.layer.base_layer(x)
        wide = nn.functional.dropout(x.to(adapter.A.dtype), 0.1)
        y + nn.functional.linear(nn.functional.linear(wide, adapter.A), adapter.B) * adapter.scaling
    assert ours - factors <= 0.5 * (bytes_of(kept) - factors)


def test_evaluation_does_not_pack_the_codes_of_an_adapted_layer() -> None:
    """On a CPU with AVX512-BF16 the layer's own forward does so in eval mode, and could not be trained afterwards."""
    layer = of_users(quant_type="nf4")
    layer.support_avx512bf16_for_cpu = True
    codes, model, x = layer.weight.data.clone(), on_layer(layer), torch.randn(3, 5, IN)
    model.eval()
    with torch.no_grad():
        y = model(x)
        with model.disable_adapter():
            model(x)
        model(x[0, :1])
    assert torch.equal(layer.weight.data, codes)
    assert layer.support_avx512bf16_for_cpu
    x.requires_grad_()
    close(model.train()(x), y, torch.float32)
    model(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_a_layer_that_was_packed_on_the_way_is_not_trained_through_in_silence() -> None:
    model, x = on_layer(of_users(quant_type="nf4")), torch.randn(3, IN)
    only_layer(model).base_layer = packed_bnb()
    only_layer(model).base_layer.train()
    with pytest.raises(BackendError, match=r"Nothing can be trained through this Linear4bit: its codes were packed"):
        model(x)
    with pytest.raises(BackendError, match=r"The weight of this Linear4bit cannot be read: its codes were packed"):
        only_layer(model).base_weight()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_8_bits_run_as_the_layer_alone_in_training_and_in_evaluation(threshold: float) -> None:
    x = torch.randn(4, 6, IN)
    x[:, :, 3] *= 40  # a column of outliers
    alone = bitsandbytes.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=threshold)
    alone.load_state_dict({"weight": weight(), "bias": torch.ones(OUT)})
    alone = alone.to("cpu")
    model = get_peft_model(Single(copy.deepcopy(alone)), LoraConfig(r=4, target_modules=["layer"]))
    dense = nn.functional.linear(x, only_layer(model).base_weight(), torch.ones(OUT))
    with torch.no_grad():
        close(model.train()(x), dense, torch.float32)
        assert torch.equal(model(x), alone.train()(x))
        y = model.eval()(x)
        assert torch.equal(y, alone.eval()(x))
    off = (y - dense).norm() / dense.norm()
    assert off < backend_of(alone).rounds_inputs  # type: ignore[union-attr]
    alone.train()(x)
    assert torch.equal(only_layer(model).base_weight(), backend_of(alone).weight(alone))  # type: ignore[union-attr]


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_what_reads_the_weight_reads_its_values_and_not_its_codes(made: Any, settings: dict[str, Any]) -> None:
    layer = made()
    model, x = get_peft_model(Single(layer), LoraConfig(r=4, target_modules=["layer"], **settings)), torch.randn(3, IN)
    W = only_layer(model).base_weight()
    assert (W - weight()).norm() / weight().norm() < 0.12
    close(model(x), nn.functional.linear(x, W, layer.bias), torch.float32)
    if "use_dora" in settings:
        close(only_layer(model).lora_magnitude_vector["default"].weight, W.norm(dim=1), torch.float32)
    else:
        start = only_layer(model).adapters["default"]
        lost = W - start.scaling * start.B @ start.A
        close(torch.linalg.matrix_norm(lost), torch.linalg.svdvals(W)[4:].norm(), torch.float32)


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_an_adapted_layer_is_copied_and_pickled(made: Any) -> None:
    model, x = on_layer(made()), torch.randn(3, IN)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
@pytest.mark.parametrize("size", [float("inf"), 1e30])
def test_a_merged_weight_that_is_not_finite_is_refused(made: Any, size: float) -> None:
    model = on_layer(made())
    with torch.no_grad():
        only_layer(model).lora_A["default"].weight.fill_(size)
        only_layer(model).lora_B["default"].weight.fill_(size)
    with pytest.raises(AdapterError, match="gives inf or nan in a Linear"):
        model.merge_adapter()


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_a_second_adapter_a_mixed_batch_and_half_of_the_layers_gradients(made: Any) -> None:
    """Under autocast a layer gives the dtype of its input, with and without an adapter."""
    layer = made()
    model, x = on_layer(layer), torch.randn(3, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = model(x), layer(x)
    assert y.dtype is plain.dtype
    y.sum().backward()
    assert x.grad is not None
    model.add_adapter("second", LoraConfig(r=4, target_modules=["layer"]))
    model.set_adapter("second")
    train(model)
    first, second = [only_layer(model).get_delta_weight(name) for name in ("default", "second")]
    model.base_model.set_adapter(["default", "second"])
    x = x.detach()
    close(model(x), layer(x) + x @ (first + second).T, torch.float32)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
@pytest.mark.parametrize("shape", [(2, 3, 4, IN), (1, 1, 2, IN), (IN,), (0, IN), (2, 0, IN)], ids=str)
def test_inputs_of_any_number_of_dimensions(shape: tuple[int, ...], made: Any, training: bool) -> None:
    layer, x = made(), torch.randn(shape)
    model = on_layer(layer).train(training)
    adapter = only_layer(model).adapters["default"]
    wanted = nn.functional.linear(x, only_layer(model).base_weight() + adapter.product(), layer.bias)
    with torch.no_grad():
        y = model(x)
        with model.disable_adapter():
            assert model(x).shape == wanted.shape
    assert y.shape == wanted.shape
    if x.numel():
        assert (y - wanted).norm() / wanted.norm() < max(backend_of(layer).rounds_inputs, 1e-5)  # type: ignore[union-attr]
