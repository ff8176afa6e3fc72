"""Run calibration batches and hand back plain tensors. Nothing is left on the model, whatever happens."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorafa.calibration.base import Statistic
from lorafa.calibration.processes import distributed, gathered, of_first
from lorafa.errors import CalibrationError, shorten

Batches = Callable[[bool], Iterator[float | None]]
"""One pass over the data: runs the model batch by batch and yields the weight of each when it is done; None: 1 for each
call of the model since the last. Told whether gradients are read; if not, it need not run backward."""
Rows = Callable[[str, Tensor], Tensor]
"""(layer, its input (..., in)) -> the rows (T, in) that count."""
IGNORED = -100


@dataclass(eq=False)
class _Entry:
    """One statistic of one layer, on its way through the passes."""

    layer: str
    name: str
    statistic: Statistic
    passes: int = 0
    done: bool = False
    dtype: torch.dtype | None = None
    """Of the inputs; None until there was one."""
    owner: _Entry | None = None
    """The same statistic of another layer with the same inputs, which does the work."""
    parted: bool = False
    """Whether the owner has had other inputs in this pass: then nothing of it counts."""
    alone: bool = False
    """Whether it is to have no owner."""

    @property
    def value(self) -> Statistic:
        return self.statistic if self.owner is None else self.owner.statistic

    def start_again(self) -> None:
        """Before the first pass, without an owner."""
        self.statistic = type(self.statistic)(self.statistic.layer)
        self.owner, self.parted, self.alone, self.passes = None, False, True, 0


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
    inputs: dict[_Entry, list[weakref.ref[Tensor]]] = field(default_factory=dict)
    """In this batch, of statistics that share inputs, in order."""
    first: dict[tuple[str, int], _Entry] = field(default_factory=dict)
    """(statistic, identity of an input) -> who had it first in this batch."""
    headless: bool = False
    """Whether the model is spared all logits but the last."""
    arrived: bool = False
    """Whether a gradient has."""

    def end_batch(self) -> None:
        for entry in self.entries:
            if entry.owner is not None and len(self.inputs.get(entry, ())) != len(self.inputs.get(entry.owner, ())):
                entry.parted = True
        self.inputs.clear()
        self.first.clear()


def collect(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    statistics: Mapping[str, Mapping[str, Statistic]],
    batches: Batches,
    *,
    rows: Rows | None = None,
    reads_output: bool = True,
) -> dict[str, dict[str, Tensor]]:
    """Values of ``statistics`` (layer -> name -> statistic) over as many passes as they want.

    The weights are frozen meanwhile, so that no weight gradient is computed, and dropout is off; modes,
    ``requires_grad`` and hooks are as before afterwards. Under torch.distributed every process runs its share of the
    batches, which may be none or not reach some layers, and all get the values of the whole, bit for bit the same.

    Layers that are given the same tensors share what depends on them alone. That is tried with those of the first
    batch; where a later one, or another process, shows that it was wrong, the layer is counted in passes of its own.

    Args:
        model: called by ``batches``, itself or from inside a larger one.
        layers: layer -> module, whose output is that of a linear map of its input, (..., in) to (..., out).
        rows: chooses the rows of an input that statistics of inputs see; default: by the masks the model gets.
        reads_output: whether ``batches`` uses what the model returns where it need not run backward.

    Returns:
        layer -> "<statistic>.<tensor>" -> value.

    Raises:
        CalibrationError: there was no batch, or gradients are needed and none arrived.
    """
    entries = [_Entry(layer, name, s) for layer, named in statistics.items() for name, s in named.items()]
    with _calibrating(model):
        while active := [entry for entry in entries if not entry.done and _ready(entry, entries)]:
            _run(model, layers, active, entries, batches, rows, reads_output)
    values: dict[str, dict[str, Tensor]] = {layer: {} for layer in statistics}
    results: dict[int, dict[str, Tensor]] = {}
    for entry in entries:
        if id(entry.value) not in results:
            results[id(entry.value)] = {key: of_first(value) for key, value in entry.value.result().items()}
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
    reads_output: bool,
) -> None:
    """One pass over the data for the ``active`` entries."""
    for entry in active:
        others = {e.name: e.value for e in entries if e.layer == entry.layer and e.name in entry.statistic.after}
        entry.statistic.start_pass(entry.passes, others)
    current, weight, calls = _Pass(active, rows), 0.0, 0
    gradients = any(entry.statistic.reads_gradient for entry in active)
    current.headless = not gradients and not reads_output and _can_spare_logits(model, layers)
    with _watched(model, layers, current, list(dict.fromkeys(entry.layer for entry in entries))):
        for share in batches(gradients):
            weight += current.batch.number + 1 - calls if share is None else share
            calls = current.batch.number + 1
            _compare(entries)
            if all(entry.value.satisfied for entry in active):
                break
    current.end_batch()
    weights, arrived = zip(*gathered((weight, current.arrived)), strict=True)
    weight = sum(weights)
    if not weight:
        raise CalibrationError(
            "There was no batch to calibrate with: the data is empty. Pass a dataloader (or any sequence of batches) "
            "with at least one."
        )
    if gradients and not any(arrived):
        names = shorten(dict.fromkeys(entry.layer for entry in active), 3)
        raise CalibrationError(
            f"No gradient arrived at {names}: {calls} batches ran and none of them called backward() on a loss that "
            "depends on these layers. Call loss.backward() in the training step, with gradients enabled."
        )
    counted = _agree(active, layers)
    for entry in counted:
        if entry.owner is None:
            if distributed() and entry.dtype is not None:
                entry.statistic.reduce()
            entry.statistic.end_pass(entry.passes, weight)
        entry.passes += 1
    _compare(entries)
    more = gathered([entry.value.wants_pass(entry.passes) for entry in counted])[0]
    for entry, wanted in zip(counted, more, strict=True):
        entry.done = not wanted


def _compare(entries: list[_Entry]) -> None:
    for kind in dict.fromkeys(type(entry.statistic) for entry in entries):
        same = [entry for entry in entries if type(entry.statistic) is kind]
        kind.compare([(entry.statistic.layer, entry.value) for entry in same])


def _agree(active: list[_Entry], layers: Mapping[str, nn.Module]) -> list[_Entry]:
    """Those whose pass counts, with an owner on all ranks or on none; the others are to start again.

    An owner may do the work of another only if on every rank both had the same inputs, or none. A rank that saw
    nothing of a layer adds no rows, of the dtype the others saw: what is added up must be the same tensors on all.
    """
    places = {entry: place for place, entry in enumerate(active)}
    ranks = gathered([(e.dtype, None if e.owner is None else places[e.owner], e.parted) for e in active])
    again: set[_Entry] = set()
    for entry, said in zip(active, zip(*ranks, strict=True), strict=True):
        seen = [one for one in said if one[0] is not None]
        owners = {owner for _, owner, _ in seen}
        owner = next(iter(owners), None)
        apart = owner is not None and [rank[owner][0] for rank in ranks] != [dtype for dtype, _, _ in said]
        if len(owners) > 1 or apart or any(parted for _, _, parted in said):
            again.add(entry)
            continue
        entry.owner = None if owner is None else active[owner]
        entry.dtype = entry.dtype or (seen[0][0] if seen else None)
        if distributed() and entry.owner is None and entry.dtype is not None:
            _count_nothing(entry.statistic, entry.dtype, layers[entry.layer])
    again |= {entry for entry in active if entry.owner in again}
    for entry in again:
        entry.start_again()
    return [entry for entry in active if entry not in again]


def _count_nothing(statistic: Statistic, dtype: torch.dtype, layer: nn.Module) -> None:
    device = next((tensor.device for tensor in chain(layer.parameters(), layer.buffers())), None)
    x = torch.empty(0, statistic.layer.in_, dtype=dtype, device=device)
    statistic.update(x, x.new_empty(0, statistic.layer.out) if statistic.reads_gradient else None)


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


def _can_spare_logits(model: nn.Module, layers: Mapping[str, nn.Module]) -> bool:
    """Whether the model, one of transformers', can be asked for the last logits only without any layer missing rows.

    With a large vocabulary the others are a fifth of a small model's forward pass, and most of its memory.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return False
    head = getattr(model, "get_output_embeddings", lambda: None)()
    inside = set() if head is None else set(head.modules())
    return not inside & set(layers.values())


@contextmanager
def _watched(
    model: nn.Module, layers: Mapping[str, nn.Module], current: _Pass, names: Collection[str]
) -> Iterator[None]:
    """Hooks on the model, which see each batch, and on its layers, which feed the statistics.

    Also on those that feed none in this pass: a batch that reaches no other must have a backward pass all the same.
    """
    by_layer: dict[str, list[_Entry]] = {name: [] for name in names}
    for entry in current.entries:
        by_layer[entry.layer].append(entry)
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

    def __call__(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        batch, mask = self.current.batch, kwargs.get("attention_mask")
        self.current.end_batch()
        batch.number += 1
        batch.attended = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        labels = kwargs.get("labels")
        batch.labels = labels if isinstance(labels, Tensor) else None
        for entry in self.current.entries:
            entry.statistic.start_batch(batch.number)
        if not self.current.headless:
            return None
        return args, {key: value for key, value in kwargs.items() if key != "labels"} | {"logits_to_keep": 1}


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
        for entry in self.forward if not _recomputing() else ():
            entry.dtype = x.dtype
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
            entry.dtype = x.dtype
            entry.statistic.update(x, d.to(x.dtype))

    def _shared(self, entry: _Entry, x: Tensor) -> bool:
        """Whether another layer counts this input, the one that had it first in the first batch."""
        current = self.current
        if not entry.statistic.shares_input or entry.alone:
            return False
        number = len(current.inputs.setdefault(entry, []))
        current.inputs[entry].append(weakref.ref(x))
        if current.batch.number <= 0 and not entry.passes and not number:
            owner = current.first.get((entry.name, id(x)), entry)
            if owner is entry or current.inputs[owner][0]() is not x:  # an identity is used again
                current.first[entry.name, id(x)] = entry
            elif owner.statistic.layer.rank >= entry.statistic.layer.rank:
                entry.owner = owner
        if entry.owner is None:
            return False
        theirs = current.inputs.get(entry.owner, [])
        entry.parted |= number >= len(theirs) or theirs[number]() is not x
        return True


def _recomputing() -> bool:
    """Whether this is a checkpointed block's second forward pass, inside of backward."""
    return torch._C._current_graph_task_id() != -1


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
