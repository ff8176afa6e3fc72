"""CoLA of GLUE: whether a sentence is grammatical, as text to text."""

from __future__ import annotations

from lorafa.data.sets.prompts import LABEL, classified
from lorafa.data.sets.published import OtherSplit, Published, PublishedSettings

TEXTS = ("sentence",)
WORDS = ("unacceptable", "acceptable")

COLA = Published(
    hub="nyu-mll/glue",
    subset="cola",
    file="cola.jsonl",
    columns=(*TEXTS, LABEL),
    record=classified("classify the grammaticality of the text", TEXTS, WORDS),
    labels=WORDS,
    heldout=OtherSplit("validation"),
).data_set(settings=PublishedSettings)
