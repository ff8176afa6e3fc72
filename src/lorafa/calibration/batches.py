"""The data statistics are collected over: batches, or a function that runs over them, and how the model is called."""

from __future__ import annotations

import ctypes
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.errors import CalibrationError
from lorafa.losses import IGNORE_INDEX, supervised_loss, supports_chunked_loss

LENGTHS = 64
"""On a CPU, batches are padded to multiples of so many tokens where nothing but gradients is read."""
Loss = Callable[[nn.Module, Any], Tensor]
Rows = Callable[[str, Tensor], Tensor]
"""(layer, its input (..., in)) -> the rows (T, in) that count."""


@dataclass(frozen=True)
class Asked:
    """What a pass over the data is for."""

    gradients: bool
    """Whether gradients are read; if not, the model need not run backward."""
    inputs: bool
    """Whether inputs of layers are."""
    announce: Callable[[Any], None]
    """To be told of a batch before the model runs, or a part of it that is not told of the masks."""


@dataclass(frozen=True)
class Batches:
    """How the model is run over the data, once for each pass."""

    run: Callable[[Asked], Iterator[float | None]]
    """Runs the model batch by batch and yields the weight of each when it is done. The call itself comes before the
    model is watched."""
    by_call: bool = False
    """Whether every call of the model is a batch, of weight 1. What ``run`` yields says nothing then."""
    reads_output: bool = True
    """Whether what the model returns is used where it need not run backward."""
    rows: Rows | None = None
    """Chooses the rows of an input that statistics of inputs see; None: by the masks the model gets."""
    digest: str | None = None
    """Tells data apart, for a cache; None: what it holds of any data will do."""


def of_function(train_step: Callable[[], Any]) -> Batches:
    """Those that a function without arguments runs over, forward and backward."""

    def run(asked: Asked) -> Iterator[None]:
        train_step()
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
    """Those of a dataloader or sequence.

    Args:
        loss: a scalar; default :func:`default_loss`.
        weighting: of gradients: "batches" or, by the number of their labels, "tokens".
        forward: runs the model where no gradients are read, instead of :func:`call`.

    Raises:
        CalibrationError: as :func:`require_batches`.
    """
    require_batches("data", data)
    device = device_of(model)

    def run(asked: Asked) -> Iterator[float]:
        return with_gradients(asked, loss or default_loss(model)) if asked.gradients else without(asked)

    def with_gradients(asked: Asked, chosen: Loss) -> Iterator[float]:
        pads = chosen is _frugal_loss and not asked.inputs and device.type == "cpu"
        for batch in data:
            batch = moved(batch, device)
            batch = _padded(batch, model) if pads else batch
            asked.announce(batch)
            weight = 1.0 if weighting == "batches" else _labelled(batch)
            with torch.enable_grad():
                value = scalar(chosen(model, batch)) * weight
                if value.requires_grad:  # not where the batch reaches no target
                    value.backward()  # type: ignore[no-untyped-call]
            yield weight

    def without(asked: Asked) -> Iterator[float]:
        for batch in data:
            batch = moved(batch, device)
            asked.announce(batch)
            with torch.no_grad():
                (forward or call)(model, batch)
            yield 1.0

    return Batches(run, reads_output=False)


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


def scalar(loss: Any) -> Tensor:
    """The loss as it is.

    Raises:
        CalibrationError: it is not a tensor with one element.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise CalibrationError(
        f"The loss of a batch must be a tensor with one element, found {found}. Return the mean over the batch from "
        "loss=, as a tensor: not loss.item(), which has no gradient."
    )


def call(model: nn.Module, batch: Any) -> Any:
    """``model(**batch)`` for a mapping, ``model(*batch)`` for a tuple or list, else ``model(batch)``."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The ``loss`` of the model's output."""
    output = call(model, batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise CalibrationError(
            f"The model's output ({type(output).__name__}) has no loss. Put labels into the batches, or pass "
            "loss=, a function of model and batch."
        )
    return loss  # type: ignore[no-any-return]


def default_loss(model: nn.Module) -> Loss:
    """The model's own loss; of a causal model of transformers, computed at the labelled positions alone.

    A model is tried on a few tokens first, so this is not to be called while hooks look on.
    """
    return own_loss if supports_chunked_loss(model) else _frugal_loss


def _frugal_loss(model: nn.Module, batch: Any) -> Tensor:
    labelled = isinstance(batch, Mapping) and batch.keys() & {"labels", "shift_labels"}
    return supervised_loss(model, batch) if labelled else own_loss(model, batch)


def _padded(batch: Any, model: nn.Module) -> Any:
    """A batch of tokens, padded on the right to a multiple of :data:`LENGTHS`; anything else as it is.

    A causal model's gradients do not depend on such padding. The matrix library of a CPU keeps kernels for every
    length it has met, a dozen MB each for a model of 135M parameters.
    """
    known = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}
    if not isinstance(batch, Mapping) or batch.keys() - known or not batch.keys() >= {"input_ids", "labels"}:
        return batch
    ids = batch["input_ids"]
    if any(value.dim() != 2 or value.shape != ids.shape for value in batch.values()):
        return batch
    more = -ids.shape[1] % LENGTHS
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if longest is not None and ids.shape[1] + more > longest:
        return batch
    whole = {"attention_mask": torch.ones_like(ids), **batch}
    return {name: nn.functional.pad(value, (0, more), value=known[name]) for name, value in whole.items()}


def _labelled(batch: Any) -> float:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        raise CalibrationError("weighting='tokens' counts the labels of a batch, and there are none. Put them in.")
    return float((labels[..., 1:] != IGNORE_INDEX).sum())


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs belong."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device, however they are nested."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(moved(value, device) for value in batch)
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
                digest.update(str(key).encode())
                take(value[key])
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
            digest.update(b")")
        else:
            digest.update(repr(sorted(value, key=repr) if isinstance(value, Set) else value).encode())

    take(parts)
    return digest.hexdigest()
