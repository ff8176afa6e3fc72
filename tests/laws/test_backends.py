"""The law of back ends: the matrix they give is the one the layer multiplies with, and layers are never written to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorafa.backends import BACKENDS, backend_of
from lorafa.errors import BackendError
from lorafa.layers import LAYERS
from toys.compare import assert_same_tensors, close, values_of
from toys.layers import KINDS, Experts, Single, backend_for, base_layer, computed_in, input_for, weight_for


def as_the_formula(kind: str, layer: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """What a layer with that matrix computes, in plain operations."""
    host = backend_for(kind).host
    if host == "embedding":
        return weight.T[x]
    if host == "conv":  # the examples have kernels of two taps along the first dimension, one along the others
        taps = torch.stack([x[:, :, :-1], x[:, :, 1:]], dim=2).flatten(1, 2)  # (N, in * k, ...)
        y = torch.einsum("oi,ni...->no...", weight, taps)
        return y if bias is None else y + bias.view(-1, *(1,) * (y.dim() - 2))
    if host == "attention":
        heads, dim = layer.num_heads, layer.embed_dim
        q, k, v = nn.functional.linear(x, weight, bias).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (heads, dim // heads)).transpose(1, 2) for t in (q, k, v))
        mixed = (q @ k.mT / (dim // heads) ** 0.5).softmax(-1) @ v
        return layer.out_proj(mixed.transpose(1, 2).flatten(2))
    return x @ weight.mT if bias is None else x @ weight.mT + bias


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_weight_is_the_matrix_the_layer_multiplies_with(kind: str, bias: bool) -> None:
    layer, backend = base_layer(kind, bias=bias, dtype=torch.float64), backend_for(kind)
    x = input_for(kind, torch.float64)
    weight, vector = backend.weight(layer).to(computed_in(kind, torch.float64)), backend.bias(layer)
    tolerance = torch.float32 if backend.quantized else torch.float64  # some multiply in float32 at most
    close(Single(layer)(x), as_the_formula(kind, layer, weight, vector, x), tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_rounds_its_inputs_too_is_off_by_no_more_than_its_back_end_says(kind: str) -> None:
    layer, backend = base_layer(kind).eval(), backend_for(kind)
    if backend.host == "attention":
        return  # by its weight in eval mode there is another path, which is not about rounding
    x = input_for(kind)
    wanted = as_the_formula(kind, layer, backend.weight(layer), backend.bias(layer), x)
    off = (Single(layer)(x) - wanted).norm() / wanted.norm()
    assert off <= max(backend.rounds_inputs, 1e-5)
    if backend.rounds_inputs:
        assert off > 0.1 * backend.rounds_inputs, "it says how far, and is that far"


@pytest.mark.parametrize("kind", BACKENDS.names())
def test_layer_type_finds_its_own_line_and_so_does_a_subclass_where_the_back_end_serves_some(kind: str) -> None:
    layer, backend = base_layer(kind), BACKENDS.get(kind)
    assert type(backend_of(layer)) is backend
    assert backend.host in LAYERS
    layer.__class__ = type("Mine", (type(layer),), {})
    assert type(backend_of(layer)) is (backend if backend.inherits else type(None))


def test_layer_nobody_knows_has_no_back_end() -> None:
    assert backend_of(nn.LayerNorm(3)) is None


@pytest.mark.parametrize("kind", KINDS)
def test_shape_is_the_shape_of_the_weight(kind: str) -> None:
    layer, backend = base_layer(kind), backend_for(kind)
    assert backend.shape(layer) == tuple(backend.weight(layer).shape[-2:]) == (24, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_with_weight_makes_a_new_layer_and_leaves_the_old_one_alone(kind: str, dtype: torch.dtype) -> None:
    layer, backend = base_layer(kind, dtype=dtype), backend_for(kind)
    layer.requires_grad_(False)
    before = values_of(layer)
    other = weight_for(kind, torch.float32)
    new = backend.with_weight(layer, other)
    assert type(new) is type(layer)
    assert_same_tensors(values_of(layer), before)
    assert not any(parameter.requires_grad for parameter in new.parameters())
    stored = backend.weight(new)
    if backend_for(kind).quantized:
        assert (stored - other).abs().max() <= 0.16 * other.abs().max()
    else:
        assert torch.equal(stored, other.to(dtype))
        assert all(value.is_contiguous() for value in new.parameters())
    if backend.bias(layer) is not None:
        assert torch.equal(backend.bias(new), backend.bias(layer))
        bias = torch.randn(24).to(computed_in(kind, dtype))
        assert torch.equal(backend.bias(backend.with_weight(layer, other, bias)), bias)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not backend_for(kind).quantized])
def test_layout_of_a_matrix_is_that_of_the_stored_weight(kind: str) -> None:
    layer, backend = base_layer(kind), backend_for(kind)
    stored = backend.to_layout(layer, backend.weight(layer))
    name = "in_proj_weight" if backend.host == "attention" else "weight"
    assert torch.equal(stored, getattr(layer, name))


LINEARS = [kind for kind in BACKENDS.names() if backend_for(kind).host == "linear"]


@pytest.mark.parametrize("kind", [kind for kind in LINEARS if not backend_for(kind).quantized])
def test_dense_tensors_give_the_output_of_the_layer(kind: str) -> None:
    layer, x = base_layer(kind, dtype=torch.float64), input_for(kind, torch.float64)
    dense = backend_for(kind).dense(layer)
    assert dense is not None
    close(nn.functional.linear(x, *dense), layer(x))


@pytest.mark.parametrize("kind", [kind for kind in LINEARS if backend_for(kind).quantized])
def test_a_quantized_layer_has_no_dense_tensors(kind: str) -> None:
    assert backend_for(kind).dense(base_layer(kind)) is None


def test_linear_subclass_with_a_forward_of_its_own_is_not_dense() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer = Doubled(3, 4)
    assert backend_of(layer).dense(layer) is None


def test_grouped_convolution_has_no_weight_to_hold_an_update() -> None:
    layer = nn.Conv2d(4, 8, 1, groups=2)
    with pytest.raises(BackendError, match=r"Conv2d with groups=2 has no weight .* need groups=1"):
        backend_of(layer).weight(layer)
    assert backend_of(layer).shape(layer) == (8, 4)


def test_attention_with_separate_projections_says_so() -> None:
    layer = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
    assert "kdim or vdim other than embed_dim it keeps three separate projections" in backend_of(layer).serves(layer)


def test_transposed_marks_stacks_of_experts_only() -> None:
    matrix = Experts(torch.randn(4, 6))
    matrix.is_transposed = True
    assert not backend_for("matrix parameter").is_transposed(matrix)
