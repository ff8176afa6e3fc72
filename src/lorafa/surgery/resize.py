"""The vocabulary resized while adapters are on: exact where none is on a table, refused by name where one is."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorafa.errors import AdapterError, shorten
from lorafa.layers.host import Host
from lorafa.surgery.walk import hosts, tables


def resize_vocabulary(model: nn.Module, new_num_tokens: int | None, *args: Any, **settings: Any) -> Any:
    """Call the model's own ``resize_token_embeddings``, which replaces tables without looking at what wraps them.

    Args:
        model: the user's model; all other arguments are its method's.

    Raises:
        AdapterError: an adapter, a copy or trained rows are on a table that would change; nothing was changed.
    """
    ends = tables(model)
    plain = [_unwrapped(table) for table in ends]
    taken = _on_tables(model, plain)
    if taken:
        pad_to = args[0] if args else settings.get("pad_to_multiple_of")
        sizes = {_rows(table): _asked(table, new_num_tokens, pad_to) for table in plain}
        if all(old == new for old, new in sizes.items()):  # scripts ask for it always; wrappers would make it fail
            return ends[0]
        old, new = next((old, new) for old, new in sizes.items() if old != new)
        raise AdapterError(
            f"The vocabulary cannot be resized to {new} tokens while {shorten(map(repr, taken))} "
            f"{'carries' if len(taken) == 1 else 'carry'} an adapter, a copy or trained rows of {old} tokens. Nothing "
            "was changed. Resize the base model first, then put the adapter on; with a trained one call "
            "merge_and_unload(), resize what it returns, and go on with a new adapter."
        )
    resize: Any = model.resize_token_embeddings
    return resize(new_num_tokens, *args, **settings)


def _unwrapped(table: nn.Module) -> nn.Module:
    while isinstance(table, Host):
        table = table.get_submodule(table.wrapped_path)
    return table


def _rows(table: nn.Module) -> int:
    return int(table.weight.shape[0])  # type: ignore[union-attr, index]


def _asked(table: nn.Module, size: int | None, pad_to: int | None) -> int:
    size = _rows(table) if size is None else size
    return size if not pad_to else -(-size // pad_to) * pad_to


def _on_tables(model: nn.Module, plain: list[nn.Module]) -> list[str]:
    """Paths of the wrappers that hold a table, or a module that shares its weight and is resized with it."""
    weights = {id(table._parameters.get("weight")) for table in plain} - {id(None)}
    mine = {id(table) for table in plain}
    return [
        path
        for path, host in hosts(model)
        if any(id(part) in mine or id(part._parameters.get("weight")) in weights for part in host.modules())
    ]
