"""Prompts that the model answers itself, as samples: with the row's answer behind them where there is one."""

from __future__ import annotations

from lorafa.data.chat import IGNORE, Encoder, Sample, encode_prompts
from lorafa.data.encoding import Encoding
from lorafa.data.records import Record


class PromptEncoder(Encoder):
    """From records to samples; that of a prompt alone ends with the prompt, whose last token stands for what follows.

    Raises:
        DataError: as :class:`lorafa.data.chat.Encoder`.
    """

    def sample(self, record: Record) -> Sample:
        """The sample of a record, cut at ``max_length``."""
        if is_answered(record):
            return super().sample(record)
        (ids,) = encode_prompts([record], self.tokenizer)
        self.rows += 1
        self.usable += 1
        kept = ids[: self.max_length]
        return Sample(kept, [IGNORE] * (len(kept) - 1) + kept[-1:], truncated=len(ids) > len(kept), place=record.place)

    def remarks(self) -> list[str]:
        """What is to be said of the records so far; nothing of answers where none has any."""
        return super().remarks() if self.rows else []

    @property
    def templated(self) -> bool:
        """A prompt is always written by the chat template."""
        return True


def is_answered(record: Record) -> bool:
    """Whether the row has an answer to its prompt."""
    last = record.messages[-1]
    return last.role == "assistant" and (last.trained or bool(last.content))


PROMPTED = Encoding("prompts", PromptEncoder)
"""Prompts with or without an answer."""
