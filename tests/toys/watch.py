"""What operations allocate, and what autograd keeps of them."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocated(TorchDispatchMode):
    """The tensors that operations returned; those of the meta device, which have no numbers, count for nothing."""

    nbytes = 0
    """Of all of them together."""
    largest = 0
    """Elements of the largest."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self.nbytes += tensor.nbytes
                self.largest = max(self.largest, tensor.numel())
        return result


class Alive(TorchDispatchMode):
    """The memory of tensors that operations made, as long as it is there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        """Bytes."""
        self.peak = 0
        """The most there were at a time."""
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in known | self._seen:
                    self._seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, storage: int, size: int) -> None:
        self._seen.discard(storage)
        self.now -= size


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


class Launches(TorchDispatchMode):
    """The operations that a device would run a kernel for: all but views, and memory that is only asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    @property
    def count(self) -> int:
        return sum(self.operations.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and func.overloadpacket.__name__ not in _NO_KERNEL:
            self.operations[str(func)] += 1
        return func(*args, **(kwargs or {}))


_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach"}
