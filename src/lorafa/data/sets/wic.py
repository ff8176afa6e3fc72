"""WiC of SuperGLUE: whether a word has one meaning in two sentences, as text to text.

LoRA-GA does not have it, and LoRA-One's words were not at hand: these are ours, in the form that GLUE has.
"""

from __future__ import annotations

from lorafa.data.sets.prompts import LABEL, classified
from lorafa.data.sets.published import OtherSplit, Published, PublishedSettings

TEXTS = ("word", "sentence1", "sentence2")
WORDS = ("different", "same")

WIC = Published(
    hub="aps/super_glue",
    subset="wic",
    file="wic.jsonl",
    columns=(*TEXTS, LABEL),
    record=classified("classify whether the word has the same meaning in both sentences", TEXTS, WORDS),
    labels=WORDS,
    heldout=OtherSplit("validation"),
).data_set(settings=PublishedSettings)
