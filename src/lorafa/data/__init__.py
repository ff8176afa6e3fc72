"""Rows, samples and batches to train on: ``sources.load_records`` -> ``chat.encode_all`` -> ``collate.Collator``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafa.registry import Registry

if TYPE_CHECKING:
    from lorafa.data.entry import ChatTemplate, DataSet

DATASETS: Registry[DataSet] = Registry(
    "data set",
    {
        "word_problems": "lorafa.data.word_problems:WORD_PROBLEMS",
        "meta_math": "lorafa.data.meta_math:META_MATH",
        "file": "lorafa.data.files:FILE",
        "hub": "lorafa.data.hub:HUB",
    },
)

TEMPLATES: Registry[ChatTemplate] = Registry(
    "chat template",
    {
        "alpaca": "lorafa.data.templates:ALPACA",
        "chatml": "lorafa.data.templates:CHATML",
        "plain": "lorafa.data.templates:PLAIN",
        "spaced": "lorafa.data.templates:SPACED",
        "vicuna": "lorafa.data.templates:VICUNA",
    },
)
"""Chat templates that ``data.template`` takes by name."""


def data_set_names() -> list[str]:
    """Data sets that have a name of their own; others are named by a path or a Hub id."""
    return [name for name in DATASETS.names() if DATASETS.get(name).takes is None]


def data_set_of(name: str) -> DataSet | None:
    """What loads the data set of a name, a path or a Hub id; None where that is none of them."""
    if name in data_set_names():
        return DATASETS.get(name)
    sources = map(DATASETS.get, DATASETS.names())
    return next((source for source in sources if source.takes is not None and source.takes(name)), None)
