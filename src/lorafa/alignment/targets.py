"""A folder of what a teacher says, row by row: its likeliest tokens at each supervised position.

The folder holds ``targets.json``, which says of whom it is and how it was taken, and safetensors files of rows, each
written whole. A row is found by a hash of all the model reads up to its last supervised position, and of its labels,
whatever batch and padding it comes in. Files are read where they lie: of the rows themselves nothing stays in memory.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lorafa.alignment.divergences.letters import Letters
from lorafa.errors import CheckpointError, ConfigError, first_line
from lorafa.models.rows import IGNORE_INDEX
from lorafa.storage.leavings import is_temporary, remove_left_over
from lorafa.storage.tensors import write_tensors
from lorafa.storage.whole import make_folder, read_json, write_json

MANIFEST = "targets.json"
FILES = "targets-*.safetensors"
MOST_PENDING = 64 * 2**20
"""Bytes of rows that are in memory before they are written."""
FORMAT = 1
_PARTS = ("ids", "likely", "gold", "rest")


@dataclass(frozen=True)
class About:
    """Whose targets a folder has, and how they were taken."""

    teacher: str
    """A fingerprint of its weights."""
    called: str
    """What it is called, for messages."""
    temperature: float
    top_k: int
    vocabulary: int
    """Tokens that the distributions are of: those that teacher and student both have."""
    rows: str | None = None
    """A hash of all the rows it was made for; None where rows are added as they come."""
    files: str | None = None
    """What tells the teacher's files from others, so that it need not be loaded to know it."""


def bytes_a_position(top_k: int) -> int:
    """What a position takes on the disk: of each likely token its id and a float32, and two more of these."""
    return 8 * top_k + 8


def row_keys(batch: Mapping[str, Any]) -> tuple[list[bytes], list[int]]:
    """A hash of each row of a batch, and how many supervised positions it has.

    Raises:
        ConfigError: the batch has inputs that are not one number a token.
    """
    shifted = batch.get("shift_labels")
    targets = batch["labels"][:, 1:] if shifted is None else shifted
    shape, mask = batch["input_ids"].shape, batch.get("attention_mask")
    names = sorted(batch.keys() - {"labels", "shift_labels", "attention_mask"})
    for name in names:
        if not isinstance(batch[name], Tensor) or batch[name].shape != shape:
            raise ConfigError(
                f"The batch has {name!r}, which is not one number a token, so its rows cannot be told apart and the "
                "teacher's targets not be kept. Train without a cache (align.cache=false)."
            )
    counted = (targets != IGNORE_INDEX).cpu()
    inputs = [batch[name].cpu().to(torch.int64) for name in names]
    keys = []
    for row, own in enumerate(counted):
        # a causal model does not look ahead: what comes after the last position that counts says nothing of the row
        end = int(own.nonzero().max()) + 1 if bool(own.any()) else 0
        attended = torch.ones(end, dtype=torch.bool) if mask is None else mask[row, :end].cpu().bool()
        digest = hashlib.blake2b(digest_size=16)
        for name, values in zip(names, inputs, strict=True):
            digest.update(f"{name} {int(attended.sum())} ".encode() + values[row, :end][attended].numpy().tobytes())
        digest.update(targets[row, :end].cpu().to(torch.int64)[attended].numpy().tobytes())
        keys.append(digest.digest())
    return keys, counted.sum(dim=-1).tolist()


class Targets:
    """The rows of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[bytes, tuple[Path, int, int]] = {}
        self._open: dict[Path, Any] = {}
        self._pending: dict[bytes, Letters] = {}
        self._size = 0

    def about(self) -> About | None:
        """What the folder says of itself; None where it has nothing yet.

        Raises:
            CheckpointError: it cannot be read, or is of another version.
        """
        path = self.folder / MANIFEST
        if not path.is_file():
            if self.folder.is_dir() and any(not is_temporary(one) for one in self.folder.iterdir()):
                raise CheckpointError(
                    f"{self.folder} is not empty and holds no targets of a teacher ({MANIFEST} is missing). Name "
                    "another folder."
                )
            return None
        known = read_json(path)
        try:
            if known.pop("format") != FORMAT:
                raise KeyError("format")
            return About(**known)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is of another version of lorafa. Delete the folder, or name another."
            ) from error

    def claim(self, about: About) -> None:
        """Say whose targets will be here, where that is not said yet."""
        make_folder(self.folder)
        remove_left_over(self.folder, FILES)
        write_json(self.folder / MANIFEST, asdict(about) | {"format": FORMAT})

    def refresh(self) -> None:
        """Look which rows are there, those of other processes too.

        Raises:
            CheckpointError: a file is damaged.
        """
        seen = {path for path, _, _ in self._places.values()}
        for path in sorted(self.folder.glob(FILES)):
            if path in seen:
                continue
            with _reading(path), safe_open(path, framework="pt") as file:
                keys, counts = file.get_tensor("keys"), file.get_tensor("counts").tolist()
            start = 0
            for key, count in zip(keys, counts, strict=True):
                self._places.setdefault(bytes(key.tolist()), (path, start, count))
                start += count

    def __contains__(self, key: bytes) -> bool:
        return key in self._pending or key in self._places

    def __len__(self) -> int:
        return len(self._places.keys() | self._pending.keys())

    @property
    def positions(self) -> int:
        """Supervised positions of all rows."""
        return sum(count for _, _, count in self._places.values()) + sum(map(len, self._pending.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in self.folder.glob(FILES))

    def get(self, key: bytes) -> Letters:
        """A row that is there."""
        if key in self._pending:
            return self._pending[key]
        path, start, count = self._places[key]
        with _reading(path):
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            ids, *logs = (self._open[path].get_slice(part)[start : start + count] for part in _PARTS)
        return Letters(ids.to(torch.int64), *logs)

    def put(self, key: bytes, letters: Letters) -> None:
        """Add a row; it is written with others, or by :meth:`flush`."""
        if key in self:
            return
        self._pending[key] = letters.to(torch.device("cpu"), letters.likely.dtype)
        self._size += sum(getattr(letters, part).nbytes for part in _PARTS)
        if self._size >= MOST_PENDING:
            self.flush()

    def flush(self) -> None:
        """Write what is in memory.

        Raises:
            CheckpointError: it cannot be written.
        """
        if not self._pending:
            return
        keys, rows = list(self._pending), list(self._pending.values())
        joined = Letters.joined(rows)
        tensors = {
            "keys": torch.tensor([list(key) for key in keys], dtype=torch.uint8),
            "counts": torch.tensor([len(row) for row in rows], dtype=torch.int32),
            "ids": joined.ids.to(torch.int32), "likely": joined.likely, "gold": joined.gold, "rest": joined.rest,
        }  # fmt: skip
        path = self.folder / f"targets-{uuid.uuid4().hex}.safetensors"
        write_tensors(make_folder(self.folder) / path.name, tensors)
        self._pending, self._size = {}, 0
        self.refresh()

    def require_room(self, positions: int, top_k: int) -> None:
        """Raises CheckpointError where the disk has no room for so many positions more."""
        needed, folder = positions * bytes_a_position(top_k), make_folder(self.folder)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise CheckpointError(
                f"The teacher's targets at {positions:,} positions take {needed / 2**30:.1f} GiB, and {folder} has "
                f"{free / 2**30:.1f} GiB free. Make room, name another folder, or lower align.top_k from {top_k}."
            )


class _reading:
    """Says which file it was where reading one fails."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        if not self.path.is_file():
            raise CheckpointError(f"{self.path} is gone since it was written. Restore it, or delete the folder.")

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, CheckpointError):
            raise CheckpointError(
                f"{self.path} is damaged: {first_line(error)}. Delete it, and its rows are asked of the teacher again."
            ) from error


def digest_of_keys(keys: Iterable[bytes]) -> str:
    """Tells sets of rows apart, whatever their order."""
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(set(keys)):
        digest.update(key)
    return digest.hexdigest()


def pieces(letters: Letters, counts: Sequence[int]) -> list[Letters]:
    """Letters of a whole batch, row by row."""
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [letters[end - count : end] for end, count in zip(ends, counts, strict=True)]
