"""Whether the config and the tensors in a folder are of one save, and where the config is after a save that was killed.

The header of the tensors says what the fields of the config were that change numbers. So a config of another save is
refused, though it names the same layers. Names and paths may be edited, and files of other programs say nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lorafa.config import CONFIG_NAME, LORAFA_ONLY, LoraConfig
from lorafa.errors import CheckpointError, shorten
from lorafa.storage.fingerprint import from_metadata
from lorafa.storage.tensors import read_header
from lorafa.storage.together import left_in
from lorafa.storage.whole import read_json

NUMBERS, WHOLE = "numbers", "config_digest"
"""Entries of the header: the fields that change numbers, and a digest of all of the config."""
_FREE = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias",
    "target_parameters", "megatron_config", "megatron_core", "lora_dropout",
})  # fmt: skip
"""Fields that name something, of which the names of the tensors have to agree, or that change a training alone."""
_LONGEST = 60
"""Characters of a value that is written as it is; longer ones are digests."""


def tied(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the header of the tensors says of the config in the file beside them."""
    return {NUMBERS: _numbers(config), WHOLE: _digest(config)}


def _numbers(config: Mapping[str, Any]) -> dict[str, str]:
    default = _default()
    return {
        field: as_text(config.get(field, default[field]))
        for field in default
        if field not in _FREE and field not in LORAFA_ONLY
    }


@cache
def _default() -> Mapping[str, Any]:
    return LoraConfig().to_dict()


def as_text(value: Any) -> str:
    """A value of a config, equal for equal numbers and for all that says nothing; digested where it is long."""
    text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"))
    return text if len(text) <= _LONGEST else f"#{_hash(text)}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()} or None
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value] or None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _digest(config: Mapping[str, Any]) -> str:
    return _hash(json.dumps(config, sort_keys=True))


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def differences(config: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Fields that change numbers and are not what they were: what they are, and what they were.

    Args:
        config: what the file says.
        entry: lorafa's own entry in the header of the tensors; one of a file that says nothing has no differences.
    """
    before, now = entry.get(NUMBERS, {}), _numbers(config)
    return {field: (now[field], before[field]) for field in before if now.get(field, before[field]) != before[field]}


def mismatch(config: Path, tensors: Path, found: Mapping[str, tuple[str, str]]) -> CheckpointError:
    """The error for a config that is not that of the tensors."""
    return CheckpointError(
        f"{config} and {tensors.name} are not of one save: {shorten(_in_words(found), 3)}. Restore the file that is of "
        "another save. If the config was edited on purpose, load with ignore_config_mismatch=True and save the "
        "adapter. Nothing was loaded."
    )


def _in_words(found: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    for field, (now, before) in found.items():
        digested = now.startswith("#") or before.startswith("#")
        yield f"{field} is another" if digested else f"{field} is {now} and was {before} when the tensors were saved"


def accepted(config: Path, changed: Mapping[str, Any], found: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """What is to be changed of an edited config, so that the edit counts.

    Args:
        changed: fields that the adapter has otherwise than its file.
        found: what was edited.

    Raises:
        CheckpointError: the file has another value than the adapter in a field that was edited.
    """
    other = [field for field, (_, before) in found.items() if field in changed and as_text(changed[field]) != before]
    if other:
        raise CheckpointError(
            f"{config}: {shorten(other, 3)} cannot be edited in the file. The adapter itself has another value: its "
            "file is written in the form that other programs read. Restore the file, load the adapter, and change the "
            "value in the program. Nothing was loaded."
        )
    return {field: value for field, value in changed.items() if field not in found}


def config_left(folder: Path, tensors: Path) -> Path | None:
    """The config that goes with tensors in a folder without one, where a save was killed that had taken it away.

    Raises:
        CheckpointError: the tensors are damaged.
    """
    left = list(left_in(folder, CONFIG_NAME))
    if not left:
        return None
    wanted = from_metadata(read_header(tensors)).get(WHOLE)
    return next((path for path, is_old in left if (is_old if wanted is None else _is(path, wanted))), None)


def _is(path: Path, digest: str) -> bool:
    try:
        return _digest(read_json(path)) == digest
    except CheckpointError:  # another process is writing it
        return False
