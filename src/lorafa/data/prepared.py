"""From records to the samples of a run, by way of the cache where that pays."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lorafa.data.chat import IGNORE, Encoded, Sample, SampleEncoder
from lorafa.data.encoding import CHAT, Encoding
from lorafa.data.records import Record
from lorafa.data.samples import InMemory, Samples, SampleWriter, Store, Stored
from lorafa.data.selection import Selection
from lorafa.data.sources import OpenData
from lorafa.data.token_cache import (
    Contents,
    cache_file,
    read_cache,
    record_of_json,
    records_as_json,
    write_cache,
)
from lorafa.errors import CheckpointError, DataError, warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHED_FROM = 10_000
"""Records whose tokens are kept where nothing is said: fewer are tokenized in seconds."""

Order = npt.NDArray[np.int32]
Progress = Callable[[int, int], None]
"""(rows that are done, rows in all)."""


@dataclass(frozen=True)
class SampleSet:
    """The samples of a run, and the held-out records, which are asked in words too."""

    train: Encoded
    heldout: Encoded
    records: Sequence[Record]
    """The held-out ones."""
    source: str
    """Where all of them are from, in words."""
    repeated: int
    """Rows that answer what a held-out one asks, and were left out."""
    sha256: str
    """Fingerprint of all samples, in their order: by it a continued run knows that it goes on with the same."""
    tokens: int
    trained: int
    """Tokens to train on, and how many of them carry a label."""
    highest: int
    """The highest id in any sample."""
    templated: bool
    """Whether a chat template has written any sample to train on; of plain texts it writes none."""
    lengths: npt.NDArray[np.int32] = field(compare=False)
    """Tokens of each sample, one that is trained on twice counted once; in no order."""
    found: Path | None = None
    """The file of the cache in which they were found; None where they were made."""


def is_cached(data: OpenData, cache: bool | None) -> bool:
    """Whether the tokens of records are kept: as ``cache`` says, or where it is None, if there are many."""
    return data.count() >= CACHED_FROM if cache is None else cache


def prepare_samples(
    data: OpenData,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    cache: bool | None = None,
    progress: Progress | None = None,
    encoding: Encoding = CHAT,
) -> SampleSet:
    """Tokenize records, or take them from the cache, where the same ones were tokenized in the same way before.

    The records are read one after another, and memory holds some bytes for each. Without the cache it holds their
    tokens too. What was said of the records when they were tokenized is said again.

    Args:
        cache: see :func:`is_cached`. Where it is None and the cache cannot be written to, the tokens are kept in
            memory, with a warning.
        encoding: how a record becomes a sample.

    Raises:
        DataError: what ``encoding`` raises (:class:`lorafa.data.chat.Encoder`); of ``cache=True``, that the cache
            cannot be written to.
        SourceError: something cannot be read.
    """
    make = partial(encoding.make, tokenizer, max_length)
    if not is_cached(data, cache):
        return _in_memory(data.selection, make, progress)
    digest = data.digest()
    try:
        path = cache_file(digest, tokenizer, max_length, encoding.name)
        found = read_cache(path)
        was_there = found is not None
        if found is None:
            kept = records_as_json(data.selection.heldout)

            def fill(out: Store) -> Contents:
                contents = _encoded(data.selection, make, progress, out)
                return replace(contents, facts={**contents.facts, "records": kept})

            write_cache(path, fill)
            found = read_cache(path)
        if found is None:
            raise CheckpointError(f"{path} was written and cannot be read.")
    except CheckpointError as error:
        where = f"The tokens could not be kept in the cache: {error} LORAFA_CACHE names another folder for it."
        if cache:
            raise DataError(f"{where} With data.cache=false they are kept in memory.") from error
        warn(f"{where} They are kept in memory for this run.")
        return _in_memory(data.selection, make, progress)
    stored, contents = found
    records = [record_of_json(record) for record in contents.facts["records"]]
    return replace(_as_set(stored, contents, records), found=path if was_there else None)


def _in_memory(selection: Selection, make: Callable[[], SampleEncoder], progress: Progress | None) -> SampleSet:
    out = InMemory()
    contents = _encoded(selection, make, progress, out)
    return _as_set(Stored(out, contents.sizes, contents.facts["places"]), contents, selection.heldout)


def _encoded(
    selection: Selection, make: Callable[[], SampleEncoder], progress: Progress | None, out: Store
) -> Contents:
    """Tokenize what is chosen, row by row, and write the samples."""
    writer = SampleWriter(out)
    encoder = make()
    train, facts = _known(_of_training(selection, encoder, writer, progress), encoder, writer)
    remarks, templated, heldout, held = encoder.remarks(), encoder.templated, np.zeros(0, np.int32), None
    if selection.heldout:
        encoder = make()
        numbers = [_written(encoder.sample(record), writer) for record in selection.heldout]
        heldout, held = _known(np.array(numbers, np.int32), encoder, writer)
        remarks += encoder.remarks()
    sizes = np.frombuffer(writer.sizes, np.int32)
    stored = Stored(out, sizes, list(writer.places), out.begins)
    known = {
        "places": list(writer.places),
        "remarks": remarks,
        "train": facts,
        "heldout": held,
        "templated": templated,
        "source": selection.source,
        "repeated": selection.repeated,
        **_survey(Samples(stored, train), Samples(stored, heldout)),
    }
    return Contents(sizes, train, heldout, known)


def _of_training(
    selection: Selection, encoder: SampleEncoder, writer: SampleWriter, progress: Progress | None
) -> Order:
    """The numbers of the samples to train on, in their order."""
    of_row = np.full(sum(selection.counts), -1, np.int32)
    for done, (number, record) in enumerate(selection.training(), 1):
        of_row[number] = _written(encoder.sample(record), writer)
        if progress is not None and done % 1000 == 0:
            progress(done, len(selection))
    if progress is not None:
        progress(len(selection), len(selection))
    numbers: Order = of_row[selection.order]
    return numbers


def _written(sample: Sample, writer: SampleWriter) -> int:
    """Its number; -1 for one that has no trained token."""
    return writer.add(sample) if sample.trained else -1


def _known(numbers: Order, encoder: SampleEncoder, writer: SampleWriter) -> tuple[Order, dict[str, Any]]:
    """The samples that can be used, and what is said of all."""
    usable = numbers[numbers >= 0]
    truncated = int(np.frombuffer(writer.truncated, np.uint8)[usable].sum())
    return usable, {
        "dropped": len(numbers) - len(usable),
        "truncated": truncated,
        "ends": sorted(encoder.ends),
    }


def _survey(train: Samples, heldout: Samples) -> dict[str, Any]:
    """What is known of all samples once each is looked at."""
    digest, counts, highest = hashlib.sha256(), [0, 0], 0
    for of_training, samples in ((True, train), (False, heldout)):
        for ids, trained in samples.tokens():
            labels = np.where(trained, ids, IGNORE)
            digest.update(np.concatenate(([len(ids)], ids, labels)).astype("<i8").tobytes())
            highest = max(highest, int(ids.max()))
            if of_training:
                counts[0] += len(ids)
                counts[1] += int(trained.sum())
    return {"sha256": digest.hexdigest(), "tokens": counts[0], "trained": counts[1], "highest": highest}


_FACTS = ("source", "repeated", "sha256", "tokens", "trained", "highest", "templated")


def _as_set(stored: Stored, contents: Contents, records: Sequence[Record]) -> SampleSet:
    facts = contents.facts
    for text in facts["remarks"]:
        warn(text)

    def encoded(order: Order, known: dict[str, Any] | None) -> Encoded:
        known = known or {"dropped": 0, "truncated": 0, "ends": []}
        return Encoded(Samples(stored, order), known["dropped"], known["truncated"], frozenset(known["ends"]))

    rest = {name: facts[name] for name in _FACTS}
    train, heldout = encoded(contents.train, facts["train"]), encoded(contents.heldout, facts["heldout"])
    return SampleSet(train, heldout, records, lengths=stored.sizes, **rest)
