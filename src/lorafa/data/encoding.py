"""How records become samples: one way for each kind of model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorafa.data.chat import Encoder, Sample, SampleEncoder, render_sample

if TYPE_CHECKING:
    from rich.text import Text


@dataclass(frozen=True)
class Encoding:
    """A way from records to samples."""

    name: str
    """What tells its samples from those of other ways, beside tokenizer and length."""
    make: Callable[[Any, int], SampleEncoder]
    """(tokenizer, max_length) -> what encodes."""
    shown: Callable[[Sample, Any], Text] = render_sample
    """(sample, tokenizer) -> it in words, what is trained in green."""


CHAT = Encoding("chat", Encoder)
"""Conversations as a causal language model reads them: see :class:`lorafa.data.chat.Encoder`."""
