"""Whole tables in files: when a file brings the base's input embedding and output head, and under which names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorafa.config import LoraConfig
from lorafa.errors import CheckpointError, ConfigError, SourceError, warn
from lorafa.layers.host import Host
from lorafa.layers.parts import Stored
from lorafa.settings.checks import is_int
from lorafa.settings.expressions import fits
from lorafa.storage.hub import locate
from lorafa.storage.whole import read_json
from lorafa.surgery.alone import modules_alone
from lorafa.surgery.walk import name_of, places, tables, uncompiled

Tables = Literal["none", "adapted", "all"]
"""Which of the base's tables a file holds: none, those that carry an adapter, or both."""
_USUAL_NAMES = ("embed_tokens", "lm_head")


def which_tables(config: LoraConfig, model: nn.Module, wanted: str | bool) -> Tables:
    """Which of the base's tables go into a file of the adapter.

    Args:
        wanted: as ``save_embedding_layers``: True takes both tables, False none. "auto" takes both if the vocabulary
            was resized since the base was saved, because the new rows live in no other file. Else it takes, as PEFT
            does, those that are adapted if a target has the usual name of one and no single rows are trained.

    Raises:
        ConfigError: another value.
    """
    if isinstance(wanted, bool):
        return "all" if wanted else "none"
    if wanted != "auto":
        raise ConfigError(
            f"save_embedding_layers has no value {wanted!r}. Pass True, False or 'auto', which saves embedding and "
            "head where they are adapted or were resized."
        )
    if was_resized(config, model):
        return "all"
    return "adapted" if _targets_one(config, model) and config.trainable_token_indices is None else "none"


def _targets_one(config: LoraConfig, model: nn.Module) -> bool:
    targets = config.target_modules or ()
    if isinstance(targets, str):
        names = [place.name for place in places(model) if place.name.rpartition(".")[2] in _USUAL_NAMES]
        return any(fits("target_modules", targets, name) for name in names)
    return any(name in targets for name in _USUAL_NAMES)


def table_entries(
    model: nn.Module, name: str, pristine: Mapping[int, Tensor], which: Tables = "all"
) -> Iterator[Stored]:
    """The base's tables, each with its bias, by their names in a file of adapter ``name``.

    Those that the adapter has a copy of as a whole (``modules_to_save``) are in a file anyway.

    Args:
        pristine: identity of a merged tensor -> the one it stands in for.
    """
    if which == "none":
        return
    ends = {id(inner): held for inner, held in (_taken_apart(table, name) for table in tables(model))}
    for key, path, module in modules_alone(model, name):
        held = ends.get(id(module))
        if held is None or any(host.trains_whole for host in held) or not (held or which == "all"):
            continue
        for end, parameter in module._parameters.items():
            if parameter is not None:
                yield base_entry(f"{key}.{end}", f"{path}.{end}", parameter, pristine)


def _taken_apart(table: nn.Module, name: str) -> tuple[nn.Module, list[Host]]:
    """A table itself, and what stands around it for adapter ``name``."""
    around = []
    while isinstance(table, Host):
        around.append(table)
        table = uncompiled(table.wrapped())
    return table, [host for host in around if name in host.held() and not host.is_empty(name)]


def base_entry(key: str, live: str, tensor: Tensor, pristine: Mapping[int, Tensor]) -> Stored:
    """A tensor of the base as a file holds it: where an update is merged into it, the one it stands in for."""
    return Stored(key, None, pristine[id(tensor)]) if id(tensor) in pristine else Stored(key, live, tensor)


# ---- was the vocabulary resized?


def was_resized(config: LoraConfig, model: nn.Module) -> bool:
    """Whether the model's vocabulary has another size than that of the base it was loaded from.

    The base's config is read from its folder or from the Hub's local cache, never from the network. Where there is
    none, the model itself may tell: transformers resizes the table and leaves the size its parent was made with. Warns
    where a base is named and neither tells.
    """
    now = _vocabulary(getattr(model, "config", None))
    if now is None:
        return False
    names = dict.fromkeys(name for name in (name_of(model), config.base_model_name_or_path) if name)
    for before in (*(_stored_vocabulary(model, name, config.revision) for name in names), _made_with(model)):
        if before is not None:
            return before != now
    if names:
        warn(
            f"Whether the vocabulary was resized is not known: no config.json of {' or '.join(names)} is at hand to "
            "compare with. If tokens were added, save with save_embedding_layers=True, else their rows are lost; "
            "False says that none were."
        )
    return False


def _vocabulary(config: Any) -> int | None:
    """The size of the text vocabulary a model's config says, which may be in a config inside it."""
    inner = getattr(config, "get_text_config", None)
    size = getattr(inner() if callable(inner) else config, "vocab_size", None)
    return size if is_int(size) else None


def _stored_vocabulary(model: nn.Module, name: str, revision: str | None) -> int | None:
    """The vocabulary of the config in the folder or cached repository ``name``; None where there is none to read."""
    live: Any = model.config
    commit = getattr(live, "_commit_hash", None) or revision
    try:
        path = locate(name, ["config.json"], local_files_only=True, revision=commit)
        if hasattr(live, "get_text_config"):  # sizes left at their default may not be in the file
            return _vocabulary(type(live).from_pretrained(str(path.parent)))
        size = read_json(path).get("vocab_size")
    except (SourceError, CheckpointError, OSError, ValueError):
        return None
    return size if is_int(size) else None


def _made_with(model: nn.Module) -> int | None:
    """The ``vocab_size`` that the parent of the input embedding was made with, where it keeps it."""
    table = next(iter(tables(model)), None)
    inner = (module for module in model.modules() if module is not model)  # the model's own follows when it is resized
    parents = (module for module in inner if table is not None and any(child is table for child in module.children()))
    return next((size for parent in parents if is_int(size := getattr(parent, "vocab_size", None))), None)


def require_equal_tables(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if a file has different tables for what is one table here."""
    first: dict[int, str] = {}
    for entry in table_entries(model, name, {}):
        if entry.key not in tensors:
            continue
        source = first.setdefault(id(entry.tensor), entry.key)
        if source != entry.key and not torch.equal(tensors[entry.key], tensors[source].to(tensors[entry.key])):
            raise CheckpointError(
                f"The file has different tables {source!r} and {entry.key!r}, and the model ties them, so one of the "
                "two would be lost. Load it on a base whose config says tie_word_embeddings=False. Nothing was loaded."
            )
