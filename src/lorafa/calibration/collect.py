"""Run calibration batches and hand back plain tensors. Nothing is left on the model, whatever happens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorafa.calibration.base import Statistic
from lorafa.calibration.batches import Asked, Batches, contents, digest_of
from lorafa.calibration.masks import counted
from lorafa.calibration.processes import of_first
from lorafa.calibration.sharing import Entry, Sharing, agree
from lorafa.calibration.state import calibrating
from lorafa.errors import CalibrationError, shorten
from lorafa.models.rows import IGNORE_INDEX, filled_up
from lorafa.processes import distributed, gathered, rank


@dataclass
class _Masks:
    """The masks that a batch came with."""

    attended: Tensor | None = None
    """(batch, tokens) bool; None: all are."""
    labels: Tensor | None = None
    """(batch, tokens)."""

    @classmethod
    def of(cls, batch: Any) -> _Masks:
        """Find them among a model's keyword arguments."""
        given = batch if isinstance(batch, Mapping) else {}
        mask, labels = given.get("attention_mask"), given.get("labels")
        return cls(
            mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None,
            labels if isinstance(labels, Tensor) else None,
        )

    def rows(self, x: Tensor, tokens: str, ignored: int = IGNORE_INDEX) -> Tensor:
        """The rows (T, in) of an input (..., in) that count."""
        attended = None if tokens == "all" else self.attended
        keep = counted(x.shape[:-1], attended, self.labels if tokens == "labelled" else None, ignored)
        flat = x.reshape(-1, x.shape[-1])
        return flat if keep is None else flat[keep.reshape(-1).to(flat.device)]


class _Pass:
    """One pass over the data for some entries."""

    def __init__(self, entries: list[Entry], batches: Batches, set_modes: Callable[[], None]) -> None:
        self.entries, self.batches, self.set_modes = entries, batches, set_modes
        self.sharing = Sharing(entries)
        self.masks = _Masks()
        self.announced = False
        """Whether the next call of the model begins no batch of its own: the running one was announced."""
        self.headless = False
        """Whether the model is spared all logits but the last."""
        self.count = 0
        """Batches that are done."""
        self.weights = [0.0, 0.0]
        """The sum of their weights in each half sample."""
        self.arrived = False
        """Whether a gradient has arrived."""
        self.order: list[str] | None = [] if any(_keeps_halves(entry) for entry in entries) else None
        """The batches by their digests, where half samples are kept apart over several passes."""

    @property
    def half(self) -> int:
        """The half sample, 0 or 1, of the running batch. They take turns, and processes begin with different ones."""
        return (self.count + rank()) % 2

    def announce(self, batch: Any) -> None:
        """Called before the model runs over a batch. The masks are read here: a loss may run parts of the model alone,
        which are not given them."""
        self.sharing.next_call()
        self.masks, self.announced = _Masks.of(batch), True
        self.set_modes()

    def note(self, batch: Any) -> None:
        """Keep in mind which batch comes next."""
        if self.order is not None:
            self.order.append(digest_of(list(contents(batch))))

    def start_batch(self) -> None:
        for entry in self.entries:
            entry.statistic.start_batch(self.half)

    def end_batch(self, weight: float) -> None:
        self.weights[self.half] += weight
        self.count += 1


def collect(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    statistics: Mapping[str, Mapping[str, Statistic]],
    batches: Batches,
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

    Returns:
        layer -> "<statistic>.<tensor>" -> value.

    Raises:
        CalibrationError: there was no batch, gradients are needed and none arrived, or batches changed places between
            passes that keep half samples apart.
    """
    entries = [Entry(layer, name, s) for layer, named in statistics.items() for name, s in named.items()]
    order: list[str] | None = None
    with calibrating(model) as set_modes:
        while active := [entry for entry in entries if not entry.done and _ready(entry, entries)]:
            if idle := [entry for entry in active if not entry.statistic.reads_data]:
                _without_data(idle, entries)
            else:
                order = _run(model, layers, active, entries, batches, set_modes, order)
    values: dict[str, dict[str, Tensor]] = {layer: {} for layer in statistics}
    results: dict[int, dict[str, Tensor]] = {}
    for entry in entries:
        if id(entry.value) not in results:
            results[id(entry.value)] = {key: of_first(value) for key, value in entry.value.result().items()}
        values[entry.layer] |= {f"{entry.name}.{key}": value for key, value in results[id(entry.value)].items()}
    return values


def _ready(entry: Entry, entries: list[Entry]) -> bool:
    return all(other.done for other in entries if other.layer == entry.layer and other.name in entry.statistic.after)


def _start_passes(active: list[Entry], entries: list[Entry]) -> None:
    for entry in active:
        others = {e.name: e.value for e in entries if e.layer == entry.layer and e.name in entry.statistic.after}
        entry.statistic.start_pass(entry.passes, others)


def _without_data(active: list[Entry], entries: list[Entry]) -> None:
    _start_passes(active, entries)
    for entry in active:
        entry.passes, entry.done = entry.passes + 1, True


def _run(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    active: list[Entry],
    entries: list[Entry],
    batches: Batches,
    set_modes: Callable[[], None],
    order: list[str] | None,
) -> list[str] | None:
    """One pass over the data for the ``active`` entries.

    Args:
        order: the batches' digests in the last pass that kept half samples apart over several passes.

    Returns:
        The order for the next pass to compare with.
    """
    _start_passes(active, entries)
    current, gradients = _Pass(active, batches, set_modes), any(entry.statistic.reads_gradient for entry in active)
    current.headless = not gradients and not batches.reads_output and _can_spare_logits(model, layers)
    inputs = any(not entry.statistic.reads_gradient for entry in active)
    running = batches.run(Asked(gradients, inputs, layers.values(), current.announce, current.note))
    with _watched(model, layers, current, list(dict.fromkeys(entry.layer for entry in entries))):
        current.start_batch()
        for weight in running:
            if weight is not None and not batches.by_call:
                current.end_batch(weight)
                current.start_batch()
            _compare(entries)
            if all(entry.value.satisfied for entry in active):
                break
    current.sharing.next_call()
    weights = _weights(current, gradients)
    _require_order(current, order)
    counted = agree(active, layers)
    for entry in counted:
        if entry.owner is None:
            if distributed() and entry.dtype is not None:
                entry.statistic.reduce()
            entry.statistic.end_pass(entry.passes, weights)
        entry.passes += 1
    _compare(entries)
    more = gathered([entry.value.wants_pass(entry.passes) for entry in counted])[0]
    for entry, wanted in zip(counted, more, strict=True):
        entry.done = not wanted
    return order if current.order is None else current.order


def _keeps_halves(entry: Entry) -> bool:
    """Whether what it finds of a half sample in one pass meets the data again in another."""
    statistic = entry.statistic
    several = entry.passes > 0 or statistic.wants_pass(entry.passes + 1)
    return statistic.reads_gradient and statistic.layer.options.halves and several


def _require_order(current: _Pass, before: list[str] | None) -> None:
    """Raises CalibrationError, on all processes, if batches of one half sample are in the other in this pass."""
    again = any(_keeps_halves(entry) and entry.passes > 0 for entry in current.entries)
    if again and any(gathered(current.order != before)):
        raise CalibrationError(
            "The batches came in another order, or were others, than in the pass before, so that the two half samples "
            "of the gradients are not kept apart: the ranks would be confirmed by the data they were found in. Pass "
            "batches that stay as they are, a DataLoader with shuffle=False or list(loader), or passes=1."
        )


def _weights(current: _Pass, gradients: bool) -> tuple[float, float]:
    """The weights of the two half samples, summed over all ranks.

    Raises:
        CalibrationError: both are empty, or gradients are needed and none arrived.
    """
    ranks = gathered((current.count, current.weights, current.arrived))
    first, second = (sum(weights[half] for _, weights, _ in ranks) for half in (0, 1))
    count = sum(count for count, _, _ in ranks)
    if not count and current.batches.by_call:
        raise CalibrationError(
            "There was no batch to calibrate with: the function that was given for the data never called the model. "
            "Let it call the very model that gets the adapter, at least once."
        )
    if not count:
        raise CalibrationError(
            "There was no batch to calibrate with: the data is empty. Pass a dataloader (or any sequence of batches) "
            "with at least one."
        )
    if not first + second:
        raise CalibrationError(
            f"None of the {count} batches has a label that counts, so they weigh nothing. Pass batches with labels, or "
            "weighting='batches'."
        )
    if gradients and not any(arrived for _, _, arrived in ranks):
        names = shorten(dict.fromkeys(entry.layer for entry in current.entries), 3)
        raise CalibrationError(
            f"No gradient arrived at {names}: {current.count} batches ran and none of them called backward() on a loss "
            "that depends on these layers. Call loss.backward() in the training step, with gradients enabled."
        )
    return first, second


def _compare(entries: list[Entry]) -> None:
    for kind in dict.fromkeys(type(entry.statistic) for entry in entries):
        same = [entry for entry in entries if type(entry.statistic) is kind]
        kind.compare([(entry.statistic.layer, entry.value) for entry in same])


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
    by_layer: dict[str, list[Entry]] = {name: [] for name in names}
    for entry in current.entries:
        by_layer[entry.layer].append(entry)
    with ExitStack() as cleanup:
        first = cast(Callable[..., None], _CallStart(current))
        cleanup.callback(model.register_forward_pre_hook(first, with_kwargs=True).remove)
        for name, entries in by_layer.items():
            watch = _Watch(entries, current)
            cleanup.callback(layers[name].register_forward_pre_hook(watch.before, with_kwargs=True).remove)
            cleanup.callback(layers[name].register_forward_hook(watch.after).remove)
        yield


class _CallStart:
    """Reads the masks a batch comes with."""

    def __init__(self, current: _Pass) -> None:
        self.current = current

    def __call__(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        current = self.current
        if not current.announced:
            current.sharing.next_call()
        current.set_modes()  # a loss or a training step may have begun with model.train()
        names = inspect.signature(model.forward).parameters
        current.masks, current.announced = _Masks.of(dict(zip(names, args, strict=False)) | dict(kwargs)), False
        if current.batches.by_call:
            current.note((args, kwargs))
            current.start_batch()
            current.end_batch(1.0)
        if not current.headless:
            return None
        return args, {key: value for key, value in kwargs.items() if key != "labels"} | {"logits_to_keep": 1}


class _Watch:
    """The hooks on one layer."""

    def __init__(self, entries: list[Entry], current: _Pass) -> None:
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
            if self.current.sharing.counts(entry, x):
                entry.statistic.update(self._rows(entry, x.detach()), None)
        if x.requires_grad or not torch.is_grad_enabled() or not x.is_floating_point():
            return None
        needing = x.detach().requires_grad_()
        return (
            tuple(needing if value is x else value for value in args),
            {key: needing if value is x else value for key, value in kwargs.items()},
        )

    def _rows(self, entry: Entry, x: Tensor) -> Tensor:
        if self.current.batches.rows is not None:
            return self.current.batches.rows(entry.layer, x).reshape(-1, x.shape[-1])
        ignored = getattr(entry.statistic.layer.settings, "label_mask_value", IGNORE_INDEX)
        return self.current.masks.rows(x, entry.statistic.tokens, ignored)

    def after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        x, self.input = self.input, None
        if not self.backward or x is None or not output.requires_grad:
            return None
        return cast(Tensor, _Observed.apply(output, x.detach(), self._feed))  # type: ignore[no-untyped-call]

    def _feed(self, x: Tensor, d: Tensor) -> None:
        self.current.arrived = True
        rows = len(x) if x.dim() > 1 else 1
        x, d = filled_up(x.reshape(-1, x.shape[-1])), filled_up(d.reshape(-1, d.shape[-1]))
        for entry in self.backward:
            entry.dtype = x.dtype
            entry.statistic.start_call(rows)
            entry.statistic.update(x, d.to(x.dtype))


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
