"""Texts with the class each belongs to, for models that choose one of several."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.text import Text
from torch import Tensor

from lorafa.data.chat import IGNORE, Sample
from lorafa.data.collate import Tokenized, padded
from lorafa.data.encoding import Encoding
from lorafa.data.pairs import TextEncoder, answer_of, row_of
from lorafa.data.records import Record
from lorafa.errors import DataError, SourceError, did_you_mean, shorten
from lorafa.storage.hub import locate
from lorafa.storage.whole import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST = 1000
"""Classes at most: more answers are texts to be written, not classes."""
CLASSES_NAME = "classes.json"
"""The file beside an adapter that names its classes."""


def class_of(record: Record) -> str:
    """The class a row belongs to: its answer.

    Raises:
        DataError: it does not end with an answer.
    """
    return answer_of(record).strip()


def classes_of(answers: Iterable[str]) -> tuple[str, ...]:
    """The different answers in order: as numbers where all of them are whole numbers, else as texts.

    Raises:
        DataError: there are fewer than two, or more than ``MOST``.
    """
    found = set(answers)
    if len(found) < 2:
        raise DataError(
            f"The rows to train on have {len(found)} different answers, and a classifier chooses among two or more"
            f"{': ' + shorten(map(repr, found)) if found else ''}. Give rows of every class."
        )
    if len(found) > MOST:
        raise DataError(
            f"The rows to train on have {len(found):,} different answers, and a classifier has {MOST:,} classes "
            "at most. Name the column of the class with data.completion_column, or train a model that writes its "
            "answers."
        )
    return tuple(sorted(found, key=int if all(map(_is_whole, found)) else None))


def _is_whole(answer: str) -> bool:
    return answer.removeprefix("-").isascii() and answer.removeprefix("-").isdecimal() and str(int(answer)) == answer


class ClassEncoder(TextEncoder):
    """From records to samples of a classifier: the ids of the text, cut at ``max_length``, then the number of its
    class, which is the one label.

    Raises:
        DataError: of :meth:`sample`, with the row: it is not one text with one answer, or its answer is no class.
    """

    def __init__(self, classes: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        super().__init__(tokenizer, max_length)
        self.number = {name: number for number, name in enumerate(classes)}

    def sample(self, record: Record) -> Sample:
        """The sample of a record."""
        name, (ids, cut) = class_of(record), self.read(record)
        number = self.number.get(name)
        if number is None:
            raise DataError(
                f"{row_of(record)}: the answer {name[:40]!r} is none of the {len(self.number)} classes that are "
                f"trained ({shorten(map(repr, self.number), 6)}).{did_you_mean(name, self.number)} Mend or "
                "delete the row, or train on rows that have it."
            )
        self.note(record, [message.content for message in record.question], ids)
        return Sample([*ids, number], [IGNORE] * len(ids) + [number], truncated=cut, place=record.place)


def encoding_of(classes: Sequence[str]) -> Encoding:
    """How records become samples of these classes."""
    names = tuple(classes)

    def shown(sample: Sample, tokenizer: Any) -> Text:
        text = Text(tokenizer.decode(sample.input_ids[:-1], clean_up_tokenization_spaces=False), style="dim")
        return text.append(f" -> {names[sample.labels[-1]]}", style="green")

    return Encoding("classes " + json.dumps(names), partial(ClassEncoder, names), shown)


@dataclass(frozen=True)
class ClassCollator:
    """Right padding of the texts, and the class of each."""

    pad_id: int

    def __call__(self, samples: Sequence[Tokenized]) -> dict[str, Tensor]:
        """int64 ``input_ids`` and ``attention_mask`` (samples, longest), ``labels`` (samples,)."""
        texts = [sample.input_ids[:-1] for sample in samples]
        return {
            "input_ids": padded(texts, self.pad_id),
            "attention_mask": padded([[1] * len(ids) for ids in texts], 0),
            "labels": torch.tensor([sample.labels[-1] for sample in samples]),
        }


def write_classes(folder: Path, classes: Sequence[str]) -> None:
    """Put the classes beside an adapter.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    write_json(folder / CLASSES_NAME, {"classes": list(classes)})


def read_classes(file: Path) -> tuple[str, ...]:
    """The classes that :func:`write_classes` has put there.

    Raises:
        CheckpointError: the file cannot be read.
        SourceError: it is no list of classes.
    """
    found = read_json(file).get("classes")
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(name, str) for name in found):
        raise SourceError(f"{file} does not name the classes of the adapter, found {str(found)[:60]}. Restore it.")
    return tuple(found)


def classes_beside(adapter: str) -> tuple[str, ...] | None:
    """The classes of an adapter, a folder or a Hub id; None where no file beside it names any.

    Raises:
        LoraError: as :func:`read_classes`.
    """
    try:
        file = locate(adapter, [CLASSES_NAME])
    except SourceError:
        return None
    return read_classes(file)
