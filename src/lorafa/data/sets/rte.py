"""RTE of SuperGLUE: whether a premise entails a hypothesis, as text to text.

LoRA-GA does not have it, and LoRA-One's words were not at hand: these are ours, in the form that GLUE has.
"""

from __future__ import annotations

from lorafa.data.sets.prompts import LABEL, classified
from lorafa.data.sets.published import OtherSplit, Published, PublishedSettings

TEXTS = ("premise", "hypothesis")
WORDS = ("entailment", "not_entailment")

RTE = Published(
    hub="aps/super_glue",
    subset="rte",
    file="rte.jsonl",
    columns=(*TEXTS, LABEL),
    record=classified("classify whether the premise entails the hypothesis", TEXTS, WORDS),
    labels=WORDS,
    heldout=OtherSplit("validation"),
).data_set(settings=PublishedSettings)
