"""The weights of a base model on disk, in one safetensors file or in shards, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorafa.errors import CheckpointError, SourceError, bounded, did_you_mean
from lorafa.storage.hub import locate
from lorafa.storage.paths import is_inside, user_path
from lorafa.storage.whole import read_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class BaseWeights:
    """Names of tensors and the files that hold them; nothing is kept in memory."""

    def __init__(self, source: str | Path) -> None:
        """Look a model up.

        Args:
            source: a safetensors file, the index of a sharded model, a folder with either, or a Hub id whose files are
                in the local cache.

        Raises:
            SourceError: there is no such file, folder or cached repository, or a shard is missing.
            CheckpointError: a file is damaged.
        """
        self.path = _find(source)
        if self.path.suffix == ".json":
            self._files = shards(self.path)
        else:
            self._files = dict.fromkeys(_names(self.path), self.path)

    def read(self, names: Sequence[str]) -> Tensor:
        """The first of ``names`` that is there, on the CPU in the dtype it is stored in.

        Raises:
            CheckpointError: none is there, or its file is damaged.
        """
        name = next((name for name in names if name in self._files), None)
        if name is None:
            raise CheckpointError(
                f"{self.path} has no tensor {names[0]!r}.{did_you_mean(names[0], self._files)} Name the weights of the "
                "model that was quantized. Nothing was changed."
            )
        try:
            with safe_open(self._files[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise _damaged(self._files[name], error) from error


def _find(source: str | Path) -> Path:
    path = user_path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        return locate(source, [WHOLE, INDEX], local_files_only=True)
    for name in (WHOLE, INDEX):
        if (path / name).is_file():
            return path / name
    raise SourceError(
        f"The folder {str(path)!r} has no {WHOLE} and no {INDEX}. Name the folder of the model that was quantized, "
        "saved with safetensors, or the file itself."
    )


def shards(index: Path) -> dict[str, Path]:
    """The file of each tensor of a sharded model, by its index.

    Raises:
        SourceError: a shard is missing.
        CheckpointError: the index is damaged.
    """
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict):
        raise CheckpointError(f"{index} has no 'weight_map', which says which file holds what. Fetch it again.")
    if odd := [bounded(repr(file), 200) for file in files.values() if not is_inside(file)]:
        raise CheckpointError(
            f"{index} names {odd[0]} among its files, which is no name or lies outside of its folder. Nothing was "
            "read. Fetch it again, from a source you trust."
        )
    for shard in sorted(set(files.values())):
        if not (index.parent / shard).is_file():
            raise SourceError(f"{index} names {shard!r}, which is not in its folder. Fetch the missing file.")
    return {name: index.parent / shard for name, shard in files.items()}


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is no safetensors file, or is damaged: {error}. Fetch or save it again.")
