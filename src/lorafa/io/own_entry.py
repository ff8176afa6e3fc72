"""What lorafa says of an adapter in the header of its file, where no other reader minds it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafa.errors import CheckpointError
from lorafa.initializers.settings import START_SETTINGS
from lorafa.storage.fingerprint import METADATA_KEY, from_metadata
from lorafa.variants import switches

_CHANGED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", *START_SETTINGS)
_FINGERPRINTS = ("base", "quantized")
_MAPPINGS = ("start", "config", "own", "fallbacks", "numbers", *_FINGERPRINTS)
_DESCRIPTION = {"shape": list, "dtype": str, "hash": str, "sample": list}


def changed_fields() -> tuple[str, ...]:
    """Fields that the config in a file may have otherwise than the adapter's own."""
    return (*_CHANGED, *switches())


def own_entry(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """The entry as it was written; empty for a file of another library.

    Raises:
        CheckpointError: some of it is not what lorafa writes there.
    """
    entry = from_metadata(header)
    for name in _MAPPINGS:
        _require(path, name, "a mapping", isinstance(entry.get(name, {}), dict))
    for name in _FINGERPRINTS:
        layers = entry.get(name, {}).values()
        _require(path, name, "a fingerprint of each layer", all(map(_is_description, layers)))
    numbers = entry.get("numbers", {}).values()
    _require(path, "numbers", "a text for each field", all(isinstance(number, str) for number in numbers))
    described = entry.get("base", {}).keys() >= entry.get("quantized", {}).keys()
    _require(path, "base", "a fingerprint of each layer that is quantized", described)
    reasons = entry.get("fallbacks", {}).values()
    _require(path, "fallbacks", "a reason for each layer", all(isinstance(reason, str) for reason in reasons))
    return entry


def _require(path: Path, name: str, what: str, holds: bool) -> None:
    if not holds:
        raise CheckpointError(
            f"{path}: {name!r} of the entry {METADATA_KEY!r} in its header is not {what}. The file is damaged, or was "
            "changed by hand: fetch or save it again."
        )


def _is_description(value: object) -> bool:
    """Whether it is what :func:`lorafa.storage.fingerprint.describe` gives, or None."""
    if value is None:
        return True
    if not isinstance(value, dict) or not all(isinstance(value.get(key), kind) for key, kind in _DESCRIPTION.items()):
        return False
    counts = all(type(size) is int and 0 <= size < 2**63 for size in value["shape"])
    return counts and all(type(number) in (int, float) and abs(number) < 2**128 for number in value["sample"])
