"""What VeLoRA promises (arXiv:2405.17991): claims about numbers, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorafa import PeftModel
from lorafa.errors import ConfigError
from toys.adapters import only_layer
from toys.compare import close
from toys.formulas import IN, OUT, gradients, inputs, kept_for_backward, learns_the_same_again, on_linear

VECTORS = ("batch_average", "batch_average_once", "random")


def velora(groups: int = 6, **settings: Any) -> dict[str, Any]:
    return {"velora_config": {"num_groups": groups} | settings}


def vector_of(model: PeftModel) -> Tensor:
    return only_layer(model).adapters["default"].extra("vector")


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("init_type", VECTORS)
def test_velora_computes_lora_and_its_gradients_but_for_that_of_A(init_type: str, use_dora: bool) -> None:
    plain, ours = on_linear(use_dora=use_dora), on_linear(use_dora=use_dora, **velora(init_type=init_type, scale=0.5))
    x, probe = inputs(7, 5).requires_grad_(), torch.randn(7, 5, OUT, dtype=torch.float64)
    close(ours(x), plain(x))
    expected, of_x = gradients(plain, x, probe), x.grad
    x.grad = None
    found = gradients(ours, x, probe)
    close(x.grad, of_x)  # type: ignore[arg-type]
    for name, grad in found.items():
        if "lora_A" not in name:
            close(grad, expected[name])
        else:
            assert (grad - expected[name]).abs().max() > 0.1


@pytest.mark.parametrize("groups", [5, 6, 23])
def test_the_gradient_of_A_is_that_of_inputs_projected_on_the_vector_group_by_group(groups: int) -> None:
    """Equations 3 and 4: x_g -> s (x_g v) v, with zeros after the last input where groups are not full."""
    model, x, probe = on_linear(**velora(groups, scale=0.7)), inputs(8), torch.randn(8, OUT, dtype=torch.float64)
    found = gradients(model, x, probe)
    size = -(-IN // groups)
    padded = torch.cat([x, torch.zeros(8, -IN % size, dtype=torch.float64)], 1).unflatten(1, (-1, size))
    v = vector_of(model)
    mean = padded.flatten(0, 1).mean(0)
    close(v, mean / mean.norm())
    projected = (0.7 * (padded @ v)[..., None] * v).flatten(1)[:, :IN]
    B = only_layer(model).lora_B["default"].weight
    (of_A,) = (grad for name, grad in found.items() if "lora_A" in name)
    close(of_A, 1.5 * (probe @ B).T @ projected)


def test_inputs_whose_groups_lie_along_the_vector_lose_nothing() -> None:
    v = torch.randn(4, dtype=torch.float64)
    x = (inputs(8)[:, :6, None].abs() * v).flatten(1)
    plain, ours = on_linear(), on_linear(**velora())
    probe = torch.randn(8, OUT, dtype=torch.float64)
    expected, found = gradients(plain, x, probe), gradients(ours, x, probe)
    for name, grad in found.items():
        close(grad, expected[name])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_velora_keeps_one_number_a_group_for_backward(dtype: torch.dtype, dropout: float) -> None:
    x = inputs(100, dtype=dtype)
    settings = {"lora_dropout": dropout}
    plain = kept_for_backward(on_linear(dtype, **settings), x)
    ours = kept_for_backward(on_linear(dtype, **settings, **velora()), x)
    saved = 100 * (IN - 6) * dtype.itemsize
    assert saved - 8 * IN // 6 <= plain - ours <= saved


def test_velora_takes_its_vector_from_each_batch_from_the_first_or_from_none() -> None:
    for init_type, moves in zip(VECTORS, (True, False, False), strict=True):
        model = on_linear(**velora(init_type=init_type))
        at_start = vector_of(model).clone()
        assert bool(at_start.any()) == (init_type == "random")
        seen = []
        for number in range(2):
            model(inputs(4) + number)
            seen.append(vector_of(model).clone())
            close(seen[-1].norm(), torch.ones(()), torch.float32)
        assert torch.equal(seen[0], seen[1]) is not moves
        model.eval()(inputs(4) + 5)
        assert torch.equal(vector_of(model), seen[-1]), "only training takes it"
        if init_type == "random":
            assert torch.equal(at_start, seen[0])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("start", [True, "pissa"])
def test_every_way_of_a_forward_pass_in_training_compresses(use_dora: bool, dropout: float, start: bool | str) -> None:
    model = on_linear(use_dora=use_dora, lora_dropout=dropout, init_lora_weights=start, **velora())
    model(inputs(4))
    assert vector_of(model).any(), "the vector of the batch was taken"


def test_a_batch_keeps_its_own_vector_until_its_backward() -> None:
    model, probe = on_linear(**velora()), torch.randn(8, OUT, dtype=torch.float64)
    alone = gradients(model, inputs(8), probe)
    model.zero_grad()
    loss = (model(inputs(8)) * probe).sum()
    model(inputs(8) + 1)
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in alone:
            close(parameter.grad, alone[name])


@pytest.mark.parametrize("reentrant", [False, True])
def test_velora_run_again_in_backward_learns_the_same(reentrant: bool) -> None:
    learns_the_same_again(on_linear(lora_dropout=0.3, **velora()), reentrant)


@pytest.mark.parametrize("init_type", VECTORS)
def test_velora_compiled_learns_from_what_it_would_keep(init_type: str) -> None:
    x, probe = inputs(8), torch.randn(8, OUT, dtype=torch.float64)
    expected = gradients(on_linear(**velora(init_type=init_type)), x, probe)
    model = on_linear(**velora(init_type=init_type))
    compiled = torch.compile(model, backend="aot_eager")
    close(compiled(x), model(x))
    model.zero_grad()
    (compiled(x) * probe).sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            close(parameter.grad, expected[name])


def test_velora_in_eval_mode_learns_exactly_and_refuses_what_would_compress_nothing() -> None:
    x, probe = inputs(8), torch.randn(8, OUT, dtype=torch.float64)
    expected, found = (gradients(model.eval(), x, probe) for model in (on_linear(), on_linear(**velora())))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ConfigError, match=r"layer: velora_config.num_groups=24 cuts its 24 inputs into groups of one"):
        on_linear(**velora(24))
    with pytest.raises(ConfigError, match="freeze_A=True freezes A, and velora_config works by the gradient of A"):
        on_linear(**velora(), freeze_A=True)
