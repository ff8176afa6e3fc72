"""The data statistics are collected over: batches, or a function that runs over them, and how the model is called."""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.backends.offload import device_of
from lorafa.calibration.loss import Loss, call, causal_loss, count_labels, default_loss, padded, require_label, scalar
from lorafa.errors import CalibrationError, LoraError

Rows = Callable[[str, Tensor], Tensor]
"""(layer, its input (..., in)) -> the rows (T, in) that count."""


@dataclass(frozen=True)
class Asked:
    """What a pass over the data is for."""

    gradients: bool
    """Whether gradients are read; if not, the model need not run backward."""
    inputs: bool
    """Whether inputs of layers are read."""
    watched: Collection[nn.Module]
    """The layers that are looked on."""
    announce: Callable[[Any], None]
    """Called with each batch before the model runs over it. The masks are read from it there, because a loss may run
    parts of the model that are not given them."""
    note: Callable[[Any], None]
    """Called with each batch as the data gave it."""


@dataclass(frozen=True)
class Batches:
    """How the model is run over the data, once for each pass."""

    run: Callable[[Asked], Iterator[float | None]]
    """Runs the model batch by batch and yields the weight of each when it is done. The call itself comes before the
    model is watched."""
    by_call: bool = False
    """Whether every call of the model is a batch, of weight 1. What ``run`` yields says nothing then."""
    reads_output: bool = True
    """Whether the model's output is used in passes that read no gradients. Where it is not, a model of transformers is
    asked for its last logits only."""
    rows: Rows | None = None
    """Chooses the rows of an input that statistics of inputs see; None: by the masks the model gets."""
    digest: str | None = None
    """A hash of the data, by which a cache knows whether its statistics are of this data. None: the cache does not
    check that."""


def of_function(train_step: Callable[[], Any]) -> Batches:
    """The batches that a function without arguments runs over, forward and backward."""

    def run(asked: Asked) -> Iterator[None]:
        if isinstance(train_step(), Iterator):
            raise CalibrationError(
                "The function that was given for the data returned an iterator, and none of its code has run. Let it "
                "run forward and backward itself, or pass the batches: list(function())."
            )
        yield None

    return Batches(run, by_call=True)


def of_data(
    model: nn.Module,
    data: Iterable[Any],
    *,
    loss: Loss | None = None,
    weighting: str = "batches",
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Batches:
    """The batches of a dataloader or a sequence.

    Args:
        loss: a scalar; default :func:`default_loss`. Where no gradients are read it runs the model all the same.
        weighting: of gradients: "batches" or, by the number of their labels, "tokens".
        forward: runs the model where no gradients are read, instead of ``loss`` or :func:`call`.

    Raises:
        CalibrationError: as :func:`require_batches`.
    """
    require_batches("data", data)
    device = device_of(model)

    def run(asked: Asked) -> Iterator[float]:
        return with_gradients(asked, loss or default_loss(model, asked.watched)) if asked.gradients else without(asked)

    def with_gradients(asked: Asked, chosen: Loss) -> Iterator[float]:
        pads = chosen is causal_loss and not asked.inputs and device.type == "cpu"
        for number, batch in enumerate(data, 1):
            asked.note(batch)
            batch = moved(batch, device)
            weight = 1.0 if weighting == "batches" else float(count_labels(model, batch))
            if not weight:
                yield 0.0
                continue
            if chosen is causal_loss:
                require_label(model, batch, f"batch {number} of the data")
            batch = padded(batch, model) if pads else batch
            asked.announce(batch)
            with _noting(number, batch), torch.enable_grad():
                value = scalar(chosen(model, batch)) * weight
                if value.requires_grad:  # not where the batch reaches no target
                    value.backward()  # type: ignore[no-untyped-call]
            yield weight

    def without(asked: Asked) -> Iterator[float]:
        for number, batch in enumerate(data, 1):
            batch = moved(batch, device)
            asked.announce(batch)
            with _noting(number, batch), torch.no_grad():
                (forward or loss or call)(model, batch)
            yield 1.0

    return Batches(run, reads_output=forward is not None or loss is not None)


@contextmanager
def _noting(number: int, batch: Any) -> Iterator[None]:
    """Say with what another library, or the caller's code, raises on a batch which one it was."""
    try:
        yield
    except Exception as error:
        if sys.version_info >= (3, 11) and not isinstance(error, LoraError):
            error.add_note(f"Raised on batch {number} of the data: {_described(batch)}.")
        raise


def _described(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key!r}: {_described(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, (list, tuple)) and len(batch) <= 8:
        return f"{type(batch).__name__} of " + ", ".join(map(_described, batch))
    return type(batch).__name__


def require_batches(name: str, data: Any) -> None:
    """Raises CalibrationError unless the argument of this name can be gone over repeatedly, batch by batch."""
    found = f"{name}= is {type(data).__name__!r}"
    if isinstance(data, (Mapping, Tensor)):
        raise CalibrationError(f"{found}, one batch and not several. Pass a list of batches, such as [{name}].")
    if isinstance(data, Iterator):
        raise CalibrationError(
            f"{found}, an iterator, which can be gone over only once. Pass something that can be gone over again: a "
            f"DataLoader, or list({name})."
        )
    if isinstance(data, (str, bytes)) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise CalibrationError(f"{found}, which holds no batches. Pass a DataLoader or a list of batches.")


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device, however they are nested."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        values = [moved(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


@contextmanager
def shown(batches: Batches, show: bool) -> Iterator[Batches]:
    """The batches, counted on a progress bar that is gone afterwards; without rich there is none."""
    try:
        from rich.progress import Progress
    except ImportError:
        show = False
    if not show:
        yield batches
        return
    with Progress(transient=True) as progress:
        task = progress.add_task("Collecting statistics", total=None)

        def run(asked: Asked) -> Iterator[float | None]:
            for weight in batches.run(asked):
                progress.advance(task)
                yield weight

        yield replace(batches, run=run)


def contents(batch: Any) -> Iterator[Tensor | str | int | float]:
    """What tells batches apart. Other objects are made anew in every pass, and need not be equal then."""
    if isinstance(batch, (str, int, float)) or (isinstance(batch, Tensor) and batch.layout is torch.strided):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from contents(part)


def digest_of(*parts: Any) -> str:
    """A hash of data and of functions, for a cache.

    Tensors and arrays count by shape, dtype and bytes, functions by their module, name and code, the rest by its text;
    iterators by what they give. What a function reads from elsewhere, the variables around it or the arguments
    ``partial`` gave it, is not seen, nor what a callable object holds.
    """
    digest = hashlib.blake2b(digest_size=16)

    def take(value: Any) -> None:
        if isinstance(value, Tensor):
            octets = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
            digest.update(ctypes.string_at(octets.data_ptr(), octets.numel()))
        elif hasattr(value, "__array__") and hasattr(value, "tobytes"):
            digest.update(f"{value.shape}{value.dtype}".encode() + value.tobytes())
        elif isinstance(value, Mapping):
            for key in value:
                digest.update(f"{key!r}:".encode())
                take(value[key])
                digest.update(b",")
        elif isinstance(value, CodeType):
            take((value.co_code, value.co_names, value.co_consts))
        elif callable(value):
            function = inspect.unwrap(getattr(value, "func", value))  # of partial, of decorators
            named = function if hasattr(function, "__qualname__") else type(function)
            take((named.__module__, named.__qualname__, getattr(named, "__code__", None)))
        elif isinstance(value, (list, tuple, Iterator)):
            digest.update(b"(")
            for item in value:
                take(item)
                digest.update(b",")
            digest.update(b")")
        elif is_dataclass(value):
            take({one.name: getattr(value, one.name) for one in fields(value)})
        else:
            digest.update(repr(sorted(value, key=repr) if isinstance(value, Set) else value).encode())

    take(parts)
    return digest.hexdigest()
