"""Files of tensors: written whole or not at all, and refused when they are damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorafa.config import CONFIG_NAME
from lorafa.errors import CheckpointError, first_line, shorten
from lorafa.storage import HubOptions, locate, written_whole

if TYPE_CHECKING:
    from typing_extensions import Unpack

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class AdapterFiles:
    """Where the two files of an adapter are."""

    config: Path
    weights: Path


def find_adapter_files(
    source: str | Path,
    *,
    subfolder: str | None = None,
    use_safetensors: bool | None = None,
    **hub: Unpack[HubOptions],
) -> AdapterFiles:
    """The files of an adapter in a local folder or a Hub repository; safetensors before ``.bin``.

    Args:
        source: folder, or Hub id such as "owner/name".
        subfolder: where in it to look; adapters not called "default" are in a subfolder of their name.
        use_safetensors: look for safetensors only (True) or for ``.bin`` only (False).
        hub: as :class:`lorafa.storage.HubOptions`.

    Raises:
        SourceError: the folder, repository or one of the files does not exist, or the Hub cannot be reached.
    """
    config = locate(source, [CONFIG_NAME], subfolder=subfolder, **hub)
    return AdapterFiles(config, find_weights(source, subfolder=subfolder, use_safetensors=use_safetensors, **hub))


def find_weights(
    source: str | Path,
    *,
    subfolder: str | None = None,
    use_safetensors: bool | None = None,
    **hub: Unpack[HubOptions],
) -> Path:
    """The file of an adapter's tensors; arguments and errors are those of :func:`find_adapter_files`."""
    wanted = {None: [WEIGHTS_NAME, PICKLE_NAME], True: [WEIGHTS_NAME], False: [PICKLE_NAME]}[use_safetensors]
    return locate(source, wanted, subfolder=subfolder, **hub)


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
        try:
            save_file(_separate(tensors), temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # its way to pass on what the system said
            raise OSError(str(error)) from error


def require_values(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError if a tensor to be written to ``path`` has no values (device meta)."""
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"{path} was not written: {shorten(empty)} {'has' if len(empty) == 1 else 'have'} no values (device "
            "'meta'). Load the weights first."
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
        allow_pickle: read ``.bin`` and the like too, with torch's restricted unpickler.
        require_finite: refuse NaN and infinity.

    Raises:
        CheckpointError: the file is missing, damaged, a pickle, or holds values that are not finite.
    """
    path = Path(path)
    metadata: dict[str, str] = {}
    if path.suffix in PICKLE_SUFFIXES:
        tensors = _read_pickle(path, allow_pickle)
    else:
        tensors, metadata = _read_safetensors(path)
    broken = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if broken and require_finite:
        raise CheckpointError(
            f"{path} holds values that are not finite (NaN or infinity) in {len(broken)} of {len(tensors)} tensors: "
            f"{shorten(broken)}. The training it comes from diverged: take an earlier checkpoint."
        )
    return tensors, metadata


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    _check_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Fetch or save it again.") from error


def _check_size(path: Path) -> None:
    """Compare the length of a safetensors file with what its header promises (8 bytes of length, json, data)."""
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
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path} is no safetensors file: its header is not readable. Fetch it again.") from error
    missing = 8 + length + max(ends, default=0) - size
    if missing > 0:
        raise CheckpointError(
            f"{path} was cut off: {missing} of {size + missing} bytes are missing. Fetch or save it again."
        )


def _read_pickle(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if not allow_pickle:
        raise CheckpointError(
            f"{path} is a pickle, and opening a pickle can run any code its author put in. Ask for a .safetensors "
            "file, or pass allow_pickle=True if you trust the source; it is then read as tensors only."
        )
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path} could not be read: {first_line(error)}. It is damaged, or holds more than tensors: fetch it again."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path} does not hold a dict of tensors. Is it the right file?")
    return tensors
