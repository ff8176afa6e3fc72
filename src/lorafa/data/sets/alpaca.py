"""Alpaca: instructions with answers, in the version that was cleaned by hand.

The scripts draw two tenths without a seed, one to leave out and one to evaluate on; here one tenth is both.
"""

from __future__ import annotations

from lorafa.data.sets.prompts import alpaca
from lorafa.data.sets.published import Drawn, Published, PublishedSettings

PUBLISHED = Published(
    hub="yahma/alpaca-cleaned",
    file="alpaca_data_cleaned.json",
    columns=("instruction", "output"),
    record=alpaca,
    heldout=Drawn(0.1),
)

ALPACA = PUBLISHED.data_set(settings=PublishedSettings)
