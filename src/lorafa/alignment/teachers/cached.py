"""What a teacher says, kept on the disk: it runs once over the rows, and need not be in memory after that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.alignment.divergences.base import Divergence
from lorafa.alignment.divergences.letters import Letters
from lorafa.alignment.said import Spoken, Told
from lorafa.alignment.targets import About, Targets, digest_of_rows, next_labels, pieces, row_keys
from lorafa.alignment.teachers.base import Teacher
from lorafa.alignment.teachers.external import External, vocabulary_of
from lorafa.alignment.teachers.model_base import Base
from lorafa.backends.offload import device_of
from lorafa.calibration.processes import together
from lorafa.errors import CheckpointError, ConfigError, DivergedError
from lorafa.models.head_loss import supervised_loss
from lorafa.models.modes import evaluating
from lorafa.models.rows import IGNORE_INDEX
from lorafa.processes import barrier, is_main, main_first, share
from lorafa.settings.checks import check_int

AT_ONCE = 64
"""Positions whose logits are there at a time."""


class Cached(Teacher):
    """The ``top_k`` likeliest tokens of a teacher at every supervised position, and the rest as one letter.

        Alignment(model, Cached("targets", teacher=other, top_k=64))     # asks it where the folder lacks a row
        Alignment(model, Cached("targets"))                              # without the teacher

    A divergence is taken on that smaller alphabet, where it is a bound from below of that of all tokens. The folder is
    of one teacher and one temperature; a row takes ``8 top_k + 8`` bytes a supervised position on the disk, and a few
    of memory.
    """

    name = "cached"

    def __init__(
        self,
        folder: str | Path,
        teacher: nn.Module | Teacher | str | None = None,
        *,
        top_k: int = 64,
        called: str | None = None,
        files: str | None = None,
    ) -> None:
        """Name the folder.

        Args:
            folder: where the targets are, or will be.
            teacher: another model, "base", or None where all rows are there already.
            top_k: likeliest tokens that are kept.
            called: what the teacher is called, for messages.
            files: what tells the teacher's files from others; a folder of other files is refused without it.

        Raises:
            ConfigError: ``top_k`` is no number above 0, or there is no such teacher.
        """
        check_int("top_k", top_k, at_least=1)
        self.targets, self.top_k = Targets(Path(folder)), top_k
        self.source = _source(teacher)
        self.files = files
        self.called = called or ("no name" if self.source is None else self.source.name)
        self.about: About | None = None
        self._places = False
        """Whether padding before a row is a part of it."""

    @property
    def starts_as_student(self) -> bool:  # type: ignore[override]
        """As the teacher; that of a folder alone is not known, and taken for another model."""
        return self.source is not None and self.source.starts_as_student

    @property
    def divergence(self) -> str:  # type: ignore[override]
        return "fkl" if self.source is None else self.source.divergence

    @property
    def runs(self) -> bool:
        return self.source is not None

    def begin(self, model: nn.Module) -> None:
        if self.source is not None:
            self.source.begin(model)

    def settle(self, model: nn.Module, divergence: Divergence | None, reads_states: bool) -> None:
        """Open the folder for this divergence.

        Raises:
            ConfigError: the divergence, or a map, reads what is not kept.
            CheckpointError: the folder is of another teacher, or was made with other settings.
        """
        if divergence is None or reads_states:
            raise ConfigError(
                "A cache keeps the teacher's distributions, and inner states are compared here. Take align.map=null "
                "and a divergence, or no cache (align.cache=false)."
            )
        if not divergence.takes_letters:
            raise ConfigError(
                f"align.divergence={divergence.name} compares all logits, and a cache keeps the {self.top_k} likeliest "
                "tokens of the teacher. Take another divergence, fkl for example, or no cache (align.cache=false)."
            )
        self._places = _counts_places(model)
        with main_first():  # which may make the folder
            self.about = self._opened(model, divergence)
            self.targets.refresh()

    def _opened(self, model: nn.Module, divergence: Divergence) -> About:
        known = self.targets.about()
        if self.source is None:
            if known is None:
                raise CheckpointError(
                    f"{self.targets.folder} has no targets of a teacher, and there is none to ask. Give the teacher "
                    "with it, for the first time."
                )
            own = replace(known, temperature=divergence.temperature, top_k=self.top_k)
        else:
            sizes = [size for size in (self.source.vocabulary(), vocabulary_of(model)) if size]
            shared, digest = min(sizes, default=0), self.source.fingerprint(model)
            own = About(digest, self.called, divergence.temperature, self.top_k, shared, files=self.files)
            if known is None:
                if is_main():
                    self.targets.claim(own)
                return own
        self._require_same(known, own)
        return known

    def _require_same(self, known: About, own: About) -> None:
        where = self.targets.folder
        if known.teacher != own.teacher:
            raise CheckpointError(
                f"{where} holds the targets of another teacher, {known.called}, whose weights are not those of "
                f"{own.called}. Name another folder, or delete it."
            )
        for name in ("temperature", "top_k"):
            then, now = getattr(known, name), getattr(own, name)
            if then != now:
                raise CheckpointError(
                    f"{where} was made with {name}={then:g}, and {name}={now:g} is asked for. Set it as it was, or "
                    "name another folder."
                )

    def _require_tokens(self, model: nn.Module) -> None:
        """Raises CheckpointError where the letters are of tokens that the student has not."""
        size = vocabulary_of(model)
        if size and self._known.vocabulary > size:
            raise CheckpointError(
                f"{self.targets.folder} holds what {self._known.called} says of {self._known.vocabulary:,} tokens, and "
                f"the student has {size:,}. Name another folder, or delete it."
            )

    def vocabulary(self) -> int | None:
        if self.source is not None:
            return self.source.vocabulary()
        return None if self.about is None else self.about.vocabulary

    def fingerprint(self, model: nn.Module) -> str:
        return self._known.teacher

    @property
    def _known(self) -> About:
        if self.about is None:
            raise ConfigError("Nobody has said with which divergence these targets are read. Give them to Alignment.")
        return self.about

    # ---- rows

    def fill(
        self, model: nn.Module, batches: Sequence[Mapping[str, Any]], progress: Callable[[], None] = lambda: None
    ) -> int:
        """Ask the teacher of all rows that are not there yet; afterwards it may go (:meth:`release`).

        The folder is then of these rows, and refused for others. What was asked before an interruption is not asked
        again. In several processes all call it, with the same batches, and each does its share.

        Returns:
            How many rows were asked.

        Raises:
            CheckpointError: the folder was filled for other rows, the disk has no room, or rows are missing and there
                is no teacher.
            DivergedError: the teacher gives inf or nan.
        """
        about = self._known
        self._require_tokens(model)
        found = [row_keys(batch, self._places) for batch in batches]
        data = digest_of_rows(found)
        if about.rows not in (None, data):
            raise CheckpointError(
                f"{self.targets.folder} holds what {about.called} says of other rows: its data are {about.rows[:12]}, "  # type: ignore[index]
                f"and these are {data[:12]}. Name another folder, or delete it."
            )
        missing = [at for at, (keys, counts) in enumerate(found) if self._lacks(keys, counts)]
        with together():
            wanted = {k: n for at in missing for k, n in zip(*found[at], strict=True) if n and k not in self.targets}
            if wanted and self.source is None:
                raise CheckpointError(self._absent(len(wanted)))
            self.targets.require_room(sum(wanted.values()), self.top_k)
            if is_main() and about.rows is None:
                self.about = replace(about, rows=data)
                self.targets.claim(self.about)
            for at in share(missing):
                self._ask(model, batches[at], *found[at])
                progress()
            self.targets.flush()
        barrier()
        self.targets.refresh()
        return len(wanted)

    def lacks(self, batches: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a row of these batches is not there."""
        self.targets.refresh()
        return any(self._lacks(*row_keys(batch, self._places)) for batch in batches)

    def in_words(self) -> str:
        """How much is kept, and where."""
        kept = self.targets
        return (
            f"{len(kept):,} rows of {self.called}, {kept.positions:,} positions with the {self.top_k} likeliest tokens "
            f"of each: {kept.nbytes / 2**20:.1f} MiB in {kept.folder}"
        )

    def release(self) -> None:
        """Let go of the teacher: from here on what was kept serves alone."""
        self.source = None

    def told(self, model: nn.Module, batch: Mapping[str, Any]) -> Told:
        """What was kept for the rows of a batch.

        Raises:
            CheckpointError: a row is not there, and there is no teacher to ask.
            DivergedError: the teacher that was asked gives inf or nan.
        """
        self._require_tokens(model)
        keys, counts = row_keys(batch, self._places)
        if self._lacks(keys, counts):
            self.targets.refresh()  # another process may have asked
        if self._lacks(keys, counts):
            if self.source is None:
                absent = {key for key, n in zip(keys, counts, strict=True) if n and key not in self.targets}
                raise CheckpointError(self._absent(len(absent)))
            self._ask(model, batch, keys, counts)
        rows = [self.targets.get(key) for key, count in zip(keys, counts, strict=True) if count]
        return Told(Letters.joined(rows) if rows else _none(self.top_k), self._known.vocabulary or None)

    def _lacks(self, keys: Sequence[bytes], counts: Sequence[int]) -> bool:
        return any(count and key not in self.targets for key, count in zip(keys, counts, strict=True))

    def _absent(self, count: int) -> str:
        return (
            f"{self.targets.folder} lacks {count} rows of this training: it was made of other data, or with another "
            f"tokenizer or template, and has {len(self.targets)}. Give the teacher with it, or name the folder that "
            "was made of these."
        )

    def _ask(self, model: nn.Module, batch: Mapping[str, Any], keys: Sequence[bytes], counts: Sequence[int]) -> None:
        assert self.source is not None
        kept = Spoken()
        with torch.no_grad(), evaluating(model), self.source.running(model) as teaching:
            moved = {name: value.to(device_of(teaching)) for name, value in batch.items()}
            supervised_loss(teaching, moved, num_items=1, objective=kept)
        gold = _gold(batch).to(kept.rows.device)
        if len(gold) != len(kept):
            raise ConfigError(
                f"The teacher has read {len(kept)} supervised positions, and the batch has {len(gold)}: it changes the "
                "labels, or has read fewer rows."
            )
        found = []
        for start in range(0, len(kept), AT_ONCE):
            places = slice(start, start + AT_ONCE)
            logits = kept.logits(places)[:, : self._known.vocabulary or None]
            letters = Letters.of(logits, gold[places], self.top_k, self._known.temperature)
            if not bool(letters.likely.isfinite().all() & letters.rest.isfinite().all()):
                raise DivergedError(
                    f"The teacher {self.called} gives inf or nan for rows of this data, which are not kept. Look at "
                    "its outputs, or load it in another dtype."
                )
            found.append(letters)
        for key, own in zip(keys, pieces(Letters.joined(found or [_none(self.top_k)]), counts), strict=True):
            if len(own):
                self.targets.put(key, own)

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[nn.Module]:
        if self.source is None:
            raise ConfigError("What was kept of a teacher cannot be run. Give the teacher with it.")
        with self.source.running(model) as teaching:
            yield teaching

    def state_dict(self) -> dict[str, Any]:
        """Nothing: what is in memory is written to the folder, so that a training that is resumed finds it."""
        self.targets.flush()
        return {}


def _source(given: nn.Module | Teacher | str | None) -> Teacher | None:
    if given is None or isinstance(given, Teacher):
        return given
    if isinstance(given, nn.Module):
        return External(given)
    if given == Base.name:
        return Base()
    raise ConfigError(f"A cache is of a model or of 'base', found teacher={given!r}. Pass the model itself, loaded.")


def _counts_places(model: nn.Module) -> bool:
    """Whether padding before a row changes what a model says of it: positions that are learnt are counted from there.

    Where they turn queries and keys (rotary embeddings) their differences alone matter.
    """
    ids = torch.arange(4, device=device_of(model))[None]

    def states(before: int) -> Tensor:
        kept, pad = Spoken(), (before, 0)
        labels = nn.functional.pad(ids, pad, value=IGNORE_INDEX)
        labels[:, before] = IGNORE_INDEX
        mask = nn.functional.pad(torch.ones_like(ids), pad)
        batch = {"input_ids": nn.functional.pad(ids, pad), "attention_mask": mask, "labels": labels}
        with evaluating(model):
            supervised_loss(model, batch, num_items=1, objective=kept)
        return kept.rows.float()

    still, moved = states(0), states(3)
    return bool((moved - still).norm() > 0.02 * still.norm())


def _gold(batch: Mapping[str, Any]) -> Tensor:
    targets = next_labels(batch)
    return targets[targets != IGNORE_INDEX]


def _none(top_k: int) -> Letters:
    nothing = torch.empty(0)
    return Letters(torch.empty(0, top_k, dtype=torch.int64), torch.empty(0, top_k), nothing, nothing)
