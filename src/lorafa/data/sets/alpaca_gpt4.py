"""Alpaca under a name that promises answers of GPT-4: the scripts load the same rows by both names, as here."""

from __future__ import annotations

from lorafa.data.sets.alpaca import PUBLISHED
from lorafa.data.sets.published import PublishedSettings

ALPACA_GPT4 = PUBLISHED.data_set(settings=PublishedSettings)
