"""Code that runs without numbers takes its own way, and what it would have allocated is known exactly."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, get_peft_model
from lorafa.costs.accounting import put_on
from lorafa.costs.untouched import Block, Untouched, most_alive, without_numbers
from lorafa.models.head_loss import supervised_loss
from toys.language_models import llama

ROWS, TOKENS = 2, 24


def test_the_blocks_of_a_few_operations_are_those_of_their_tensors() -> None:
    with Untouched() as state:
        a = torch.empty(4, 8)  # 128 bytes
        b = a.exp()  # 128
        view = b.t()[2:]  # none
        b.add_(1)  # none
        c = view.contiguous()  # 96
        assert state.alive() == 352
        del b, view
        gc.collect()
        assert state.alive() == 224
        d = c @ a  # 192
        assert state.alive() == 416
    assert [block.size for block in state.blocks] == [128, 128, 96, d.nbytes]
    assert type(a) is Tensor
    assert a.device.type == "cpu"


def test_the_most_bytes_at_a_time_are_found() -> None:
    blocks = [Block(10, 1, 3), Block(20, 2, 2), Block(30, 4)]
    assert most_alive(blocks) == (30, 2)
    assert most_alive([*blocks, Block(5, 4, 4)]) == (35, 4)


def test_questions_to_a_tensor_are_answered_and_chosen_positions_are_as_many_as_said() -> None:
    with Untouched() as state:
        state.chosen = 5
        numbers = torch.empty(3, 4)
        assert bool((numbers == 1).all())
        assert numbers.nonzero().shape == (5, 2)
        assert (numbers.sum().item(), torch.empty(1, dtype=torch.int64).item()) == (1.0, 1)


def test_an_output_shares_the_memory_of_the_input_it_is_a_part_of() -> None:
    with Untouched() as state:
        a = torch.empty(4, 6)
        assert a.relu_() is a or a.relu_().data_ptr() == a.data_ptr()
        assert torch.ops.aten._unsafe_view(a, [24]).data_ptr() == a.data_ptr()
    assert len(state.blocks) == 1


def test_an_operation_that_was_answered_before_makes_memory_of_its_own_again() -> None:
    with Untouched() as state:
        a = torch.empty(4, 8)
        first, second = a.exp(), a.exp()
        assert first.data_ptr() != second.data_ptr()
        assert a.t().contiguous().shape == (8, 4)  # the same sizes in another order
        assert a.t().exp().stride() == (1, 8)
        assert (a.to(torch.bfloat16).dtype, a.to(torch.float64).dtype) == (torch.bfloat16, torch.float64)
        # 1, 1.0 and True are equal and are not the same to an operation.
        whole = torch.empty(2, dtype=torch.int64)
        assert (whole.add(1).dtype, whole.add(1.0).dtype) == (torch.int64, torch.float32)
        assert (whole.mul(True).dtype, whole.mul(1).dtype) == (torch.int64, torch.int64)
        part = torch.ops.aten._unsafe_view(a[2:], [16])
        again = torch.ops.aten._unsafe_view(a[1:3], [16])
        assert (part.storage_offset(), again.storage_offset()) == (16, 8)
    assert state.blocks[1].size == state.blocks[2].size == 128


def step(model: nn.Module, **more: Any) -> None:
    ids = torch.zeros((ROWS, TOKENS), dtype=torch.int64)
    labels = torch.ones((ROWS, TOKENS), dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    supervised_loss(model, batch, num_items=1, **more).backward()  # type: ignore[no-untyped-call]


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of the operations that run, and the shapes they make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.made.append((str(func), tuple(out.shape)))
        return out


@pytest.mark.parametrize("settings", [{}, {"freeze_A": True}, {"lora_dropout": 0.1}, {"use_dora": True}])
def test_a_training_step_runs_the_operations_it_runs_with_numbers(settings: dict[str, Any]) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", **settings)
    model = get_peft_model(llama(), config).train()
    with Seen() as real:
        step(model)
    with torch.device("meta"):
        empty = llama().train()
    with put_on(empty, config), without_numbers(empty), Untouched() as state:
        state.chosen = ROWS * (TOKENS - 1)
        with Seen() as without:
            step(empty)
    assert without.made == real.made


def test_a_model_is_left_as_it_was() -> None:
    with torch.device("meta"):
        model = llama()
    before = dict([*model.named_parameters(), *model.named_buffers()])
    with without_numbers(model):
        assert all(tensor.device.type == "cpu" for tensor in [*model.parameters(), *model.buffers()])
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert all(after[name] is tensor for name, tensor in before.items())
    assert before.keys() == after.keys()
