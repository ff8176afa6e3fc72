"""What the teacher of a run says of its rows, kept in a folder: asked once, and by later runs not loaded at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from lorafa.alignment.alignment import Alignment
from lorafa.alignment.divergences.base import Divergence
from lorafa.alignment.targets import Targets, digest_of_rows, row_keys
from lorafa.alignment.teachers.base import Teacher
from lorafa.alignment.teachers.cached import Cached
from lorafa.alignment.teachers.external import External
from lorafa.alignment.teachers.model_base import Base
from lorafa.calibration.batches import digest_of
from lorafa.models.load import resolve_model
from lorafa.models.sourced import as_source_error, model_step
from lorafa.processes import from_main
from lorafa.storage.paths import user_path
from lorafa.storage.wheels import default_cache_dir, sha256_of
from lorafa.train.settings.align import EXTERNAL, AlignConfig

Batch = Mapping[str, Any]
_OF_MODELS = (".json", ".safetensors", ".bin")


class Batches(Sequence[Batch]):
    """Rows in their order, some to a batch, each made when it is asked for; and further batches behind them."""

    def __init__(
        self, rows: Sequence[Any], collate: Callable[[Any], Batch], size: int, further: Sequence[Batch] = ()
    ) -> None:
        self.rows, self.collate, self.size, self.further = rows, collate, size, further

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size) + len(self.further)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin, own = index * self.size, len(self) - len(self.further)
        if index >= own:
            return self.further[index - own]
        return self.collate([self.rows[at] for at in range(begin, min(begin + self.size, len(self.rows)))])


def with_targets(
    align: AlignConfig,
    model: Any,
    divergence: Divergence,
    load: Callable[[], Any],
    batches: Sequence[Batch],
    made: Callable[[Teacher], Alignment],
) -> Alignment:
    """The alignment of a training with what the teacher says of these batches, which is asked now where it is not kept.

    Args:
        load: loads an external teacher; it is let go of when all is asked.

    Raises:
        CheckpointError: the folder is of another teacher or other data, or the disk has no room.
        DivergedError: the teacher gives inf or nan.
    """
    files = from_main(lambda: _told_apart(align)) if align.name == EXTERNAL else None
    folder = user_path(str(align.cache)) if isinstance(align.cache, str) else None
    if folder is None:
        folder = _folder(Base().fingerprint(model) if files is None else files, divergence, align.top_k, batches)
    called = f"align.teacher={align.teacher}" if align.name == EXTERNAL else "the base"

    def kept(source: Teacher | None) -> Cached:
        return Cached(folder, source, top_k=align.top_k, called=called, files=files)

    asked, teacher = 0, kept(Base() if files is None else None)
    if files is None or not _has_all(folder, files, divergence, align.top_k, batches):
        teacher = kept(Base() if files is None else External(load()))
        teacher.begin(model)
        teacher.settle(model, divergence, reads_states=False)
        asked = teacher.fill(model, batches)
    if files is not None:
        teacher.release()
    alignment = made(teacher)
    alignment.tell("cached", f"{teacher.in_words()}; {asked:,} rows were asked now")
    return alignment


def _told_apart(align: AlignConfig) -> str:
    """What tells the teacher from others: its files, and in which number format they are loaded."""
    form = [name for name in (align.dtype if align.dtype != "auto" else None, align.quantize) if name]
    return " as ".join([files_of(str(align.teacher), trust_remote_code=align.trust_remote_code), *form])


def files_of(name: str, *, trust_remote_code: bool = False) -> str:
    """What tells a teacher from others without loading it: its folder's files, or the commit of one from the Hub.

    Args:
        trust_remote_code: as in :func:`~lorafa.models.load.load_model`.

    Raises:
        SourceError: there is no such model, or it needs code of its own, which is not trusted.
    """
    place = resolve_model(name)
    if isinstance(place, Path):
        files = sorted(path for path in place.iterdir() if path.is_file() and path.suffix in _OF_MODELS)
        return digest_of([(path.name, sha256_of(path)) for path in files])
    from transformers import AutoConfig

    with as_source_error(f"Could not read the config of the Hub model {place!r}", model_step()):
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    return f"{place}@{config._commit_hash}"


def _folder(teacher: str, divergence: Divergence, top_k: int, batches: Sequence[Batch]) -> Path:
    """The folder in the user's cache for a teacher, these settings and these rows."""
    name = digest_of(teacher, divergence.temperature, top_k, _rows(batches))
    return default_cache_dir() / "targets" / name


def _rows(batches: Sequence[Batch]) -> str:
    return digest_of_rows(row_keys(batch) for batch in batches)


def _has_all(folder: Path, files: str, divergence: Divergence, top_k: int, batches: Sequence[Batch]) -> bool:
    """Whether the folder is known to hold all of these rows, of the teacher with these files."""
    about = Targets(folder).about()
    if about is None or about.files != files:
        return False
    if (about.temperature, about.top_k, about.rows) != (divergence.temperature, top_k, _rows(batches)):
        return False
    return not Cached(folder).lacks(batches)
