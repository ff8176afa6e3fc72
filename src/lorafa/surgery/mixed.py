"""Batches that mix adapters: what ``adapter_names`` says of each row, read and checked at the door of the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lorafa.context import Rows
from lorafa.errors import AdapterError, did_you_mean
from lorafa.settings.checks import found
from lorafa.surgery.activate import require_nothing_merged, without_start
from lorafa.surgery.walk import wrappers

BASE = "__base__"
"""The name of no adapter: rows of the base alone, as in PEFT."""
_INPUTS = ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def rows_of(
    model: nn.Module, adapter_names: Any, known: Collection[str], arguments: Mapping[str, Any], *, trains: bool
) -> Rows:
    """The adapters of each row of a call.

    Args:
        adapter_names: for each row the name of an adapter, several of them, or "__base__".
        known: the names of the model's adapters.
        arguments: of the call, by name.
        trains: whether a backward pass may follow.

    Raises:
        AdapterError: no list with a name a row, an unknown name, two adapters of one row that want one place, or the
            base weights are not pristine.
    """
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        raise AdapterError(
            f"adapter_names is a list with the name of an adapter for each row, or {BASE!r} for none, found "
            f"{found(adapter_names)}."
        )
    choices = tuple(_choice(entry, known) for entry in adapter_names)
    shape = next((tuple(v.shape) for v in _inputs(arguments) if v.dim()), None)
    if shape is not None and len(choices) != shape[0]:
        raise AdapterError(
            f"adapter_names has {len(choices)} names, and the batch has {shape[0]} rows. Pass one name for each row; "
            "generate repeats them itself for beams and for several answers."
        )
    require_nothing_merged(model)
    changed = without_start(model)
    if changed is not None:
        raise AdapterError(
            f"The start of adapter {changed!r} is taken out of the base weights, which every row shares. Call "
            "restore_base(model) before adapter_names."
        )
    together = {choice for choice in choices if len(choice) > 1}
    for path, wrapper in wrappers(model) if together else ():
        for choice in together:
            wrapper.require_together(choice, repr(path), trains=trains)
    return Rows(choices, tokens=shape[1] if shape is not None and len(shape) > 1 else 1)


def in_pass(rows: Rows, arguments: Mapping[str, Any]) -> Rows:
    """The same for one of the forward passes that ``generate`` makes, in which rows may be repeated."""
    seen = next((v for v in _inputs(arguments) if v.dim() > 1), None)
    return rows if seen is None else rows.in_pass(seen.shape[0], seen.shape[1])


def _inputs(arguments: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of a call that have its rows: inputs of transformers by name, or whatever comes first."""
    named = [arguments[name] for name in _INPUTS if isinstance(arguments.get(name), Tensor)]
    return named or [value for value in arguments.values() if isinstance(value, Tensor)]


def _choice(entry: Any, known: Collection[str]) -> tuple[str, ...]:
    names = [entry] if isinstance(entry, str) else entry
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise AdapterError(
            f"adapter_names has {found(entry)} for a row. A row has the name of an adapter, a list of names, or "
            f"{BASE!r}."
        )
    chosen = tuple(dict.fromkeys(name for name in names if name != BASE))
    for name in chosen:
        if name not in known:
            raise AdapterError(
                f"adapter_names: the model has no adapter {name!r}.{did_you_mean(name, known)} It has: "
                f"{', '.join(known) or '(none)'}. {BASE!r} stands for the base alone."
            )
    return chosen
