"""Where the dropout of one layer in one call comes from. It is drawn again in backward, so that no mask is kept.

"tables" make their masks of a seed by a few cheap operations, which is the fastest on a CPU. "generator" is torch's own
dropout, one kernel that draws and applies the mask, and is run again from the state the generator had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, Protocol

import torch
from torch import Tensor

from lorafa.errors import ConfigError
from lorafa.numerics.masks import draw_seed, drop_, dropout_probability, dropped_into, keep_mask

Source = Literal["generator", "tables"]


class Dropping(Protocol):
    """Dropout on the rows (rows, in) of one layer in one call."""

    scale: float
    """What an element that :meth:`into` has kept is still to be multiplied by."""

    def into(self, x: Tensor) -> Tensor:
        """A new tensor: x, (rows, in), with zeros where it is dropped. Called once, before :meth:`again`."""

    def again(self, x: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What :meth:`into` has given for x, and its gradient, given that of its result, which may be changed.

        Args:
            x: (rows, in), or None where nothing is wanted of it.
            grad: (rows, in), without ``scale``, or None.
        """


class _Tables:
    def __init__(self, p: float, device: torch.device) -> None:
        self._p, self._seed = p, draw_seed()
        self.scale = 1 / (1 - dropout_probability(p))

    def into(self, x: Tensor) -> Tensor:
        return dropped_into(self._mask(x), x)

    def again(self, x: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        like = grad if x is None else x
        if like is None:
            return None, None
        mask = self._mask(like)
        if grad is not None:
            drop_(grad, mask)
        return None if x is None else dropped_into(mask, x), grad  # last: it takes the memory of the mask

    def _mask(self, x: Tensor) -> Tensor:
        return keep_mask(x.shape[0], x.shape[1], self._p, self._seed, x.device)


class _Generator:
    scale = 1.0

    def __init__(self, p: float, device: torch.device) -> None:
        self._p, self._device = p, device
        self._state = _get_state(device)

    def into(self, x: Tensor) -> Tensor:
        return torch.native_dropout(_aligned(x), self._p, True)[0]

    def again(self, x: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        before = _get_state(self._device)
        _set_state(self._state, self._device)
        try:
            if x is None:
                return None, None if grad is None else torch.native_dropout(_aligned(grad), self._p, True)[0]
            dropped, mask = torch.native_dropout(_aligned(x), self._p, True)
        finally:
            _set_state(before, self._device)
        if grad is not None:
            grad = torch.ops.aten.native_dropout_backward(grad, mask, 1 / (1 - self._p))
        return dropped, grad


def _aligned(x: Tensor) -> Tensor:
    """x where a kernel reads it as it reads memory of its own, many elements at a time: else other ones are dropped."""
    x = x.contiguous()
    return x.clone() if x.storage_offset() * x.element_size() % 16 else x


def _get_state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)  # type: ignore[no-any-return]


def _set_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


_SOURCES: Mapping[Source, Callable[[float, torch.device], Dropping]] = {"generator": _Generator, "tables": _Tables}
_CHOSEN: ContextVar[Source | None] = ContextVar("dropout_source", default=None)


def chosen() -> Source | None:
    """The source that a block has chosen; None: the one that is the fastest on the device."""
    return _CHOSEN.get()


def dropping(p: float, device: torch.device, source: Source | None = None) -> Dropping:
    """Dropout with probability ``p`` in (0, 1) for rows on a device, which :meth:`Dropping.into` is called with next.

    Args:
        source: where it comes from; None: what a block has chosen, else the fastest.
    """
    source = source or chosen() or ("generator" if device.type == "cuda" else "tables")
    return _SOURCES[source](p, device)


@contextmanager
def dropout_source(source: Source) -> Iterator[None]:
    """Calls of a model in the block take the dropout of linear layers from there, and so do their backward passes.

    Without it dropout comes from the "generator" on CUDA devices, where each kernel counts, elsewhere from "tables".
    Either way no mask is kept, and ``torch.manual_seed`` and activation checkpointing govern it. Compiled code takes
    the compiler's own.

    Args:
        source: "generator": torch's dropout, with the probability as it is given. "tables": masks of random words, with
            the probability rounded to a multiple of 2^-15.

    Raises:
        ConfigError: there is no such source.
    """
    if source not in _SOURCES:
        raise ConfigError(f"dropout_source is one of {', '.join(map(repr, _SOURCES))}, found {source!r}.")
    before = _CHOSEN.set(source)
    try:
        yield
    finally:
        _CHOSEN.reset(before)
