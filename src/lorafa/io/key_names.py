"""Names of an adapter's tensors: without what wrappers of the model have put into them, and by other words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain

from torch import Tensor

from lorafa.errors import CheckpointError, ConfigError
from lorafa.settings.expressions import REPLACED, Expressions
from lorafa.surgery.walk import PREFIX

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What torch.compile, FSDP1 and its activation checkpointing call the module they wrap."""
_IN_PARALLEL = f"module.{PREFIX}"
"""How names begin that DataParallel, DistributedDataParallel or DeepSpeed have put theirs before."""
_FACTOR = re.compile(r"^(.*\.lora_[AB])\.([^.]+)(\.(?:weight|bias))$")
_BARE_FACTOR = re.compile(r"^(.*\.lora_embedding_[AB])\.([^.]+)$")
_COPIES = "modules_to_save"
_BY_ADAPTER = {_COPIES, "trainable_tokens_delta"}
"""What else of a wrapper is by the adapter's name."""
_NORM = ".lora_magnitude_vector"


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names they have in a file of PEFT, but for its prefix.

    Taken out are the prefix ``base_model.model.``; what torch.compile, FSDP1, activation checkpointing and
    DistributedDataParallel put into names; the adapter's own name, which a live model has in each of them; and the
    ``.weight`` that DoRA's norms have in some files. A copy of a module (``modules_to_save``) has the module's names,
    unless the file has both.

    Raises:
        CheckpointError: the names are those of several adapters, or two tensors get one name.
    """
    renamed = {key: bare(key) for key in tensors}
    adapters = {found for name in renamed.values() if (found := _adapter_in(name)) is not None}
    if len(adapters) > 1:
        raise CheckpointError(
            f"The names of the tensors carry those of {len(adapters)} adapters: {', '.join(sorted(adapters))}. A file "
            "holds one: save each with save_pretrained, or leave the others' tensors out. Nothing was loaded."
        )
    adapter = next(iter(adapters), None)
    renamed = {key: _without_adapter(name, adapter) for key, name in renamed.items()}
    names = set(renamed.values())
    renamed = {key: name if (short := _of_copied(name)) in names else short for key, name in renamed.items()}
    if len(set(renamed.values())) != len(renamed):
        taken: dict[str, str] = {}
        for key, name in renamed.items():
            if name in taken:
                raise CheckpointError(
                    f"The tensors {taken[name]!r} and {key!r} would both be {name!r}. Leave one of the two out of the "
                    "file. Nothing was loaded."
                )
            taken[name] = key
    return {renamed[key]: tensor for key, tensor in tensors.items()}


def bare(key: str) -> str:
    """The name of a tensor in the user's model, the adapter's name in it, whatever is wrapped around the model."""
    return _unwrapped(key).removeprefix(_IN_PARALLEL).removeprefix(PREFIX)


def _of_copied(name: str) -> str:
    """The name of a module's own tensor for that of a copy of it."""
    return ".".join(part for part in name.split(".") if part != _COPIES)


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _adapter_in(name: str) -> str | None:
    """The adapter's name in that of one of its tensors, where it has one."""
    for pattern in (_FACTOR, _BARE_FACTOR):
        if match := pattern.match(name):
            return match[2]
    norm = _norm(name)
    return norm[1].removesuffix(".weight") if norm and norm[1] != "weight" else None


def _norm(name: str) -> tuple[str, str] | None:
    """The name of a norm and what stands behind it; None of other names."""
    before, mark, behind = name.rpartition(f"{_NORM}.")
    return (before + _NORM, behind) if mark and all(behind.split(".")) else None


def _without_adapter(name: str, adapter: str | None) -> str:
    if norm := _norm(name):
        return norm[0]
    if adapter is None:
        return name
    parts = name.split(".")
    kept = [
        part
        for before, part in zip(["", *parts], parts, strict=False)
        if not (part == adapter and (before.startswith("lora_") or before in _BY_ADAPTER))
    ]
    return ".".join(kept)


def renamed(tensors: dict[str, Tensor], key_mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """The tensors by other keys.

    Args:
        key_mapping: regular expression -> replacement. In each key the first that occurs is replaced, and no other; the
            prefix ``base_model.model.`` is not seen by them and stays. So PEFT reads it.

    Raises:
        ConfigError: it is no such mapping, or its expressions take too long.
        CheckpointError: two tensors would have one name.
    """
    if key_mapping is None:
        return tensors
    if not isinstance(key_mapping, Mapping) or not all(isinstance(text, str) for text in chain(*key_mapping.items())):
        raise ConfigError(
            f"key_mapping has regular expressions and what replaces them, both texts, found {key_mapping!r:.200}."
        )
    found = Expressions("key_mapping", list(key_mapping), REPLACED)
    replacements, new = list(key_mapping.values()), dict[str, str]()
    for key in tensors:
        prefix = next((start for start in (PREFIX, "base_model.") if key.startswith(start)), "")
        name = key.removeprefix(prefix)
        replaced = found.replace(name, replacements)
        other = new.setdefault(prefix + (name if replaced is None else replaced), key)
        if other != key:
            raise CheckpointError(
                f"key_mapping gives {other!r:.200} and {key!r:.200} one name. Tell them apart in what replaces them."
            )
    return {name: tensors[key] for name, key in new.items()}
