"""The fused path against the formula it stands for: outputs, every gradient, what it keeps, what it draws."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lorafa import LoraConfig, get_peft_model
from lorafa.functional import apply_mask, draw_seed, dropout_probability, keep_mask, low_rank_linear

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
    t = {name: value for name, value in tensors().items() if name in given | {"x", "A", "B"}}
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
    size = torch.Size((torch.Size(shape[:-1]).numel(), shape[-1]))
    keep = keep_mask(size, p, draw_seed(), torch.device("cpu")) != 0
    return keep.view(shape).to(dtype) / (1 - dropout_probability(p))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_is_the_formula_with_an_explicit_mask_in_forward_and_backward(p: float) -> None:
    mask = explicit_mask((6, IN), p, seed=4)
    assert 0 < (mask == 0).sum() < mask.numel()

    def run(values: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(4)
        return fused(values, p)

    for needed in SUBSETS:
        assert_equal_to(run, lambda values: formula(values, mask), tensors(), needed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_masked_values_are_exact_in_every_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(33, 17).to(dtype)
    x[0, :5] = torch.tensor([0.0, -0.0, float("inf"), -1.0, 65504.0]).to(dtype)
    mask = keep_mask(x.shape, 0.5, 3, x.device)
    assert set(mask.unique().tolist()) == {-1, 0}
    assert torch.equal(apply_mask(x, mask), torch.where(mask != 0, x, torch.zeros_like(x)))


def test_mask_is_the_same_each_time_it_is_drawn_and_changes_with_the_seed() -> None:
    shape, cpu = torch.Size((40, 25)), torch.device("cpu")
    assert torch.equal(keep_mask(shape, 0.3, 12345, cpu), keep_mask(shape, 0.3, 12345, cpu))
    other = keep_mask(shape, 0.3, 12346, cpu) != 0
    agree = ((keep_mask(shape, 0.3, 12345, cpu) != 0) == other).float().mean()
    assert abs(agree - (0.7**2 + 0.3**2)) < 5 * (0.58 * 0.42 / 1000) ** 0.5


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 1023])
def test_mask_of_any_size_is_the_beginning_of_a_longer_one(count: int) -> None:
    cpu = torch.device("cpu")
    long = keep_mask(torch.Size((2048,)), 0.4, 9, cpu)
    assert torch.equal(keep_mask(torch.Size((count,)), 0.4, 9, cpu), long[:count])


@pytest.mark.parametrize("p", [0.0001, 0.05, 0.25, 0.5, 0.9, 0.9999])
def test_share_of_dropped_elements_is_the_probability(p: float) -> None:
    n = 2_000_000
    dropped = (keep_mask(torch.Size((n,)), p, 77, torch.device("cpu")) == 0).double().mean().item()
    used = dropout_probability(p)
    assert abs(used - p) <= 2**-16 + 1e-12
    assert abs(dropped - used) < 5 * (used * (1 - used) / n) ** 0.5


@pytest.mark.parametrize("p", [1e-9, 1 - 1e-9])
def test_probability_is_never_rounded_to_never_or_always(p: float) -> None:
    assert 0 < dropout_probability(p) < 1


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 123456789])
def test_elements_of_a_mask_are_independent(seed: int) -> None:
    """Correlation of the mask with itself shifted: of order 1/sqrt(n) at every lag, lanes of one word included."""
    n, p = 1_000_000, 0.3
    dropped = (keep_mask(torch.Size((n,)), p, seed, torch.device("cpu")) == 0).double() - dropout_probability(p)
    variance = p * (1 - p)
    for lag in (1, 2, 3, 4, 5, 7, 8, 16, 64, 576, 1000, 4096):
        correlation = (dropped[lag:] * dropped[:-lag]).mean().item() / variance
        assert abs(correlation) < 5 / (n - lag) ** 0.5, lag


def test_groups_of_eight_elements_take_every_pattern_equally_often() -> None:
    """Chi-square over the 256 patterns of neighbours at p = 1/2: 255 +- 5 sqrt(2 * 255)."""
    n = 1_600_000
    bits = (keep_mask(torch.Size((n,)), 0.5, 5, torch.device("cpu")) != 0).long().view(-1, 8)
    counts = torch.bincount((bits * 2 ** torch.arange(8)).sum(1), minlength=256).double()
    expected = n / 8 / 256
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5


def test_masks_of_neighbouring_seeds_are_not_shifts_of_each_other() -> None:
    n, cpu = 20_000, torch.device("cpu")
    first = (keep_mask(torch.Size((n,)), 0.5, 1, cpu) != 0).double() - 0.5
    second = (keep_mask(torch.Size((n,)), 0.5, 2, cpu) != 0).double() - 0.5
    for lag in range(-40, 41):
        moved = second.roll(lag)
        assert abs((first * moved).mean().item() / 0.25) < 5 / n**0.5


def test_manual_seed_reproduces_dropout_and_calls_differ_without_it() -> None:
    t = tensors()
    outputs = []
    for seed in (8, 8, None):
        if seed is not None:
            torch.manual_seed(seed)
        outputs.append(fused(t, 0.5))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_seeds_cover_the_range_and_do_not_repeat() -> None:
    seeds = {draw_seed() for _ in range(1000)}
    assert len(seeds) == 1000
    assert max(seeds) > 2**62


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


# ---- what is kept for backward


class Kept:
    """Distinct storages saved for backward, leaves (parameters) left out: address -> (bytes, dtype)."""

    def __init__(self, *known: Tensor | None) -> None:
        self.known = {t.untyped_storage().data_ptr() for t in known if t is not None}
        self.storages: dict[int, tuple[int, torch.dtype]] = {}
        self._alive: list[Tensor] = []
        self._hooks = saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self._alive.append(tensor)  # so that no address is used twice
            self.storages[storage.data_ptr()] = (storage.nbytes(), tensor.dtype)
        return tensor

    def __enter__(self) -> Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        self._hooks.__exit__(*args)

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.storages.values())


T, WIDE, R = 64, 96, 4


def layer(dtype: torch.dtype, *, train_A: bool = True) -> dict[str, Tensor]:
    factors = torch.float32
    return {
        "weight": torch.randn(WIDE, WIDE).to(dtype),
        "bias": torch.randn(WIDE).to(dtype),
        "A": torch.randn(R, WIDE, dtype=factors).requires_grad_(train_A),
        "B": torch.randn(WIDE, R, dtype=factors).requires_grad_(),
    }


def call(x: Tensor, t: dict[str, Tensor], dropout: float = 0.0, **more: Tensor) -> Tensor:
    return low_rank_linear(x, t["A"], t["B"], 2.0, weight=t["weight"], bias=t["bias"], dropout=dropout, **more)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kept_are_x_itself_and_the_low_rank_product(dtype: torch.dtype, dropout: float) -> None:
    """No copy of x in another dtype, no dropped copy, no mask."""
    t, x = layer(dtype), torch.randn(T, WIDE).to(dtype).requires_grad_()
    with Kept(*t.values()) as kept:
        call(x, t, dropout)
    assert x.untyped_storage().data_ptr() in kept.storages
    assert kept.bytes == (T * WIDE + T * R) * dtype.itemsize
    assert {kind for _, kind in kept.storages.values()} == {dtype}


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_x_is_not_kept_when_A_is_frozen(dtype: torch.dtype, dropout: float) -> None:
    t, x = layer(dtype, train_A=False), torch.randn(T, WIDE).to(dtype).requires_grad_()
    with Kept(*t.values()) as kept:
        call(x, t, dropout)
    assert kept.bytes == T * R * dtype.itemsize


def test_nothing_but_the_low_rank_product_is_kept_when_only_B_trains_and_nothing_when_nothing_does() -> None:
    t, x = layer(torch.float32, train_A=False), torch.randn(T, WIDE)
    with Kept(*t.values()) as kept:
        call(x, t)
    assert kept.bytes == T * R * 4
    t["B"].requires_grad_(False)
    with Kept(*t.values()) as kept:
        call(x, t)
        call(x.requires_grad_(), t)
    assert kept.bytes == 0


def test_query_key_and_value_keep_the_x_they_share_once() -> None:
    x = torch.randn(2, T // 2, WIDE, dtype=torch.bfloat16).requires_grad_()
    layers = [layer(torch.bfloat16) for _ in range(3)]
    with Kept(*(value for t in layers for value in t.values())) as kept:
        for t in layers:
            call(x, t, 0.05)
    assert kept.bytes == (T * WIDE + 3 * T * R) * 2


def test_gain_keeps_one_output_more_and_only_if_it_trains() -> None:
    t, x = layer(torch.bfloat16), torch.randn(T, WIDE).bfloat16().requires_grad_()
    for trained in (True, False):
        gain = torch.randn(WIDE).requires_grad_(trained)
        with Kept(*t.values(), gain) as kept:
            call(x, t, gain=gain)
        assert kept.bytes == (T * WIDE * (2 if trained else 1) + T * R) * 2


def test_autocast_keeps_x_once_as_it_came() -> None:
    t, x = layer(torch.float32), torch.randn(T, WIDE).requires_grad_()
    with Kept(*t.values()) as kept, torch.autocast("cpu", dtype=torch.bfloat16):
        call(x, t, 0.05)
    assert kept.bytes == T * WIDE * 4 + T * R * 2


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


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiles_without_a_graph_break(dropout: float) -> None:
    t = with_grad(tensors(), {"x", "A", "B"})
    compiled = torch.compile(lambda values: fused(values, dropout), backend="aot_eager", fullgraph=True)
    y = compiled(t)
    if dropout:  # the mask is torch's own there: only its law can be compared
        assert torch.isfinite(y).all()
        return
    found = gradients(y, t)
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
