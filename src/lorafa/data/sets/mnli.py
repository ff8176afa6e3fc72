"""MNLI of GLUE: whether a premise entails a hypothesis, as text to text; held out are matched genres."""

from __future__ import annotations

from lorafa.data.sets.prompts import LABEL, classified
from lorafa.data.sets.published import OtherSplit, Published, PublishedSettings

TEXTS = ("premise", "hypothesis")
WORDS = ("entailment", "neutral", "contradiction")

MNLI = Published(
    hub="nyu-mll/glue",
    subset="mnli",
    file="mnli.jsonl",
    columns=(*TEXTS, LABEL),
    record=classified("classify the semantic similarity of the text", TEXTS, WORDS),
    labels=WORDS,
    heldout=OtherSplit("validation_matched"),
).data_set(settings=PublishedSettings)
