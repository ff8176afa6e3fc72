"""Tokens once: samples in a file of the user's cache, by what decides them.

A file is the samples, what is known of them in numbers and in JSON, and a SHA-256 of all of it at the end. It is
written whole or not at all, so that two processes that want the same one do not meet half-way; its content decides its
name, so that it does not matter which of them is first.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from lorafa.data.records import Message, Record
from lorafa.data.samples import InFile, Store, Stored
from lorafa.data.source import digest_of
from lorafa.errors import CheckpointError, first_line, warn
from lorafa.storage.leavings import remove_left_over
from lorafa.storage.wheels import default_cache_dir, sha256_of
from lorafa.storage.whole import make_folder, written_whole
from lorafa.version import VERSION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAGIC = b"lorafa tokens 1\n"
READERS = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow")
"""Packages whose version decides how rows are read and tokenized."""
_COUNTS = struct.Struct("<4Q")  # samples, training order, held-out order, bytes of JSON
_DIGEST = 32


@dataclass(frozen=True)
class Contents:
    """What is known beside the samples themselves."""

    sizes: npt.NDArray[np.int32]
    """Tokens of each sample as it is stored."""
    train: npt.NDArray[np.int32]
    heldout: npt.NDArray[np.int32]
    """Which samples are trained on, and which held out, each in their order."""
    facts: Mapping[str, Any]
    """In JSON; ``places`` is that of :class:`lorafa.data.samples.Stored`."""


def cache_folder() -> Path:
    """Where the files are."""
    return default_cache_dir() / "tokens"


def cache_file(data: str, tokenizer: PreTrainedTokenizerBase, max_length: int, encoding: str) -> Path:
    """The file for records with the digest ``data``, there or not.

    Args:
        encoding: the name of the way in which they become samples.

    Raises:
        CheckpointError: the tokenizer cannot be saved.
    """
    code = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.rglob("*.py"))]
    versions = (VERSION, *map(_version, READERS))
    name = digest_of(iter((data, digest_of_tokenizer(tokenizer), str(max_length), encoding, *versions, *code)))
    return cache_folder() / f"{name[:40]}.tokens"


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """What changes where the tokenizer, or its chat template, does: that of all it saves.

    Raises:
        CheckpointError: it cannot be saved.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="lorafa-tokenizer-") as folder:
            tokenizer.save_pretrained(folder)
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            texts = [text for path in files for text in (path.relative_to(folder).as_posix(), sha256_of(path))]
    except Exception as error:  # a tokenizer may be anybody's code
        raise CheckpointError(
            f"the tokenizer ({type(tokenizer).__name__}) cannot be saved, so that nothing would say whether it is "
            f"another one: {first_line(error)}."
        ) from error
    return digest_of(iter((type(tokenizer).__qualname__, *texts)))


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"no {package}"


def write_cache(path: Path, fill: Callable[[Store], Contents]) -> None:
    """Have ``fill`` write the samples, and put what it returns behind them.

    Raises:
        CheckpointError: the folder cannot be written to, or the disk is full; nothing is left of it.
    """
    make_folder(path.parent)
    remove_left_over(path.parent, "*.tokens")  # which may be large
    with written_whole(path) as temporary, temporary.open("w+b") as file:
        out = _Hashed(file)
        out.write(MAGIC)
        contents = fill(out)
        facts = json.dumps(contents.facts).encode()
        for numbers in (contents.sizes, contents.train, contents.heldout):
            out.write(numbers.astype("<i4").tobytes())
        out.write(facts)
        counts = (len(contents.sizes), len(contents.train), len(contents.heldout), len(facts))
        out.write(_COUNTS.pack(*counts))
        file.write(out.digest.digest())


def read_cache(path: Path) -> tuple[Stored, Contents] | None:
    """The samples of a file and what is known of them; None where there is none, or, with a warning, a damaged one."""
    try:
        intact = _is_intact(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        warn(f"The tokens in {path} cannot be read: {error.strerror or error}. They are made anew.")
        return None
    if not intact:
        warn(f"The tokens in {path} are damaged, and are made anew.")
        return None
    content = InFile(path)
    end = path.stat().st_size - _DIGEST - _COUNTS.size
    samples, train, heldout, facts = _COUNTS.unpack(content.read(end, _COUNTS.size))
    known = json.loads(content.read(end - facts, facts))
    at = end - facts - 4 * (samples + train + heldout)
    found = []
    for count in (samples, train, heldout):
        found.append(np.frombuffer(content.read(at, 4 * count), "<i4"))
        at += 4 * count
    sizes, order, held = found
    return Stored(content, sizes, known["places"], len(MAGIC)), Contents(sizes, order, held, known)


def _is_intact(path: Path) -> bool:
    left = path.stat().st_size - _DIGEST
    if left < len(MAGIC) + _COUNTS.size:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while left and (block := file.read(min(1 << 20, left))):
            digest.update(block)
            left -= len(block)
        return digest.digest() == file.read()


class _Hashed:
    """A file that is written, and the SHA-256 of what was."""

    begins = len(MAGIC)

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = 0
        self.digest = hashlib.sha256()

    def write(self, content: bytes, /) -> None:
        self._file.seek(self._size)
        self._file.write(content)
        self._size += len(content)
        self.digest.update(content)

    def read(self, at: int, size: int) -> bytes:
        self._file.seek(at)
        return self._file.read(size)


def records_as_json(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Records as JSON has them.

    Raises:
        CheckpointError: one holds a value that JSON would change, such as a date.
    """
    written = [asdict(record) for record in records]
    for record, plain in zip(records, written, strict=True):
        try:
            same = repr(record_of_json(json.loads(json.dumps(plain)))) == repr(record)
        except TypeError:
            same = False
        if not same:
            raise CheckpointError(
                f"{record.place or 'a held-out row'} holds a value that JSON has not. Write it as text."
            )
    return written


def record_of_json(plain: Mapping[str, Any]) -> Record:
    """The record that was written so."""
    turns = {name: tuple(Message(**message) for message in plain[name]) for name in ("messages", "rejected")}
    return Record(**{**plain, **turns, "tools": tuple(plain["tools"])})
