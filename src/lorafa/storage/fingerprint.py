"""A fingerprint of the base weights an adapter was made for: a few rows of every adapted layer.

An update B @ A is only right on the weights it was trained on. The fingerprint travels in the file and is compared when
the file is loaded. It is the same whether the weights are loaded in float32 or bfloat16, on any device.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafa.errors import CheckpointError, shorten
from lorafa.storage.parsed import from_json

METADATA_KEY = "lorafa"
ROWS = 3
SAMPLES = 8

Fingerprint = dict[str, Any]
"""Layer name -> {"shape", "dtype", "hash", "sample"}, or None for a layer whose weights were not readable."""


def fingerprint(module_weights: Iterable[tuple[str, Tensor | None]]) -> Fingerprint:
    """Describe the base weights of the adapted layers; does not depend on their order.

    Args:
        module_weights: (layer name, weight of any shape); None for a layer that gives no weight, such as a quantized
            one: it is recorded as absent and not compared.
    """
    described = {name: None if weight is None else describe(weight) for name, weight in module_weights}
    return dict(sorted(described.items()))


def describe(weight: Tensor) -> dict[str, Any]:
    """Shape and dtype of a weight, a hash of a few of its rows in bfloat16, and some of their values."""
    return described_rows(_some_rows(weight.detach()), weight.shape, weight.dtype)


def described_rows(rows: Tensor, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """The same of a weight of which only the rows ``some_rows`` of two or more dimensions are at hand."""
    rounded = rows.to(torch.float32).to(torch.bfloat16).cpu().contiguous()
    values = rounded.flatten()
    picked = torch.linspace(0, max(values.numel() - 1, 0), min(SAMPLES, values.numel())).long()
    return {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "hash": _hash(values),
        "sample": values[picked].tolist(),
    }


def _some_rows(weight: Tensor) -> Tensor:
    """The first, middle and last row; a weight of one dimension is one row. Picked before anything is copied."""
    table = weight if weight.dim() > 1 else weight.reshape(1, -1)
    if not table.shape[0]:
        return table
    # one index for all rows would wake every thread for three of them
    return torch.stack([table[row] for row in some_rows(table.shape[0])])


def some_rows(count: int) -> list[int]:
    """Which of ``count`` rows, one or more, are looked at."""
    return sorted({round(i * (count - 1) / (ROWS - 1)) for i in range(ROWS)})


def _hash(values: Tensor) -> str:
    """blake2b of bfloat16 values, low byte first whatever the machine."""
    octets = values.view(torch.uint8)
    if sys.byteorder == "big":
        octets = octets.reshape(-1, 2).flip(1).contiguous()
    return hashlib.blake2b(ctypes.string_at(octets.data_ptr(), octets.numel()), digest_size=8).hexdigest()


def digest_of_all(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Tells models apart by all their tensors: name, shape, dtype, and norm and sum of each, to the digits that do not
    depend on the order in which they are added up."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        values = tensor.detach()
        wide = values if values.is_floating_point() and values.dtype.itemsize > 1 else values.to(torch.float64)
        total = float(wide.sum(dtype=torch.float64))
        norm = float(torch.linalg.vector_norm(wide, dtype=torch.float64))
        share = total / norm if norm else 0.0
        digest.update(f"{name} {tuple(values.shape)} {values.dtype} {norm:.8e} {share:.8f}\n".encode())
    return digest.hexdigest()


def compare_fingerprints(stored: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """Names of the layers both describe whose weights differ; layers that were not readable are passed over.

    So are empty weights, which describe nothing: earlier versions wrote that of the shard they saw under ZeRO-3.
    """
    both = [name for name in stored if _says_something(stored[name]) and _says_something(actual.get(name))]
    return [name for name in both if not _same(stored[name], actual[name])]


def _says_something(description: Mapping[str, Any] | None) -> bool:
    return description is not None and 0 not in description["shape"]


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if list(one["shape"]) != list(other["shape"]):
        return False
    if one["dtype"] == other["dtype"] or "float16" not in (one["dtype"], other["dtype"]):
        return bool(one["hash"] == other["hash"])
    # float16 rounds before bfloat16 does, and loses small numbers: the hashes of the same weights differ.
    a, b = torch.tensor(one["sample"]), torch.tensor(other["sample"])
    if a.shape != b.shape:
        return False
    return bool(torch.allclose(a, b, rtol=2**-7, atol=2**-23))


def check_base(
    stored: Mapping[str, Any], actual: Mapping[str, Any], path: str | Path, *, base_name: str | None = None
) -> None:
    """Refuse to put an adapter on weights it was not made for.

    Args:
        path: the adapter's file, for the error.
        base_name: the base model the file names, for the error.

    Raises:
        CheckpointError: at least one layer has other weights.
    """
    different = compare_fingerprints(stored, actual)
    if different:
        raise CheckpointError(
            f"{path} was made for another base model: {len(different)} of {len(stored)} adapted layers have other "
            f"weights here: {shorten(different, 3)}. Its update would be added to weights it was not trained on. Load "
            f"{base_name or 'the base it was made for'}, or pass ignore_base_mismatch=True if the difference is meant. "
            "Nothing was loaded."
        )


def to_metadata(entries: Mapping[str, Any]) -> dict[str, str]:
    """The entries as one json text for the header of a safetensors file, which holds texts only."""
    return {METADATA_KEY: json.dumps(entries, sort_keys=True, separators=(",", ":"))}


def from_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What :func:`to_metadata` stored; empty for a file of another library.

    Raises:
        CheckpointError: the entry is there but is not json.
    """
    text = metadata.get(METADATA_KEY)
    if text is None:
        return {}
    try:
        entries = from_json(text)
    except ValueError as error:
        raise CheckpointError(
            f"The entry {METADATA_KEY!r} in the file's header is not json: {error}. Fetch or save the file again."
        ) from error
    if not isinstance(entries, dict):
        raise CheckpointError(
            f"The entry {METADATA_KEY!r} in the file's header is a {type(entries).__name__}, expected a dict. "
            "Fetch or save the file again."
        )
    return entries
