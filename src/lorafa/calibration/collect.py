"""Run calibration batches and hand back plain tensors. Nothing is left on the model, whatever happens."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorafa.calibration.base import Statistic
from lorafa.calibration.processes import distributed, gathered, summed
from lorafa.errors import CalibrationError, shorten

Batches = Callable[[bool], Iterator[float | None]]
"""One pass over the data: runs the model batch by batch and yields the weight of each when it is done; None: 1 for each
call of the model since the last. Told whether gradients are read; if not, it need not run backward."""
Rows = Callable[[str, Tensor], Tensor]
"""(layer, its input (..., in)) -> the rows (T, in) that count."""
IGNORED = -100
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(eq=False)
class _Entry:
    """One statistic of one layer, on its way through the passes."""

    layer: str
    name: str
    statistic: Statistic
    passes: int = 0
    done: bool = False
    owner: _Entry | None = None
    """The same statistic of another layer with the same input, which does the work."""
    calls: int = 0
    """Of the layer in the first batch."""
    like: Tensor | None = None
    """An empty tensor as the inputs are; None until there was one."""

    @property
    def value(self) -> Statistic:
        return self.statistic if self.owner is None else self.owner.statistic

    def work_alone(self) -> None:
        """Have no owner any more, but a copy of what it has counted so far."""
        if self.owner is not None:
            theirs = self.owner.statistic
            self.statistic = copy.deepcopy(theirs, {id(theirs.layer): self.statistic.layer})
            self.owner = None


@dataclass
class _Batch:
    """What is known of the batch that is running."""

    number: int = -1
    attended: Tensor | None = None
    """(batch, tokens) bool; None: all are."""
    labels: Tensor | None = None
    """(batch, tokens)."""

    def rows(self, x: Tensor, tokens: str, ignored: int = IGNORED) -> Tensor:
        """The rows (T, in) of an input (..., in) that count."""
        keep = None if tokens == "all" else self.attended
        if tokens == "labelled" and self.labels is not None:
            labelled = self.labels != ignored
            keep = labelled if keep is None or keep.shape != labelled.shape else keep & labelled
        flat = x.reshape(-1, x.shape[-1])
        if keep is None or keep.shape != x.shape[:-1]:
            return flat
        return flat[keep.reshape(-1).to(flat.device)]


@dataclass
class _Pass:
    entries: list[_Entry]
    rows: Rows | None = None
    batch: _Batch = field(default_factory=_Batch)
    inputs: dict[tuple[str, int], tuple[weakref.ref[Tensor], _Entry]] = field(default_factory=dict)
    """(statistic, identity of an input) -> the input, and the first layer that had it in this batch."""
    arrived: bool = False
    """Whether a gradient has."""


def collect(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    statistics: Mapping[str, Mapping[str, Statistic]],
    batches: Batches,
    *,
    rows: Rows | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Values of ``statistics`` (layer -> name -> statistic) over as many passes as they want.

    The weights are frozen meanwhile, so that no weight gradient is computed, and dropout is off; modes,
    ``requires_grad`` and hooks are as before afterwards. Under torch.distributed every process runs its share of the
    batches and all get the values of the whole.

    Args:
        model: called by ``batches``, itself or from inside a larger one.
        layers: layer -> module, whose output is that of a linear map of its input, (..., in) to (..., out).
        rows: chooses the rows of an input that statistics of inputs see; default: by the masks the model gets.

    Returns:
        layer -> "<statistic>.<tensor>" -> value.

    Raises:
        CalibrationError: there was no batch, or gradients are needed and none arrived.
    """
    entries = [_Entry(layer, name, s) for layer, named in statistics.items() for name, s in named.items()]
    with _calibrating(model):
        while active := [entry for entry in entries if not entry.done and _ready(entry, entries)]:
            _run(model, layers, active, entries, batches, rows)
    values: dict[str, dict[str, Tensor]] = {layer: {} for layer in statistics}
    results: dict[int, dict[str, Tensor]] = {}
    for entry in entries:
        if id(entry.value) not in results:
            results[id(entry.value)] = entry.value.result()
        values[entry.layer] |= {f"{entry.name}.{key}": value for key, value in results[id(entry.value)].items()}
    return values


def _ready(entry: _Entry, entries: list[_Entry]) -> bool:
    return all(other.done for other in entries if other.layer == entry.layer and other.name in entry.statistic.after)


def _run(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    active: list[_Entry],
    entries: list[_Entry],
    batches: Batches,
    rows: Rows | None,
) -> None:
    """One pass over the data for the ``active`` entries."""
    for entry in active:
        others = {e.name: e.value for e in entries if e.layer == entry.layer and e.name in entry.statistic.after}
        entry.statistic.start_pass(entry.passes, others)
    current, weight, calls = _Pass(active, rows), 0.0, 0
    gradients = any(entry.statistic.reads_gradient for entry in active)
    with _watched(model, layers, current):
        for share in batches(gradients):
            weight += current.batch.number + 1 - calls if share is None else share
            calls = current.batch.number + 1
            _compare(active)
            if all(entry.value.satisfied for entry in active):
                break
    weight = summed(weight)
    if not weight:
        raise CalibrationError(
            "There was no batch to calibrate with: the data is empty. Pass a dataloader (or any sequence of batches) "
            "with at least one."
        )
    if gradients and not summed(float(current.arrived)):
        names = shorten(dict.fromkeys(entry.layer for entry in active), 3)
        raise CalibrationError(
            f"No gradient arrived at {names}: {calls} batches ran and none of them called backward() on a loss that "
            "depends on these layers. Call loss.backward() in the training step, with gradients enabled."
        )
    if distributed():
        _agree(active, layers)
    for entry in active:
        if entry.owner is None:
            if distributed() and entry.like is not None:
                entry.statistic.reduce()
            entry.statistic.end_pass(entry.passes, weight)
        entry.passes += 1
    _compare(active)
    for entry in active:
        entry.done = not entry.value.wants_pass(entry.passes)


def _compare(active: list[_Entry]) -> None:
    for kind in dict.fromkeys(type(entry.statistic) for entry in active):
        same = [entry for entry in active if type(entry.statistic) is kind]
        kind.compare([(entry.statistic.layer, entry.value) for entry in same])


def _agree(active: list[_Entry], layers: Mapping[str, nn.Module]) -> None:
    """Before ranks add up what they have, it must be the same tensors on all of them.

    A rank may have had no batch, or none that reached some layer: its share is that of no rows, of the dtype the others
    saw. Layers share what depends on their input alone only if they do on every rank that saw them.
    """
    places = {id(entry): place for place, entry in enumerate(active)}
    said = [
        (0 if e.like is None else 1 + _DTYPES.index(e.like.dtype), -1 if e.owner is None else places[id(e.owner)])
        for e in active
    ]
    for entry, (seen, owners) in zip(active, gathered(torch.tensor(said)).permute(1, 2, 0), strict=True):
        if not seen.any():
            continue
        owner = owners[seen > 0].unique().tolist()
        if len(owner) == 1 and owner[0] >= 0:
            entry.owner = active[owner[0]]
            continue
        entry.work_alone()
        if entry.like is None:
            place = next((p.device for p in layers[entry.layer].parameters()), None)
            entry.like = torch.empty(0, dtype=_DTYPES[int(seen.max()) - 1], device=place)
        measured = entry.statistic.layer
        d = entry.like.new_empty(0, measured.out) if entry.statistic.reads_gradient else None
        entry.statistic.update(entry.like.new_empty(0, measured.in_), d)


@contextmanager
def _calibrating(model: nn.Module) -> Iterator[None]:
    """Frozen weights and no dropout; blocks that checkpoint their activations still do."""
    with ExitStack() as cleanup:
        for parameter in model.parameters():
            cleanup.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for module in model.modules():
            cleanup.callback(setattr, module, "training", module.training)
            module.training = _checkpoints(module)
        if any(_checkpoints(module) for module in model.modules()):
            embeddings = getattr(model, "get_input_embeddings", lambda: None)()
            if isinstance(embeddings, nn.Module):  # reentrant checkpointing needs an input with a gradient
                cleanup.callback(embeddings.register_forward_hook(_require_gradient).remove)
        yield


def _checkpoints(module: nn.Module) -> bool:
    return bool(getattr(module, "gradient_checkpointing", False))


def _require_gradient(module: nn.Module, args: Any, output: Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)


@contextmanager
def _watched(model: nn.Module, layers: Mapping[str, nn.Module], current: _Pass) -> Iterator[None]:
    """Hooks on the model, which see each batch, and on its layers, which feed the statistics."""
    by_layer: dict[str, list[_Entry]] = {}
    for entry in current.entries:
        by_layer.setdefault(entry.layer, []).append(entry)
    with ExitStack() as cleanup:
        first = cast(Callable[..., None], _BatchStart(current))
        cleanup.callback(model.register_forward_pre_hook(first, with_kwargs=True).remove)
        for name, entries in by_layer.items():
            watch = _Watch(entries, current)
            cleanup.callback(layers[name].register_forward_pre_hook(watch.before, with_kwargs=True).remove)
            cleanup.callback(layers[name].register_forward_hook(watch.after).remove)
        yield


class _BatchStart:
    """Reads the masks a batch comes with."""

    def __init__(self, current: _Pass) -> None:
        self.current = current

    def __call__(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        batch, mask = self.current.batch, kwargs.get("attention_mask")
        batch.number += 1
        batch.attended = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        labels = kwargs.get("labels")
        batch.labels = labels if isinstance(labels, Tensor) else None
        self.current.inputs.clear()
        for entry in self.current.entries:
            entry.statistic.start_batch(batch.number)


class _Watch:
    """The hooks on one layer."""

    def __init__(self, entries: list[_Entry], current: _Pass) -> None:
        self.current = current
        self.forward = [entry for entry in entries if not entry.statistic.reads_gradient]
        self.backward = [entry for entry in entries if entry.statistic.reads_gradient]
        self.input: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note the input; let it require a gradient if nothing before it does, so that backward finds a way."""
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self.input = x
        for entry in self.forward:
            entry.like = x.new_empty(0)
            if not self._shared(entry, x):
                entry.statistic.update(self._rows(entry, x.detach()), None)
        if x.requires_grad or not torch.is_grad_enabled() or not x.is_floating_point():
            return None
        needing = x.detach().requires_grad_()
        return (
            tuple(needing if value is x else value for value in args),
            {key: needing if value is x else value for key, value in kwargs.items()},
        )

    def _rows(self, entry: _Entry, x: Tensor) -> Tensor:
        if self.current.rows is not None:
            return self.current.rows(entry.layer, x).reshape(-1, x.shape[-1])
        ignored = getattr(entry.statistic.layer.settings, "label_mask_value", IGNORED)
        return self.current.batch.rows(x, entry.statistic.tokens, ignored)

    def after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        x, self.input = self.input, None
        if not self.backward or x is None or not output.requires_grad:
            return None
        return cast(Tensor, _Observed.apply(output, x.detach(), self._feed))  # type: ignore[no-untyped-call]

    def _feed(self, x: Tensor, d: Tensor) -> None:
        self.current.arrived = True
        x, d = x.reshape(-1, x.shape[-1]), d.reshape(-1, d.shape[-1])
        for entry in self.backward:
            entry.like = x.new_empty(0)
            entry.statistic.update(x, d.to(x.dtype))

    def _shared(self, entry: _Entry, x: Tensor) -> bool:
        """Whether another layer has counted this very input. Found out in the first batch, then kept."""
        if self.current.batch.number > 0 or entry.passes or not entry.statistic.shares_input:
            return entry.owner is not None
        entry.calls += 1
        if entry.calls > 1:
            self._part(entry)
            return False
        key = entry.name, id(x)
        seen, owner = self.current.inputs.get(key, (None, entry))
        serves = owner.statistic.layer.rank >= entry.statistic.layer.rank
        if seen is not None and seen() is x and serves:
            entry.owner = owner
            return True
        self.current.inputs[key] = weakref.ref(x), entry
        return False

    def _part(self, entry: _Entry) -> None:
        """A layer that is called again sees what those with its first input need not see."""
        inputs = self.current.inputs
        self.current.inputs = {key: (seen, owner) for key, (seen, owner) in inputs.items() if owner is not entry}
        for other in self.current.entries:
            if other is entry or other.owner is entry:
                other.work_alone()


class _Observed(torch.autograd.Function):
    """The output as it is; hands the layer's input and the output's gradient to ``feed`` in backward.

    The input is saved the way activations are, so that checkpointing recomputes it instead of keeping it.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, feed: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.feed = feed
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ctx.feed(ctx.saved_tensors[0], d)
        return d, None, None
