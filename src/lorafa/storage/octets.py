"""How tensors lie in a safetensors file: 8 bytes of length, a header of json, the bytes of one tensor after another."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "C64": torch.complex64,
}  # fmt: skip
"""Number formats by their names in a header, of those that fill whole bytes."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def octets(tensor: Tensor) -> memoryview:
    """The bytes of a tensor that is in one piece, to be read or written in place."""
    if not tensor.numel():
        return memoryview(b"")
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def header_of(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """What stands before the bytes of tensors that lie in this order.

    Args:
        tensors: name, dtype, shape and number of bytes of each.
        metadata: texts for other readers, beside ``{"format": "pt"}``.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, dtype, shape, nbytes in tensors:
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begin at a multiple of 8, as the format asks
    return len(text).to_bytes(8, "little") + text
