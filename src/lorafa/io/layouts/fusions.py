"""Which layers models put into one, in the order of its rows, by the names they have."""

from __future__ import annotations

from collections.abc import Iterator

from lorafa.io.layouts.base import OWN_LAYER
from lorafa.io.layouts.names import BaseNames

_QKV = (
    *(("q_proj", "k_proj", "v_proj"), ("to_q", "to_k", "to_v"), ("query", "key", "value"), ("wq", "wk", "wv")),
    ("q", "k", "v"),
)
_GATE_UP = (("gate_proj", "up_proj"), ("w1", "w3"))
FUSIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(("qkv_proj", "W_pack", "Wqkv", "c_attn", "qkv", "to_qkv"), _QKV),
    "to_added_qkv": (("add_q_proj", "add_k_proj", "add_v_proj"),),
    "to_kv": (("to_k", "to_v"),),
    "gate_up_proj": _GATE_UP,
}
"""A layer -> names of the layers whose rows it holds one after the other, all of the first before those of the next."""
INTERLEAVED = {"query_key_value": _QKV, "wqkv": _QKV, "attn.qkv_proj": _QKV}
"""The same of layers whose rows go head by head, or in groups of heads as CodeGen's ``attn.qkv_proj``: which are whose
depends on the numbers of heads and on the model. A name of two parts is that of the module and its layer."""
EQUAL = {"v_proj": "k_proj", "to_v": "to_k", "value": "key", "wv": "wk", "v": "k", "add_v_proj": "add_k_proj"} | {
    "up_proj": "gate_proj",
    "w3": "w1",
}
"""Layers that have as many rows as another one."""


def parent(name: str, base: BaseNames) -> tuple[str, str] | None:
    """(module of the model that the layer ``name`` of a file is in, its last name); None where there is none."""
    if OWN_LAYER in name:
        return None
    owner, _, leaf = name.rpartition(".")
    home = base.home(owner) if owner else ""
    return None if home is None else (home, leaf)


def fusions_of(owner: str, leaf: str) -> tuple[bool, tuple[tuple[str, ...], ...]]:
    """(whether rows are interleaved, groups of layers that may be in it) of a layer called ``leaf`` in ``owner``."""
    for name in (leaf, f"{owner.rpartition('.')[2]}.{leaf}"):
        if name in INTERLEAVED:
            return True, INTERLEAVED[name]
    return False, FUSIONS.get(leaf, ())


def at(owner: str, leaf: str) -> str:
    return f"{owner}.{leaf}" if owner else leaf


def groups_in(base: BaseNames, owner: str, groups: tuple[tuple[str, ...], ...]) -> Iterator[tuple[str, ...]]:
    """The groups whose layers are all in the module ``owner`` of the model."""
    for group in groups:
        if all(at(owner, leaf) in base.layers for leaf in group):
            yield group
