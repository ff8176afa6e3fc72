"""Answers of several speakers, token by token, in one batch that mixes adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lorafa.backends.offload import device_of
from lorafa.chat.speakers import Row, Speakers
from lorafa.chat.written import Written
from lorafa.evals.generation import Sampling, decoder_start, encodes, padded, room_after, without_own_settings
from lorafa.models.modes import evaluating, reading_last_positions

Finish = Literal["stop", "length", "cancelled"]
"""Why an answer is over: at its own end or before a stop text; at its longest; because nobody waits for it."""
Hear = Callable[[str, "Finish | None"], None]
"""Takes a new piece of a text, and why that is over with it: None where it goes on."""


class Answer:
    """An answer as far as it is written. One thread writes it, and any may read or cancel it."""

    def __init__(self, speakers: Speakers, row: Row, hear: Hear = lambda *_: None) -> None:
        """Begin an empty answer.

        Args:
            hear: is given each new piece of its text, an empty one too, in the thread that writes, and with the last
                one why the answer is over.
        """
        self.row, self._hear = row, hear
        self._written = Written(lambda ids: speakers.decode(row.speaker, ids), row.stops)
        self.tokens = 0
        """How many were written, the one that ended it included."""
        self.finish: Finish | None = None
        """None while it is being written."""
        self.cancelled = False
        """Set it where nobody waits for the answer any more: it ends with the next token."""

    @property
    def text(self) -> str:
        return self._written.text

    @property
    def ids(self) -> list[int]:
        """Its tokens, without the one that ended it."""
        return self._written.ids

    def take(self, token: int) -> None:
        """Go on with a token."""
        self.tokens += 1
        if token in self.row.speaker.ends:
            self._end("stop")
            return
        new = self._written.add(token)
        if self._written.stopped:
            self._end("stop", new)
        elif self.tokens >= self.row.max_new_tokens:
            self._end("length", new)
        elif self.cancelled:
            self.cancel(new)
        else:
            self._hear(new, None)

    def cancel(self, new: str = "") -> None:
        """End it where it is."""
        self._end("cancelled", new)

    def _end(self, why: Finish, new: str = "") -> None:
        new += self._written.close()
        self.finish = why
        self._hear(new, why)


def write(model: Any, answers: Iterable[Answer]) -> None:
    """Write answers, each by its own adapter, in one batch; all have ended afterwards.

    A row's tokens depend on its prompt, its adapter and its seed alone, up to the rounding of a batch. A row that has
    ended stays in the batch until the last one has. So rows of which one would leave the model's context before the
    other ends do not share a batch, but are written one after the other.

    Args:
        model: a PeftModel, or a model without adapters where all rows are the base's.
        answers: none of them begun.

    Raises:
        LoraError, RuntimeError: the model cannot be run so; answers that have not ended stay as they are.
    """
    batches: list[list[Answer]] = []
    for answer in answers:
        batch = next((batch for batch in batches if _share(model, [*batch, answer])), None)
        if batch is None:
            batches.append(batch := [])
        batch.append(answer)
    for batch in batches:
        _write(model, batch)


def _share(model: Any, answers: Sequence[Answer]) -> bool:
    """Whether all of them can go on until the last one has ended."""
    room = room_after(model, max(len(answer.row.prompt) for answer in answers))
    return room is None or max(answer.row.max_new_tokens for answer in answers) <= room


def _write(model: Any, answers: Sequence[Answer]) -> None:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    rows = [answer.row for answer in answers]
    encoder = encodes(model)
    pad = next((id_ for row in rows if (id_ := row.speaker.tokenizer.pad_token_id) is not None), 0)
    ids, mask = padded([row.prompt for row in rows], pad, left=not encoder)
    settings = GenerationConfig(
        do_sample=False, num_beams=1, use_cache=True, return_dict_in_generate=False, pad_token_id=pad,
        max_new_tokens=max(row.max_new_tokens for row in rows),
    )  # fmt: skip
    if encoder:
        settings.decoder_start_token_id = decoder_start(model)
    names = {"adapter_names": [row.speaker.adapter for row in rows]} if hasattr(model, "peft_config") else {}
    device = device_of(model)
    with evaluating(model), reading_last_positions(model), without_own_settings(model):
        model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([_Choice(answers)]),
            stopping_criteria=StoppingCriteriaList([_Taking(answers)]),
            **names,
        )


class _Choice:
    """Leaves each row the tokens it may have next: its own vocabulary, or the one token that is drawn.

    `generate` takes the likeliest of them. Drawing here, by row, is what lets every row have a temperature and random
    numbers of its own.
    """

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers
        self._generators = [
            None if sampling is None else torch.Generator().manual_seed(sampling.seed)
            for sampling in (answer.row.sampling for answer in answers)
        ]

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        """Scores (rows, vocabulary) before the next token -> the same with -inf for what is not to come."""
        for place, (answer, generator) in enumerate(zip(self._answers, self._generators, strict=True)):
            row = answer.row
            if row.speaker.vocabulary < scores.shape[-1]:
                scores[place, row.speaker.vocabulary :] = -torch.inf
            if row.sampling is not None and generator is not None and answer.finish is None:
                token = draw(scores[place].float().cpu(), row.sampling, generator)
                scores[place] = -torch.inf
                scores[place, token] = 0.0
        return scores


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token drawn by its logits (vocabulary,): by softmax(logits / temperature), among the fewest tokens, the
    likeliest first, whose probability together is at least ``top_p``."""
    likeliest, order = (logits / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    if sampling.top_p < 1:
        before = likeliest.cumsum(-1) - likeliest
        likeliest = torch.where(before < sampling.top_p, likeliest, 0.0)
    return int(order[torch.multinomial(likeliest, 1, generator=generator)])


class _Taking:
    """Hands each row's new token to its answer, and tells `generate` which rows are over."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers

    def __call__(self, input_ids: Tensor, _: Any, **__: Any) -> Tensor:
        """Ids (rows, tokens so far) -> whether each row has ended, bool (rows,)."""
        for answer, token in zip(self._answers, input_ids[:, -1].tolist(), strict=True):
            if answer.finish is None:
                answer.take(token)
        return torch.tensor([answer.finish is not None for answer in self._answers], device=input_ids.device)
