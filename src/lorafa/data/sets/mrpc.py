"""MRPC of GLUE: whether two sentences say the same, as text to text."""

from __future__ import annotations

from lorafa.data.sets.prompts import LABEL, classified
from lorafa.data.sets.published import OtherSplit, Published, PublishedSettings

TEXTS = ("sentence1", "sentence2")
WORDS = ("different", "equivalent")

MRPC = Published(
    hub="nyu-mll/glue",
    subset="mrpc",
    file="mrpc.jsonl",
    columns=(*TEXTS, LABEL),
    record=classified("classify the semantic similarity of the text", TEXTS, WORDS),
    labels=WORDS,
    heldout=OtherSplit("validation"),
).data_set(settings=PublishedSettings)
