"""SST-2 of GLUE: whether a sentence of a film review is positive, as text to text."""

from __future__ import annotations

from lorafa.data.sets.prompts import LABEL, classified
from lorafa.data.sets.published import OtherSplit, Published, PublishedSettings

TEXTS = ("sentence",)
WORDS = ("negative", "positive")

SST2 = Published(
    hub="nyu-mll/glue",
    subset="sst2",
    file="sst2.jsonl",
    columns=(*TEXTS, LABEL),
    record=classified("classify the sentiment of the text", TEXTS, WORDS),
    labels=WORDS,
    heldout=OtherSplit("validation"),
).data_set(settings=PublishedSettings)
