"""Commonsense170k of LLM-Adapters (Hu et al. 2023, arXiv:2304.01933): the training rows of eight tasks, put together.

LoRA-One reads a file and holds 120 rows out. Its words were not at hand: an instruction is written as in Alpaca here,
as in LLM-Adapters.
"""

from __future__ import annotations

from lorafa.data.sets.prompts import alpaca
from lorafa.data.sets.published import Drawn, Published, PublishedSettings

COMMONSENSE_REASONING = Published(
    hub="zwhe99/commonsense_170k",
    file="commonsense_170k.json",
    columns=("instruction", "output"),
    record=alpaca,
    heldout=Drawn(120),
).data_set(settings=PublishedSettings)
