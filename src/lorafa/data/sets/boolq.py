"""BoolQ of SuperGLUE: whether the answer to a question is yes by a passage, as text to text.

LoRA-GA does not have it, and LoRA-One's words were not at hand: these are ours, in the form that GLUE has.
"""

from __future__ import annotations

from lorafa.data.sets.prompts import LABEL, classified
from lorafa.data.sets.published import OtherSplit, Published, PublishedSettings

TEXTS = ("question", "passage")
WORDS = ("false", "true")

BOOLQ = Published(
    hub="aps/super_glue",
    subset="boolq",
    file="boolq.jsonl",
    columns=(*TEXTS, LABEL),
    record=classified("answer the question by the passage with true or false", TEXTS, WORDS),
    labels=WORDS,
    heldout=OtherSplit("validation"),
).data_set(settings=PublishedSettings)
