"""FLAN: tasks of many kinds as instructions, of which the first 110,000 rows are read."""

from __future__ import annotations

from lorafa.data.sets.prompts import instructions
from lorafa.data.sets.published import InOrder, Published, PublishedSettings

FLAN = Published(
    hub="Muennighoff/flan",
    file="flan.jsonl",
    columns=("inputs", "targets"),
    record=instructions("inputs", "targets"),
    heldout=InOrder(trained=100_000, heldout=10_000),
    streamed=True,
).data_set(settings=PublishedSettings)
