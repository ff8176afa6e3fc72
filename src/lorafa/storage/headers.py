"""What the headers of a model's safetensors files say of its weights, none of which is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lorafa.errors import CheckpointError, SourceError
from lorafa.storage.base_weights import INDEX, WHOLE, shards
from lorafa.storage.hub import locate
from lorafa.storage.tensors import are_counts, entries_of


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a model as they lie on disk."""

    bytes: int
    by_dtype: Mapping[str, int]
    """Bytes of each number format, by its name in the files ("BF16")."""
    numbers: int
    """How many numbers, of quantized weights how many codes."""
    files: int
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The shape of each weight, by its name in the files."""

    @property
    def main_dtype(self) -> str:
        """The format of most of the bytes."""
        return max(self.by_dtype, key=lambda name: self.by_dtype[name])


def stored_weights(model: str | Path) -> StoredWeights | None:
    """Read the headers of a folder, or of a Hub model that is in the local cache; None where there are none.

    Raises:
        SourceError: a shard is missing.
        CheckpointError: a file is damaged.
    """
    files = _files(model)
    if not files:
        return None
    by_dtype: Counter[str] = Counter()
    numbers = 0
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, entry in entries_of(file).items():
            shape, dtype, (first, last) = entry.get("shape"), entry.get("dtype"), entry["data_offsets"]
            if not are_counts(shape) or not isinstance(dtype, str) or not are_counts([first, last]):
                raise CheckpointError(
                    f"{file} is damaged: its header gives {name!r:.200} no shape, format and place. Fetch it again."
                )
            shapes[name] = tuple(shape)
            by_dtype[dtype] += last - first
            count = 1
            for size in shape:
                count *= size
            numbers += count
    return StoredWeights(sum(by_dtype.values()), dict(by_dtype), numbers, len(files), shapes)


def _files(model: str | Path) -> list[Path]:
    folder = Path(model)
    if not folder.is_dir():
        try:
            found = locate(str(model), [WHOLE, INDEX], local_files_only=True)
        except SourceError:
            return []
    else:
        found = next((folder / name for name in (WHOLE, INDEX) if (folder / name).is_file()), folder)
    if found == folder:
        return []
    return sorted(set(shards(found).values())) if found.suffix == ".json" else [found]
