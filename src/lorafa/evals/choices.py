"""How likely a model finds each of several ways to go on after a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from lorafa.backends.offload import device_of
from lorafa.data.chat import IGNORE, Sample
from lorafa.data.collate import Collator
from lorafa.data.rendering import start_token
from lorafa.errors import DataError
from lorafa.evals.by_length import Progress, by_length
from lorafa.evals.loss import row_losses
from lorafa.models.head_loss import supervised_nll, supports_chunked_loss
from lorafa.models.modes import evaluating
from lorafa.models.positions import Positions, from_all_logits


@dataclass(frozen=True)
class Choices:
    """A text in tokens, and what may follow it."""

    prompt: list[int]
    tails: list[list[int]]
    """The tokens of each way to go on; none is empty."""

    @property
    def single(self) -> bool:
        """Whether each is one token."""
        return all(len(tail) == 1 for tail in self.tails)


def plain_ids(tokenizer: Any) -> Callable[[str], list[int]]:
    """What makes tokens of a text as a model reads it: those of the text after the token that begins a sequence, where
    this tokenizer writes one."""
    start = start_token(tokenizer)
    first = [tokenizer.convert_tokens_to_ids(start)] if start else []

    def ids(text: str) -> list[int]:
        return [*first, *tokenizer(text, add_special_tokens=False).input_ids]

    return ids


def choices(ids: Callable[[str], list[int]], text: str, words: Sequence[str]) -> Choices:
    """A text, and words that may follow it, cut where their tokens begin to differ.

    Where a tokenizer puts a blank, or what stands before a word, into the word's own token is up to it: what all have
    in common is the prompt.

    Raises:
        DataError: the tokenizer writes two of the words alike, or one as the beginning of another.
    """
    whole = [ids(text + word) for word in words]
    common = len(list(takewhile(lambda column: len({*column}) == 1, zip(*whole, strict=False))))
    tails = [one[common:] for one in whole]
    if not common or not all(tails) or len({*map(tuple, tails)}) < len(tails):
        raise DataError(
            f"The tokenizer does not tell {', '.join(map(repr, words))} apart after {text[-20:]!r}. Give a "
            "model whose tokenizer does."
        )
    return Choices(whole[0][:common], tails)


def log_probs(
    model: Any, asked: Sequence[Choices], pad: int, batch_size: int, progress: Progress | None
) -> list[list[float]]:
    """The log-probability of every tail after its prompt, in nats, summed over its tokens; float32 at least.

    One pass a prompt where all its tails are single tokens, and one a tail where they are not. The model is left as it
    was. Several processes share the prompts out, and all get all.

    Args:
        pad: id that fills up the rows of a batch.
    """
    found: dict[int, list[float]] = {}
    one = [number for number, each in enumerate(asked) if each.single]
    several = [number for number, each in enumerate(asked) if not each.single]
    found |= zip(one, _of_single([asked[n] for n in one], model, pad, batch_size, progress), strict=True)
    tails = [(number, tail) for number in several for tail in asked[number].tails]
    samples = [_sample(asked[number].prompt, tail) for number, tail in tails]
    for (number, _), loss in zip(tails, row_losses(model, samples, Collator(pad), batch_size, progress), strict=True):
        found.setdefault(number, []).append(-loss)
    return [found[number] for number in range(len(asked))]


def _sample(prompt: list[int], tail: list[int]) -> Sample:
    return Sample([*prompt, *tail], [IGNORE] * len(prompt) + tail)


def _of_single(
    asked: Sequence[Choices], model: Any, pad: int, batch_size: int, progress: Progress | None
) -> list[list[float]]:
    """The scores of questions whose tails are single tokens: all from one position."""
    if not asked:
        return []
    device, chunked, collator = device_of(model), supports_chunked_loss(model) is None, Collator(pad)
    at_once = batch_size if chunked else 1  # all logits of one prompt at a time

    def of_batch(numbers: list[int]) -> list[list[float]]:
        samples = [_sample(asked[number].prompt, asked[number].tails[0]) for number in numbers]
        batch = {name: tensor.to(device) for name, tensor in collator(samples).items()}
        if chunked:
            kept = Positions()
            supervised_nll(model, batch, objective=kept)
            logits = kept.logits()
        else:
            logits = from_all_logits(model, batch)
        rows = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        pairs = zip(numbers, rows, strict=True)
        return [[float(row[tail[0]]) for tail in asked[number].tails] for number, row in pairs]

    with evaluating(model):
        return by_length(of_batch, [len(each.prompt) for each in asked], at_once, progress)
