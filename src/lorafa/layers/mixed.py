"""The output of a layer in a batch that mixes adapters (``adapter_names``): each row has those that are named for it.

The base runs once for all rows, and each choice of adapters on its own rows. Rows stay in the order of the batch, for
hooks and caches of keys and values to see what they expect. Where a row has few places, as in decoding, the rows of one
choice are brought together inside the layer, so that there is one product for each adapter; where it has many, this
would cost more than it saves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorafa.adapter import AdaptedLayer, Adapter
from lorafa.context import CurrentCall, Layout, Part, Rows
from lorafa.errors import BackendError
from lorafa.numerics.fused import is_traced
from lorafa.numerics.rows import MANY, Product, Stack, add_low_rank_, add_stacked_, added, stacked

FEW = 3
"""From so many parts on, one product over all of them costs less than one for each."""
_ONE_OF_MANY = re.compile(r"\.\d+\.(.*\.)?\d+(\.|$)|(^|\.)experts?\.?[^.]*\d(\.|$)")
"""A path inside a list inside a list, or that of one of several experts: ``layers.1.ffn.experts.expert_0.fc1``."""


def output(layer: AdaptedLayer, rows: Rows, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The output of the layer for x, whose first dimension has the rows of the call.

    Raises:
        BackendError: x has not the rows of the call, so that which adapter is for which is not known.
    """
    here = {name: layer.adapters[name] for name in rows.names if name in layer.adapters}
    owned = not args and not kwargs and _gives_a_new_tensor(layer, x, here.values())
    shape = x.shape
    if here:
        require_rows(layer, layer.call, rows, x)
    if owned:  # a view, which a linear layer gives for more than two dimensions, cannot be changed under autograd
        y = layer.base_output(x.reshape(-1, shape[-1])).view(*shape[:-1], -1)
    else:
        y = layer.base_output(x, *args, **kwargs)
    if not here:
        return y
    if isinstance(y, Tensor):
        x = x.to(y.device)  # where a hook of the base layer may have brought it
    few = x.numel() < MANY * shape[-1] * len(rows.choices)
    layout = rows.layout(shape[0], x.device, sort=few)
    if owned and not torch.is_grad_enabled() and all(map(_is_one_product, here.values())):
        products = [[_product(here[name]) for name in part.adapters if name in here] for part in layout.parts]
        stack = _kept_stack(layer, rows, layout, products) if few and rows.steps else None
        return _in_place(y, x, layout, products, stack)
    return _by_formula(layer, y, x, layout, here, owned=owned and layout.order is None)


def _gives_a_new_tensor(layer: AdaptedLayer, x: Tensor, adapters: Any) -> bool:
    """Whether the base's output is a new tensor that no formula of these adapters reads, and neither does backward."""
    if is_traced() or not x.is_floating_point() or any(a.variant.stage == "norm" for a in adapters):
        return False
    dense = layer.dense_weight(x)
    return dense is not None and isinstance(dense[0], Tensor)


def _is_one_product(adapter: Adapter) -> bool:
    """Whether the change is s B A x for A and B as they are stored, and nothing else happens on the way."""
    plain = adapter.variant.is_plain_lora and not adapter.has_bias and adapter.as_made
    return plain and adapter.running_start is None and not adapter.dropout


def _product(adapter: Adapter) -> Product:
    return adapter.A, adapter.B, adapter.scaling


def _in_place(
    y: Tensor, x: Tensor, layout: Layout, products: Sequence[Sequence[Product]], stack: Stack | None
) -> Tensor:
    """The changes added to y (rows, ..., out): all parts at once where their factors are stacked, or one by one."""
    if stack is not None and layout.groups is not None:
        add_stacked_(y, x, stack, layout.groups.gather, layout.groups.back)
        return y
    shape = y.shape
    x = x.to(y.dtype)
    if layout.order is not None:
        x, y = x.index_select(0, layout.order), y.index_select(0, layout.order)
    places = shape[1:-1].numel()
    add_low_rank_(
        y.view(-1, shape[-1]),
        x.reshape(-1, x.shape[-1]),
        [(part.rows.stop - part.rows.start) * places for part in layout.parts],
        products,
    )
    return y if layout.back is None else y.index_select(0, layout.back)


class _Asked:
    """The factors that a layer was asked for in the pass before, and their stack once they were asked for twice."""

    def __init__(self) -> None:
        self.key: Any = None
        self.products: Any = None  # held, so that no other tensor can take their ids
        self.stack: Stack | None = None


def _kept_stack(
    layer: AdaptedLayer, rows: Rows, layout: Layout, products: Sequence[Sequence[Product]]
) -> Stack | None:
    """The stacked factors of all parts, made in the second pass with the same ones and kept for those that follow.

    None before that, and where there is little to gain: few parts, or parts of very different sizes.
    """
    if len(layout.parts) < FEW or layout.groups is None:
        return None
    asked: _Asked = rows.kept.setdefault(layer, _Asked())
    key = id(layout), [[(_state(A), _state(B), _state(s)) for A, B, s in part] for part in products]
    if key != asked.key:
        asked.key, asked.products, asked.stack = key, (layout, products), None
    elif asked.stack is None:
        asked.stack = stacked(products)
    return asked.stack


def _state(value: float | Tensor) -> Any:
    """What differs after a number, or one in a tensor, was exchanged or changed in place."""
    if not isinstance(value, Tensor):
        return value
    return id(value), value.data_ptr(), 0 if value.is_inference() else value._version


def _by_formula(
    layer: AdaptedLayer, y: Any, x: Tensor, layout: Layout, here: Mapping[str, Adapter], *, owned: bool
) -> Tensor:
    """y with the change of each adapter by its own formula on its own rows."""
    if layout.order is not None:
        x, y = x.index_select(0, layout.order), y.index_select(0, layout.order)
    places: list[slice] = []
    changes: list[Tensor] = []
    for part in layout.parts:
        adapters = [here[name] for name in part.adapters if name in here]
        if adapters:
            own_x, own_y = x[part.rows], y[part.rows]
            with layer.call.looking_at(part):
                found = [adapter.delta_output(own_x, own_y) for adapter in adapters]
            for change in found:
                layer.require_fitting(own_y, change)
            places += [part.rows] * len(found)
            changes += [change.to(y.dtype) for change in found]
    out = added(y, places, changes, owned=owned)
    return out if layout.back is None else out.index_select(0, layout.back)


def require_rows(layer: Any, call: CurrentCall, rows: Rows, x: Tensor) -> None:
    """Raise BackendError unless the first dimension of x has the rows of the call, or their tokens one after another.

    A layer that is one of many, as that of an expert, may get some of the tokens in an order of its own: what has no
    dimension of rows is refused there.
    """
    fits = x.dim() > 0 and rows.fits(x.shape[0])
    if fits and (x.dim() > 2 or not _ONE_OF_MANY.search(call.path_of(layer) or "")):
        return
    raise BackendError(
        f"{call.place_of(layer)} gets {tuple(x.shape)} where the model was called with {len(rows.choices)} rows, so "
        "which of adapter_names is for which part of it is not known. Leave such layers out with exclude_modules, or "
        "run one batch an adapter."
    )


def by_parts(
    layer: Any, rows: Rows, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """``function(*args, **kwargs)`` called for each choice of adapters with its rows alone, the results put together.

    Every tensor whose first dimension is as long as that of the first one is taken for one with rows.

    Raises:
        BackendError: the tensors have not the rows of the call, or the results are no tensors with them.
    """
    call: CurrentCall = layer.call
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
    if not given:
        raise BackendError(f"{call.place_of(layer)} gets no tensor with the rows that adapter_names is about.")
    require_rows(layer, call, rows, given[0])
    leading = given[0].shape[0]
    layout = rows.layout(leading, given[0].device, sort=True)

    def of(part: Part, value: Any) -> Any:
        has_rows = isinstance(value, Tensor) and value.dim() and value.shape[0] == leading
        if not has_rows:
            return value
        return value[part.rows] if layout.order is None else value.index_select(0, part.index.to(value.device))

    found = []
    for part in layout.parts:
        with call.looking_at(part):
            y = function(*(of(part, value) for value in args), **{k: of(part, v) for k, v in kwargs.items()})
        outputs = y if isinstance(y, tuple) else (y,)
        if not all(isinstance(one, Tensor) and one.dim() and one.shape[0] == len(part.index) for one in outputs):
            kinds = [tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__ for one in outputs]
            raise BackendError(
                f"{call.place_of(layer)} gives {', '.join(map(str, kinds))} for {len(part.index)} rows, so the rows of "
                "other adapters cannot be put beside it. Run one batch an adapter."
            )
        found.append(outputs)
    joined = tuple(torch.cat(parts) for parts in zip(*found, strict=True))
    whole = joined if layout.back is None else tuple(one.index_select(0, layout.back) for one in joined)
    return whole if isinstance(y, tuple) else whole[0]
