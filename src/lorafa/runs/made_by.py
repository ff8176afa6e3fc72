"""What decides an answer: the weights and the options, so that a file is continued by nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lorafa.evals.answering import Answering
from lorafa.models.load import resolve_model
from lorafa.processes import world_size
from lorafa.runs.subjects import Named
from lorafa.settings.typed import plain
from lorafa.storage.paths import user_path
from lorafa.train.settings.model import ModelConfig

PIECES, PIECE = 16, 64 * 2**10
"""How much of a file is read: so many pieces of so many bytes, evenly spread."""
LOADING = {"name", "cache_dir", "check_memory", "trust_remote_code", "own"}
"""Settings of a model that say where its files are, and not what it answers."""
FILES = ("*.safetensors", "*.bin", "*.gguf", "*.json", "*.jinja", "*.model")
"""How files are called that decide what is answered: weights, configs, tokenizers."""


@dataclass(frozen=True)
class MadeBy:
    """By what the answers of a file are made."""

    subject: str
    """As it was named."""
    entries: Mapping[str, Any]
    """What it is called in messages -> what it is, as JSON has it. All of it decides what is answered."""

    @classmethod
    def of(cls, subject: Named, model: ModelConfig, how: Answering, template: str | None) -> MadeBy:
        """The weights of a subject, how they are loaded, and how they answer.

        Args:
            model: how the model is loaded; a run has its own.
            template: the text of a chat template that is named.

        Raises:
            SourceError: the base model cannot be found.
        """
        sampling = how.sampling
        entries: dict[str, Any] = {"the model": _model(subject.base or model.name, model, subject)}
        adapter = subject.adapter if subject.run is None else str(subject.run.adapter)
        if adapter is not None:
            folder = user_path(adapter)
            entries["the adapter"] = _files_of(folder) if folder.is_dir() else adapter
        entries |= {
            "--max-new-tokens": how.max_new_tokens,
            "--batch-size": how.batch_size,
            "--temperature": sampling.temperature if sampling else 0.0,
            "--top-p": sampling.top_p if sampling else 1.0,
            "--seed": sampling.seed if sampling else None,
            "data.template": None if template is None else f"a text of {_digest([template.encode()])}",
            "the number of processes": world_size(),
        }
        if subject.run is None:
            values = plain(model)
            named = [one.name for one in fields(model) if one.name not in LOADING]
            entries |= {f"model.{name}": values[name] for name in named}
        return cls(subject.name, entries)

    def differences(self, earlier: Mapping[str, Any]) -> list[str]:
        """What is other than it was, in words."""
        names = dict.fromkeys((*self.entries, *earlier))
        return [
            f"{name} was {earlier.get(name)!r} and is {self.entries.get(name)!r}"
            for name in names
            if earlier.get(name) != self.entries.get(name)
        ]


def _model(name: str, model: ModelConfig, subject: Named) -> str:
    """The weights of the base model, or of the whole model that a run has trained; of the Hub its id."""
    if subject.run is not None and subject.run.model.is_dir():
        return _files_of(subject.run.model)
    cache = None if model.cache_dir is None else Path(model.cache_dir)
    found = resolve_model(name, cache_dir=cache, revision=model.revision)
    return found if isinstance(found, str) else _files_of(found)


def _files_of(folder: Path) -> str:
    """The files of a model or an adapter, known by their names, their sizes and pieces of them: reading a large model
    whole would take as long as loading it."""
    files = sorted({file for pattern in FILES for file in folder.glob(pattern)})
    return f"files {_digest(part for file in files for part in _pieces(file))}"


def _pieces(file: Path) -> Iterable[bytes]:
    size = file.stat().st_size
    yield f"{file.name} {size}\n".encode()
    with file.open("rb") as read:
        for number in range(PIECES):
            read.seek(max(0, size - PIECE) * number // (PIECES - 1))
            yield read.read(PIECE)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
