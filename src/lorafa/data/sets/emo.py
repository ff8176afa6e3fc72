"""EmoContext of SemEval 2019 (EMO): the feeling in three turns of a talk, as text to text."""

from __future__ import annotations

from lorafa.data.sets.prompts import LABEL, classified
from lorafa.data.sets.published import OtherSplit, Published, PublishedSettings

TEXTS = ("text",)
WORDS = ("others", "happy", "sad", "angry")

EMO = Published(
    hub="SemEvalWorkshop/emo",
    file="emo.jsonl",
    columns=(*TEXTS, LABEL),
    record=classified("classify the emotion of the text", TEXTS, WORDS),
    labels=WORDS,
    heldout=OtherSplit("test"),
).data_set(settings=PublishedSettings)
