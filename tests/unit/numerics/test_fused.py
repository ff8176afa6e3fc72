"""The fused path against the formula it stands for: outputs and every gradient, in every dtype and transformation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, get_peft_model
from lorafa.numerics.fused import low_rank_linear
from lorafa.numerics.masks import draw_seed, dropout_probability, keep_mask

IN, OUT, RANK, SCALING = 7, 5, 3, 1.7
NAMES = ("x", "weight", "bias", "gain", "A", "B")


def tensors(dtype: torch.dtype = torch.float64, rows: tuple[int, ...] = (6,)) -> dict[str, Tensor]:
    shapes = {"x": (*rows, IN), "weight": (OUT, IN), "bias": (OUT,), "gain": (OUT,), "A": (RANK, IN), "B": (OUT, RANK)}
    return {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def fused(t: dict[str, Tensor], dropout: float = 0.0) -> Tensor:
    rest = {name: t.get(name) for name in ("weight", "bias", "gain")}
    return low_rank_linear(t["x"], t["A"], t["B"], SCALING, dropout=dropout, **rest)


def formula(t: dict[str, Tensor], mask: Tensor | None = None) -> Tensor:
    """gain * (x W^T + s (mask * x) A^T B^T) + bias in plain operations; the mask holds 0 and 1 / (1 - p)."""
    x = t["x"]
    y = SCALING * ((x if mask is None else x * mask) @ t["A"].T) @ t["B"].T
    y = y + x @ t["weight"].T if t.get("weight") is not None else y
    y = y * t["gain"] if t.get("gain") is not None else y
    return y + t["bias"] if t.get("bias") is not None else y


def with_grad(t: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    return {name: value.detach().clone().requires_grad_(name in names) for name, value in t.items()}


def gradients(output: Tensor, t: dict[str, Tensor]) -> dict[str, Tensor]:
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(output)
    (output * probe).sum().backward()
    return {name: value.grad for name, value in t.items() if value.requires_grad}


def assert_equal_to(
    run: Callable[[dict[str, Tensor]], Tensor], expected: Callable[[dict[str, Tensor]], Tensor], t: dict[str, Tensor],
    needed: Iterable[str], tolerance: float = 1e-10,
) -> None:  # fmt: skip
    ours, plain = with_grad(t, needed), with_grad(t, needed)
    y, wanted = run(ours), expected(plain)
    torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)
    assert y.requires_grad is bool(set(needed))
    if not y.requires_grad:
        return
    found, right = gradients(y, ours), gradients(wanted, plain)
    assert found.keys() == right.keys() == set(needed)
    for name in right:
        torch.testing.assert_close(found[name], right[name], rtol=tolerance, atol=tolerance, msg=name)


SUBSETS = [set(c) for n in range(len(NAMES) + 1) for c in itertools.combinations(NAMES, n)]


def test_outputs_and_gradients_are_plain_autograds_for_every_set_of_trained_tensors() -> None:
    for needed in SUBSETS:
        assert_equal_to(fused, formula, tensors(), needed)


@pytest.mark.parametrize(
    "given", [set(c) for n in range(4) for c in itertools.combinations(("weight", "bias", "gain"), n)]
)
def test_weight_bias_and_gain_may_each_be_missing(given: set[str]) -> None:
    t = {name: value for name, value in tensors().items() if name in {*given, "x", "A", "B"}}
    for needed in ({"x", "A", "B"}, {"A", "B"}, {"B"}, {"x"}, set(t)):
        assert_equal_to(fused, formula, t, needed)


def test_gradcheck_passes_for_every_set_of_trained_tensors() -> None:
    """Numerical derivatives, independent of the formula above."""
    t = tensors(rows=(2,))
    for needed in SUBSETS[1:]:
        inputs = with_grad(t, needed)
        names = sorted(needed)

        def of(*values: Tensor, names: list[str] = names, inputs: dict[str, Tensor] = inputs) -> Tensor:
            return fused(inputs | dict(zip(names, values, strict=True)))

        assert torch.autograd.gradcheck(of, tuple(inputs[name] for name in names), fast_mode=True)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 3), (0,), (2, 0), (0, 3, 2)])
def test_inputs_of_any_number_of_dimensions_empty_ones_too(shape: tuple[int, ...]) -> None:
    assert_equal_to(fused, formula, tensors(rows=shape), NAMES)
    assert_equal_to(fused, formula, tensors(rows=shape), {"A", "B"})


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, 1),
    "permuted": lambda x: x.permute(2, 1, 0)[..., :3].repeat(1, 1, 3)[..., :IN],
    "sliced rows": lambda x: x[1:],
    "sliced features": lambda x: torch.cat([x, x], -1)[..., 2 : 2 + IN],
    "every second": lambda x: torch.cat([x, x], -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(4, *x.shape[1:]),
    "expanded features": lambda x: x[..., :1].expand(*x.shape[:-1], IN),
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("view", VIEWS)
def test_inputs_that_are_not_contiguous(view: str, dropout: float) -> None:
    t = tensors(rows=(4, 6))
    shape = VIEWS[view](t["x"]).shape
    mask = explicit_mask(shape, dropout, seed=11) if dropout else None

    def run(values: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(11)
        return fused(values | {"x": VIEWS[view](values["x"])}, dropout)

    def expected(values: dict[str, Tensor]) -> Tensor:
        return formula(values | {"x": VIEWS[view](values["x"])}, mask)

    assert_equal_to(run, expected, t, NAMES)


def test_weight_and_factors_that_are_not_contiguous() -> None:
    t = tensors()

    def turned(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return values | {name: values[name].T.contiguous().T for name in ("weight", "A", "B")}

    assert_equal_to(lambda v: fused(turned(v)), formula, t, NAMES)


# ---- dropout


def explicit_mask(shape: tuple[int, ...], p: float, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The mask low_rank_linear draws after manual_seed(seed): 0 or 1 / (1 - p)."""
    torch.manual_seed(seed)
    rows = torch.Size(shape[:-1]).numel()
    keep = keep_mask(rows, shape[-1], p, draw_seed(), torch.device("cpu")) != 0
    return keep.view(shape).to(dtype) / (1 - dropout_probability(p))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_is_the_formula_with_an_explicit_mask_in_forward_and_backward(p: float) -> None:
    mask = explicit_mask((6, IN), p, seed=6)
    assert 0 < (mask == 0).sum() < mask.numel()

    def run(values: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(6)
        return fused(values, p)

    for needed in SUBSETS:
        assert_equal_to(run, lambda values: formula(values, mask), tensors(), needed)


def test_manual_seed_reproduces_dropout_and_calls_differ_without_it() -> None:
    t = tensors()
    outputs = []
    for seed in (8, 8, None):
        if seed is not None:
            torch.manual_seed(seed)
        outputs.append(fused(t, 0.5))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_without_dropout_the_random_state_is_left_alone() -> None:
    t, before = tensors(), torch.get_rng_state()
    fused(t)
    assert torch.equal(torch.get_rng_state(), before)


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_float32_factors_on_any_input_give_gradients_in_their_own_dtypes(dtype: torch.dtype, dropout: float) -> None:
    """Against float64 with the same mask: the error is the rounding of the input's dtype."""
    t = tensors(dtype) | {name: value.float() for name, value in tensors().items() if name in ("A", "B", "gain")}
    ours = with_grad(t, NAMES)
    torch.manual_seed(2)
    y = fused(ours, dropout)
    assert y.dtype is dtype
    mask = explicit_mask((6, IN), dropout, seed=2) if dropout else None
    exact = with_grad({name: value.double() for name, value in t.items()}, NAMES)
    wanted = formula(exact, mask)
    precision = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=40 * precision)
    found, right = gradients(y, ours), gradients(wanted, exact)
    for name in NAMES:
        assert found[name].dtype is t[name].dtype, name
        assert (found[name].double() - right[name]).norm() < 8 * precision * right[name].norm(), name


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_computes_in_its_dtype_as_plain_operations_do(model_dtype: torch.dtype) -> None:
    t = tensors(model_dtype, rows=(64,)) | {n: v.float() for n, v in tensors().items() if n in ("A", "B")}
    del t["gain"]
    ours, plain = with_grad(t, t), with_grad(t, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fused(ours)
        base = nn.functional.linear(plain["x"], plain["weight"], plain["bias"])
        wanted = base + nn.functional.linear(nn.functional.linear(plain["x"], plain["A"]), plain["B"]) * SCALING
    assert y.dtype is wanted.dtype is torch.bfloat16
    torch.testing.assert_close(y, wanted, rtol=3e-2, atol=6e-2)
    found, right = gradients(y, ours), gradients(wanted, plain)
    for name in t:
        assert found[name].dtype is t[name].dtype
        assert (found[name] - right[name]).float().norm() < 0.02 * right[name].float().norm(), name


def test_autocast_leaves_float64_alone() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused(tensors()).dtype is torch.float64


def test_backward_outside_autocast_uses_the_dtype_of_forward() -> None:
    t = with_grad(tensors(torch.float32), {"x", "A", "B"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fused(t)
    gradients(y, t)
    assert all(t[name].grad.dtype is torch.float32 for name in ("x", "A", "B"))


# ---- torch's transformations


def test_second_derivative_raises_instead_of_being_wrong() -> None:
    t = with_grad(tensors(), {"x", "A", "B"})
    (grad,) = torch.autograd.grad(fused(t).square().sum(), t["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_torch_func_differentiates_the_same_formula() -> None:
    t = tensors()
    probe = torch.randn(6, OUT, dtype=torch.float64)

    def loss(A: Tensor, B: Tensor) -> Tensor:
        return (fused(t | {"A": A, "B": B}) * probe).sum()

    def plain(A: Tensor, B: Tensor) -> Tensor:
        return (formula(t | {"A": A, "B": B}) * probe).sum()

    factors = t["A"], t["B"]
    for transform in (
        lambda f: torch.func.grad(f, argnums=(0, 1))(*factors),
        lambda f: torch.func.jvp(f, factors, (torch.ones_like(factors[0]), torch.ones_like(factors[1]))),
        lambda f: torch.func.hessian(f, argnums=0)(*factors),
        lambda f: torch.func.vmap(torch.func.grad(f))(torch.stack([factors[0]] * 3), torch.stack([factors[1]] * 3)),
    ):
        for found, wanted in zip(transform(loss), transform(plain), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_per_sample_gradients_sum_to_the_gradient() -> None:
    t = tensors()

    def loss(A: Tensor, x: Tensor) -> Tensor:
        return fused(t | {"A": A, "x": x}).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(t["A"], t["x"])
    ours = with_grad(t, {"A"})
    fused(ours).square().sum().backward()
    torch.testing.assert_close(per_sample.sum(0), ours["A"].grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_recomputes_with_the_same_mask(reentrant: bool) -> None:
    t = with_grad(tensors(), {"x", "A", "B"})
    torch.manual_seed(3)
    direct = gradients(fused(t, 0.5), t)
    again = with_grad(tensors_like(t), {"x", "A", "B"})
    torch.manual_seed(3)
    y = torch.utils.checkpoint.checkpoint(lambda x: fused(again | {"x": x}, 0.5), again["x"], use_reentrant=reentrant)
    torch.rand(3)  # the random state moves on between forward and backward
    found = gradients(y, again)
    for name in direct:
        assert torch.equal(found[name], direct[name]), name


def tensors_like(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in t.items()}


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_compiled_dropout_is_a_mask_of_torchs_own_with_the_law_of_ours(p: float) -> None:
    """With A and B of ones on the diagonal the change itself shows the mask, 0 or 1 / (1 - p)."""
    rows = 4000
    eye, x = torch.eye(IN, dtype=torch.float64), torch.randn(rows, IN, dtype=torch.float64)
    t = with_grad({"x": x, "A": eye, "B": eye}, {"x", "A", "B"})
    compiled = torch.compile(lambda values: fused(values, p), backend="aot_eager", fullgraph=True)
    masks = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        y = compiled(t)
        mask = (y / (SCALING * x)).detach()
        kept = mask != 0
        torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - p)), rtol=1e-10, atol=0)
        deviation = (p * (1 - p) / kept.numel()) ** 0.5
        assert abs(float(kept.double().mean()) - (1 - p)) < 4 * deviation
        assert (kept.double().mean(0) - (1 - p)).abs().max() < 4 * deviation * IN**0.5, "every column alike"
        found = gradients(y, t)
        again = with_grad(tensors_like(t), {"x", "A", "B"})
        wanted = gradients(formula(again | {"weight": None}, mask), again)
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-10)
        masks.append(kept)
        for tensor in t.values():
            tensor.grad = None
    differing = 2 * p * (1 - p)  # of two masks that know nothing of each other
    assert abs(float((masks[0] != masks[1]).double().mean()) - differing) < 0.02


def test_compiles_without_a_graph_break() -> None:
    t = with_grad(tensors(), {"x", "A", "B"})
    found = gradients(torch.compile(fused, backend="aot_eager", fullgraph=True)(t), t)
    again = with_grad(tensors_like(t), {"x", "A", "B"})
    wanted = gradients(fused(again), again)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-10)


def test_input_of_another_dtype_than_the_weight_is_refused_as_by_the_base_layer() -> None:
    layer = get_peft_model(nn.Sequential(nn.Linear(8, 8)).bfloat16(), LoraConfig(target_modules=["0"], r=2))
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(torch.randn(2, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 8)).dtype is torch.bfloat16


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (8,)])
@pytest.mark.parametrize("gain", [True, False])
def test_output_can_be_changed_in_place(shape: tuple[int, ...], gain: bool) -> None:
    """As by nn.ReLU(inplace=True) after a layer."""
    weight, A, B, bias, factor = (
        torch.randn(*size, dtype=torch.float64) for size in ((6, 8), (2, 8), (6, 2), (6,), (6,))
    )
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    tensors = [tensor.requires_grad_() for tensor in (A, B)]
    y = low_rank_linear(x, A, B, 0.5, weight=weight, bias=bias, gain=factor if gain else None)
    found = torch.autograd.grad(torch.relu_(y).square().sum(), [x, *tensors])
    plain = (x @ weight.T + 0.5 * x @ A.T @ B.T) * (factor if gain else 1) + bias
    expected = torch.autograd.grad(torch.relu(plain).square().sum(), [x, *tensors])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


# ---- inference on few rows, as in generation


def mixed(dtype: torch.dtype, factors: torch.dtype, rows: tuple[int, ...]) -> dict[str, Tensor]:
    return tensors(dtype, rows) | {name: tensors(factors)[name] for name in ("A", "B")}


@pytest.mark.parametrize("rows", [(1,), (RANK,), (RANK + 1,), (RANK, 1), (0,), ()], ids=str)
@pytest.mark.parametrize("given", [c for n in range(4) for c in itertools.combinations(NAMES[1:4], n)], ids=" ".join)
def test_inference_is_the_formula_for_any_number_of_rows(rows: tuple[int, ...], given: tuple[str, ...]) -> None:
    every = mixed(torch.float32, torch.float64, rows)
    t = {name: value for name, value in every.items() if name in {*given, "x", "A", "B"}}
    before = {name: value.clone() for name, value in t.items()}
    with torch.no_grad():
        y = fused(t)
    assert y.shape == (*rows, OUT)
    expected = formula({name: value.double() for name, value in t.items()})
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for name, value in t.items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("factors", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_inference_on_one_row_is_rounded_as_rarely_as_on_many(dtype: torch.dtype, factors: torch.dtype) -> None:
    """The rows may take on the factors' dtype for it, but the result has the dtype of x."""
    t = mixed(dtype, factors, (1,))
    exact = formula({name: value.double() for name, value in t.items()})
    y = fused(t)
    assert y.dtype is dtype
    many = fused({**t, "x": t["x"].expand(RANK + 1, IN)})[:1]
    size = float(exact.abs().max())
    error, as_many = (float((one.double() - exact).abs().max()) / size for one in (y, many))
    assert error <= as_many + 4 * torch.finfo(dtype).eps


def test_factors_of_the_models_dtype_give_the_same_bits_with_and_without_gradients() -> None:
    t = tensors(torch.float32, (1,))
    with torch.no_grad():
        without = fused(t)
    assert torch.equal(fused(with_grad(t, {"A", "B"})), without)


@torch.no_grad()
def test_an_update_of_zero_leaves_the_bits_of_the_base_on_few_rows_too() -> None:
    t = mixed(torch.bfloat16, torch.float32, (2,))
    A, B = torch.cat([t["A"], torch.zeros_like(t["A"])]), torch.cat([torch.zeros_like(t["B"]), t["B"]], dim=1)
    expected = nn.functional.linear(t["x"], t["weight"], t["bias"])
    assert torch.equal(low_rank_linear(t["x"], A, B, SCALING, weight=t["weight"], bias=t["bias"]), expected)
