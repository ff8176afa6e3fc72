"""How far an adapter moves the outputs of its base on a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.adapter import Adapter
from lorafa.errors import DataError, NotAvailableError
from lorafa.models.modes import evaluating
from lorafa.peft_model import PeftModel
from lorafa.surgery.walk import lora_layers

TEXT = """\
The river rises in the hills north of the town and reaches the sea after ninety kilometres. In 1871 the first bridge
was built of stone; two floods, in 1902 and 1947, took parts of it away, and each time it was repaired. A farmer sells
24 boxes of apples at 3 dollars a box and buys 5 sacks of seed at 7 dollars a sack, so that 37 dollars are left.

def mean(values):
    return sum(values) / len(values)

Question: What is the capital of France? Answer: Paris.
"""
"""What is read where no text is given: prose, numbers, code and a question."""
MOST_TOKENS = 256
"""Tokens of a text that are read: the logits of all of them are held at once, twice."""
_ROWS = 64
"""Positions whose distributions are compared at once."""


@dataclass(frozen=True)
class Effect:
    """The outputs with the adapter beside those of the base, on one text."""

    positions: int
    """How many distributions are compared: one a token, of a classifier one."""
    kl: float
    """KL(base || with the adapter), the mean over positions, in nats."""
    largest_kl: float
    """The same at the position where it is largest."""
    difference: float
    """The largest absolute difference of a logit."""
    changed: float
    """The share of positions where another token, or class, is the likeliest."""
    cut: bool = False
    """Whether the text is longer than what was read."""


def effect_of(model: PeftModel, tokenizer: Any, text: str) -> Effect:
    """Run the base, and the base with its active adapter, on a text; the first ``MOST_TOKENS`` tokens of it.

    Raises:
        DataError: the tokenizer makes no token of the text, or the adapter counts nowhere in it.
        NotAvailableError: the model gives no logits.
    """
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids
    if not ids.numel():
        raise DataError("The tokenizer makes no token of the text, so nothing can be compared on it. Give another.")
    base: Any = model.get_base_model()
    context = getattr(base.config.get_text_config(), "max_position_embeddings", None) or MOST_TOKENS
    cut = ids[:, : min(MOST_TOKENS, context)].to(next(base.parameters()).device)
    if not any(adapter.variant.counts_in(cut[0].tolist()) for adapter in _adapters(base)):
        raise DataError(
            "The effect on the outputs was not measured: the adapter counts nowhere in the text, which has no "
            "invocation. Give one that has: --text <file>."
        )
    inputs: dict[str, Tensor] = {"input_ids": cut, "attention_mask": torch.ones_like(cut)}
    if getattr(base.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(cut)
    with evaluating(model):
        adapted = _logits(model(**inputs))
        with model.disable_adapter():
            plain = _logits(model(**inputs))
    return compared(plain, adapted, cut=cut.shape[1] < ids.shape[1])


def _adapters(base: nn.Module) -> Iterator[Adapter]:
    return (adapter for _, layer in lora_layers(base) for adapter in layer.counting())


def _logits(output: Any) -> Tensor:
    """(positions, V), on the CPU or where they are."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise NotAvailableError(
            "The model gives no logits, so there is no effect on them to be measured; the other numbers are there."
        )
    return logits.reshape(-1, logits.shape[-1])


def compared(plain: Tensor, adapted: Tensor, *, cut: bool = False) -> Effect:
    """Compare logits (positions, V) of the base with those of the adapted model.

    Args:
        cut: whether they are those of the beginning of a text.

    Raises:
        DataError: some are not numbers.
    """
    for logits, whose in ((plain, "of the base alone"), (adapted, "with the adapter")):
        if bool(logits.isnan().any()):
            raise DataError(f"The logits {whose} hold NaN, so the effect on them was not measured.")
    kls, differences, changed = [], [], 0
    for first in range(0, len(plain), _ROWS):
        one, other = (logits[first : first + _ROWS].double() for logits in (plain.cpu(), adapted.cpu()))
        p, q = one.log_softmax(-1), other.log_softmax(-1)
        kls.append(torch.where(p.exp() > 0, p.exp() * (p - q), 0).sum(-1).clamp(min=0))
        differences.append(float(torch.where(one == other, 0, (one - other).abs()).max()))  # -inf may be in both
        changed += int((one.argmax(-1) != other.argmax(-1)).sum())
    kl = torch.cat(kls)
    return Effect(len(plain), float(kl.mean()), float(kl.max()), max(differences), changed / len(plain), cut)
