"""Running a model for what it would allocate: every operation answers with memory that nobody touches.

A tensor made here is an ordinary one on the CPU, so that every line of code that asks for its type, its device or its
kernel goes the way it goes in a training. Its numbers are never computed, written or read: shapes come from PyTorch's
own rules (the meta device), and the system gives no page to memory that is not written to.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclass
class Block:
    """One piece of memory that a tensor had."""

    size: int
    """Bytes."""
    born: int
    """The number of the operation that made it."""
    died: int | None = None
    """The number of the last operation before it was given back; None while it is there."""


class Untouched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers every operation inside the block without computing it, and keeps what memory it would have taken.

    What the code asks a tensor for, as in ``if mask.all()``, is answered with True, 1 or 1.0. ``nonzero``, whose size
    is in the numbers, finds ``chosen`` positions.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.chosen = 1
        """How many positions ``nonzero`` finds."""
        self.blocks: list[Block] = []
        """In the order they were made."""
        self.operations = 0
        self._here: dict[int, Block] = {}
        self._known: dict[Any, tuple[list[Any], Any]] = {}
        """What operations on such shapes answered: a model's layers ask for the same again and again."""

    def alive(self) -> int:
        """Bytes that are taken now."""
        return sum(block.size for block in self._here.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operations += 1
        if func is torch.ops.aten._local_scalar_dense.default:
            return _answer(args[0].dtype)
        if func is torch.ops.aten.nonzero.default:
            return self._made(_Output((self.chosen, args[0].dim()), (1, self.chosen), torch.int64))
        if func.is_view:
            return func(*args, **kwargs)  # reads no number
        if func is torch.ops.aten.bmm.default:
            self._copied(args)
        inputs: list[Tensor] = []
        key = func, described(args, inputs), described(kwargs, inputs)
        if key not in self._known:
            self._known[key] = _outputs(func, args, kwargs)
        outputs, form = self._known[key]
        return tree_unflatten([self._real(each, inputs) for each in outputs], form)

    def _copied(self, operands: Sequence[Tensor]) -> None:
        """What the CPU's kernel of a batched product copies for its length: a matrix that is one for the whole batch,
        as the head's weight where a frozen model answers the last position of several rows."""
        for matrix in operands:
            if matrix.shape[0] > 1 and matrix.stride(0) == 0:
                self.blocks.append(Block(matrix.numel() * matrix.element_size(), self.operations, self.operations))

    def _real(self, output: Any, inputs: Sequence[Tensor]) -> Any:
        if not isinstance(output, _Output):
            return output
        if output.of is None:
            return self._made(output)
        value = inputs[output.of]
        if output.itself:
            return value
        return value.as_strided(output.shape, output.stride, value.storage_offset() + output.offset)

    def _made(self, output: _Output) -> Tensor:
        made = torch.empty_strided(output.shape, output.stride, dtype=output.dtype, device="cpu")
        storage = made.untyped_storage()
        block = Block(storage.nbytes(), self.operations)
        self.blocks.append(block)
        self._here[id(block)] = block
        weakref.finalize(storage, self._gone, block)
        return made

    def _gone(self, block: Block) -> None:
        block.died = self.operations
        del self._here[id(block)]


@dataclass(frozen=True)
class _Output:
    """A tensor that an operation answers with."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    of: int | None = None
    """Which input's memory it has; None: its own."""
    itself: bool = False
    """Whether it is that input, and no other view of its memory."""
    offset: int = 0
    """Where in that input's memory it begins."""


def described(value: Any, tensors: list[Tensor]) -> Any:
    """An argument as what an operation's shapes depend on: equal where the shapes are; the tensors in it are added to
    ``tensors``, in their order."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return Tensor, value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(described(each, tensors) for each in value)
    if isinstance(value, dict):
        return tuple((name, described(each, tensors)) for name, each in value.items())
    if isinstance(value, torch.Generator):
        return torch.Generator
    return type(value), value  # 1, 1.0 and True are equal, and are not the same to an operation


def _outputs(func: Any, args: Any, kwargs: Any) -> tuple[list[Any], Any]:
    """What an operation answers with by PyTorch's own rules of shapes, and the form that it comes in."""
    inputs: list[Tensor] = []

    def shape_of(value: Any) -> Any:
        if isinstance(value, torch.Generator):
            return None
        if not isinstance(value, Tensor):
            return value
        inputs.append(torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta"))
        return inputs[-1]

    flat, form = tree_flatten((args, kwargs))
    args, kwargs = tree_unflatten([shape_of(value) for value in flat], form)
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs["device"] = torch.device("meta")
    flat, form = tree_flatten(func(*args, **kwargs))
    memory = {each.untyped_storage()._cdata: number for number, each in enumerate(inputs)}

    def noted(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        of = memory.get(value.untyped_storage()._cdata)
        itself = of is not None and value is inputs[of]
        return _Output(tuple(value.shape), value.stride(), value.dtype, of, itself, int(value.storage_offset()))

    return [noted(value) for value in flat], form


def _answer(dtype: torch.dtype) -> bool | int | float:
    if dtype is torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


@contextmanager
def without_numbers(module: nn.Module) -> Iterator[None]:
    """Parameters and buffers of a model on the meta device as tensors on the CPU whose memory nobody touches."""
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    made: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:  # a shared weight stays shared
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            of_model = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if of_model else empty
        return made[id(tensor)]

    try:
        for each in module.modules():
            held: list[dict[str, Any]] = [each._parameters, each._buffers]
            for tensors in held:
                for name, tensor in tensors.items():
                    if tensor is not None:
                        before.append((tensors, name, tensor))
                        tensors[name] = stand_in(tensor)
        yield
    finally:
        for tensors, name, tensor in before:
            tensors[name] = tensor


def most_alive(blocks: Sequence[Block]) -> tuple[int, int]:
    """The most bytes that were taken at a time, and by which operation."""
    changes: dict[int, int] = {}
    for block in blocks:
        changes[block.born] = changes.get(block.born, 0) + block.size
        if block.died is not None:
            changes[block.died + 1] = changes.get(block.died + 1, 0) - block.size
    most = at = alive = 0
    for operation in sorted(changes):
        alive += changes[operation]
        if alive > most:
            most, at = alive, operation
    return most, at
