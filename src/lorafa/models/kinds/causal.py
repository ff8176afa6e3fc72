"""Causal language models: the next token of any text, by all that stands before it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lorafa.data.chat import encode_prompts
from lorafa.data.collate import Collate, Collator
from lorafa.data.encoding import CHAT, Encoding
from lorafa.data.records import Record
from lorafa.errors import SourceError
from lorafa.models.kinds.checks import check_finite
from lorafa.models.kinds.entry import LIKELIHOOD, NEXT_TOKEN, TEXT, Kind
from lorafa.models.sourced import as_source_error, model_step


class Causal(Kind):
    """A decoder; its samples are conversations, its loss is that of `lorafa.models.head_loss`."""

    name = "causal"
    words = "a causal language model"
    auto_class = "AutoModelForCausalLM"
    task_type = "CAUSAL_LM"
    offers = frozenset({NEXT_TOKEN, LIKELIHOOD, TEXT})
    packs = adds_tokens = own_template = True

    def is_of(self, model: Any) -> bool:
        return False  # what no other kind is

    def is_made_for(self, config: Any) -> bool:
        return False

    def check(self, where: str, model: Any) -> None:
        """Two inputs that differ in their second token have the same, finite output at the first."""
        ids = torch.tensor([[0, 1], [0, 2]], device=model.device)
        with as_source_error(f"The {where} could not run on two tokens", model_step()), torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, 0]
        check_finite(where, model, logits)
        if (logits[0] - logits[1]).abs().max() > 4 * torch.finfo(logits.dtype).eps * logits.abs().max():
            raise SourceError(
                f"The {where} ({type(model).__name__}) looks ahead: its output at a token depends on the next one, so "
                "it is no causal language model and its loss would mean nothing. Give a decoder."
            )

    def encoding(self, model: Any) -> Encoding:
        return CHAT

    def prompts(self, records: Iterable[Record], tokenizer: Any) -> list[list[int]]:
        return encode_prompts(records, tokenizer)

    def collator(self, pad_id: int) -> Collate:
        return Collator(pad_id)


CAUSAL = Causal()
