"""QQP of GLUE: whether two questions ask the same, as text to text."""

from __future__ import annotations

from lorafa.data.sets.prompts import LABEL, classified
from lorafa.data.sets.published import OtherSplit, Published, PublishedSettings

TEXTS = ("question1", "question2")
WORDS = ("different", "duplicate")

QQP = Published(
    hub="nyu-mll/glue",
    subset="qqp",
    file="qqp.jsonl",
    columns=(*TEXTS, LABEL),
    record=classified("classify the semantic similarity of the text", TEXTS, WORDS),
    labels=WORDS,
    heldout=OtherSplit("validation"),
).data_set(settings=PublishedSettings)
