"""Files of tensors: written whole or not at all, and refused when they are damaged. Sharded tensors, read whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorafa.errors import CheckpointError, first_line, refuse, shorten
from lorafa.numerics.linalg import all_finite
from lorafa.storage.octets import NAMES, header_of, octets
from lorafa.storage.parsed import from_json
from lorafa.storage.whole import written_whole

if TYPE_CHECKING:
    from typing import TypeGuard

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NAME = 1000
"""Characters of the longest name of a tensor that is read; work on a name may grow with its square."""


def is_part(tensor: Tensor, dims: int = 0) -> bool:
    """Whether this process holds a part of the tensor only.

    So it is with a DTensor (FSDP2, tensor parallelism), with a parameter of DeepSpeed ZeRO-3, and with one of FSDP1,
    which is flat: the whole one has ``dims`` dimensions or more.
    """
    return can_be_gathered(tensor) or tensor.dim() < dims or tensor.numel() < getattr(tensor, "ds_numel", 0)


def can_be_gathered(tensor: Tensor) -> bool:
    """Whether :func:`whole` puts the tensor together from several processes."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor, dims: int = 0) -> Tensor | None:
    """All values of a tensor, without gradient; None where only a part is here and it does not say how to get the rest.

    A DTensor is gathered: every process that holds a part of it must call this, in the same order, or all wait.
    """
    if can_be_gathered(tensor):
        full: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
        return full
    return None if is_part(tensor, dims) else tensor.detach()


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all.

    Args:
        tensors: any device, any strides; tensors that share memory are written separately.
        metadata: texts for the header, next to PEFT's ``{"format": "pt"}``.

    Raises:
        CheckpointError: a tensor has no values (device meta), or the file cannot be written.
    """
    require_values(path, tensors)
    with written_whole(path) as temporary:
        put_tensors(temporary, tensors, metadata)


def put_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; one that cannot be written is left as far as it came.

    Raises:
        OSError: of the system.
        CheckpointError: a tensor has a dtype that such a file cannot hold.
    """
    # those of wide numbers first, so that each begins at a multiple of its item size
    ready = sorted(_separate(tensors).items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    if odd := [name for name, tensor in ready if tensor.dtype not in NAMES]:
        raise CheckpointError(f"{path} was not written: no safetensors file can hold the dtype of {shorten(odd)}.")
    entries = [(name, tensor.dtype, tuple(tensor.shape), tensor.nbytes) for name, tensor in ready]
    with open(path, "wb", buffering=0) as file:
        for data in (memoryview(header_of(entries, metadata or {})), *(octets(tensor) for _, tensor in ready)):
            while data:
                data = data[file.write(data) :]


def require_values(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError if a tensor to be written to ``path`` has no values (device meta)."""
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"{path} was not written: {shorten(empty)} {'has' if len(empty) == 1 else 'have'} no values (device "
            "'meta'). Load the weights first."
        )


def require_finite(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError if a tensor to be written to ``path`` holds nan or infinity: it could not be read back."""
    broken = [name for name, tensor in tensors.items() if not all_finite(tensor)]
    if broken:
        raise CheckpointError(
            f"{path} was not written: {len(broken)} of {len(tensors)} tensors hold values that are not finite (NaN or "
            f"infinity): {shorten(broken)}. The training has diverged: go back to an earlier checkpoint. What was "
            "there is as it was."
        )


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two in the same memory."""
    taken: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        held = tensor.detach().to("cpu").contiguous()
        memory = held.untyped_storage().data_ptr()
        separate[name] = held.clone() if memory in taken else held
        taken.add(memory)
    return separate


def read_tensors(
    path: str | Path, *, allow_pickle: bool = False, require_finite: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, on the CPU, and the texts of its header.

    Args:
        allow_pickle: read pickles too (``.bin`` and the like), with torch's restricted unpickler. A file that begins
            as safetensors is read as such whatever it is called.
        require_finite: refuse NaN and infinity.

    Raises:
        CheckpointError: the file is missing, damaged, a pickle, or holds values that are not finite.
    """
    path = Path(path)
    metadata: dict[str, str] = {}
    if is_pickle(path):
        tensors = _read_pickle(path, allow_pickle)
    else:
        tensors, metadata = _read_safetensors(path)
    broken = [name for name, tensor in tensors.items() if not all_finite(tensor)]
    if broken and require_finite:
        raise CheckpointError(
            f"{path} holds values that are not finite (NaN or infinity) in {len(broken)} of {len(tensors)} tensors: "
            f"{shorten(broken)}. The training it comes from diverged: take an earlier checkpoint."
        )
    return tensors, metadata


def is_pickle(path: Path) -> bool:
    """Whether a file is called as a pickle and does not begin as a safetensors file, with the length of its header."""
    if path.suffix not in PICKLE_SUFFIXES:
        return False
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            return start[8:] != b"{" or int.from_bytes(start[:8], "little") >= path.stat().st_size
    except OSError:
        return True


def read_header(path: str | Path) -> dict[str, str]:
    """The texts in the header of a file of tensors, of which none is read; a pickle has none.

    Raises:
        CheckpointError: the file is missing, or damaged.
    """
    path = Path(path)
    if is_pickle(path):
        return {}
    entries_of(path)
    with _damage(path), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Fetch or save it again.") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    entries_of(path)
    with _damage(path), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def entries_of(path: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: ``dtype``, ``shape`` and ``data_offsets`` of each tensor.

    Raises:
        CheckpointError: the file is missing, or shorter than its header promises (8 bytes of length, json, data); a
            name is longer than any that is read.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            header = file.read(length) if length < size else b""
    except OSError as error:
        raise CheckpointError(f"{path} could not be read: {error.strerror or error}. Check the path.") from error
    if start == b"version ":
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights. Run 'git lfs pull' in its folder.")
    if size < 8 or length >= size:
        raise CheckpointError(
            f"{path} is no safetensors file, or was cut off in its header ({size} bytes long). Fetch or save it again."
        )
    try:
        entries: dict[str, dict[str, Any]] = from_json(header)
        entries.pop("__metadata__", None)
        if odd := [name for name, entry in entries.items() if not _is_entry(entry)]:
            raise ValueError(f"what it says of {shorten(odd, 3)} is none")
        missing = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0) - size
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no safetensors file: its header is not readable. Fetch it again.") from error
    if longest := [name for name in entries if len(name) > NAME]:
        raise CheckpointError(
            f"{path} names a tensor in {len(longest[0])} characters, {longest[0][:60]!r}...; names of up to {NAME} are "
            "read. It is no file of a model."
        )
    if missing > 0:
        raise CheckpointError(
            f"{path} was cut off: {missing} of {size + missing} bytes are missing. Fetch or save it again."
        )
    return entries


def _is_entry(entry: object) -> bool:
    """Whether a header says from where to where the bytes of a tensor go, right or wrong."""
    ends = entry.get("data_offsets") if isinstance(entry, dict) else None
    return isinstance(ends, list) and len(ends) == 2 and all(type(end) in (int, float) for end in ends)


def are_counts(values: object) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers that may be a shape."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _read_pickle(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if not allow_pickle:
        error = CheckpointError(
            f"{path} is a pickle, and opening a pickle can run any code its author put in. Ask for a .safetensors "
            "file, or pass allow_pickle=True if you trust the source; it is then read as tensors only."
        )
        refuse(error, "It was read as tensors only.")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path} could not be read: {first_line(error)}. It is damaged, or holds more than tensors: fetch it again."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path} does not hold a dict of tensors. Is it the right file?")
    return tensors
