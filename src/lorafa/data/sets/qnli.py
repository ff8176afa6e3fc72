"""QNLI of GLUE: whether a sentence answers a question, as text to text."""

from __future__ import annotations

from lorafa.data.sets.prompts import LABEL, classified
from lorafa.data.sets.published import OtherSplit, Published, PublishedSettings

TEXTS = ("question", "sentence")
WORDS = ("entailment", "not_entailment")

QNLI = Published(
    hub="nyu-mll/glue",
    subset="qnli",
    file="qnli.jsonl",
    columns=(*TEXTS, LABEL),
    record=classified("classify the semantic similarity of the question and the sentence", TEXTS, WORDS),
    labels=WORDS,
    heldout=OtherSplit("validation"),
).data_set(settings=PublishedSettings)
