"""From records to the rows that a trainer of TRL is given: token ids, cut by us, and what is said of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lorafa.data.chat import IGNORE, Encoder, Sample, encode_prompts
from lorafa.data.records import Record
from lorafa.data.selection import Selection
from lorafa.errors import ConfigError, DataError, warn
from lorafa.train.objectives.rewards import scorers

if TYPE_CHECKING:
    from lorafa.train.settings.run import RunConfig

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """What is trained on and what is held out, by an objective of TRL."""

    train: list[Row]
    heldout: list[Row]
    said: list[str] = field(default_factory=list)
    """What was left out or cut, a sentence each."""
    dropped: int = 0
    """Rows that were left out."""
    truncated: int = 0
    """Rows that were cut."""

    @property
    def sha256(self) -> str:
        """Fingerprint of all rows in their order."""
        text = json.dumps([self.train, self.heldout], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class _Counts:
    """What happened to rows, counted by what is said of it."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}
        self.dropped = self.truncated = 0

    def left_out(self, what: str) -> Row | None:
        """Count a row that is left out, and give none in its place."""
        self.of[what] = self.of.get(what, 0) + 1
        self.dropped += 1
        return None

    def cut(self, what: str) -> None:
        """Count a row that is cut."""
        self.of[what] = self.of.get(what, 0) + 1
        self.truncated += 1

    def said(self) -> list[str]:
        return [f"{count:,} {what}." for what, count in self.of.items()]


def pairs(selection: Selection, tokenizer: Any, config: RunConfig) -> Rows:
    """Rows with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, both cut where ``data.max_length`` tokens end.

    Raises:
        DataError: a record has one answer, the answers of all are the same, or none fits; what the encoder raises.
    """
    better, worse, counts = _encoder(tokenizer, config), _encoder(tokenizer, config), _Counts()
    same: list[bool] = []

    def row(record: Record) -> Row | None:
        if not record.rejected:
            raise DataError(
                f"{_place(record, selection)} has one answer, and objective={config.objective.name} compares two: give "
                "rows with prompt, chosen and rejected."
            )
        chosen, rejected = better.sample(record), worse.sample(_with_rejected(record))
        same.append((chosen.input_ids, chosen.truncated) == (rejected.input_ids, rejected.truncated))
        if not (chosen.trained and rejected.trained):
            return counts.left_out("pairs have no answer within data.max_length and were left out")
        if chosen.input_ids == rejected.input_ids:
            return counts.left_out("pairs are the same answer twice, or within data.max_length, and were left out")
        if chosen.truncated or rejected.truncated:
            counts.cut("pairs have an answer that was cut at data.max_length")
        (prompt, one), (other_prompt, other) = (_divided(sample, record) for sample in (chosen, rejected))
        if prompt != other_prompt:
            raise DataError(
                f"{record.place}: the chat template writes the prompt of the two answers differently, so they could "
                "not be compared. Give another template (data.template)."
            )
        return {"prompt_ids": prompt, "chosen_ids": one, "rejected_ids": other, "length": _longer(chosen, rejected)}

    rows = _made(selection, row, counts, lambda: _require_different(same, selection))
    for text in worse.remarks():
        if text not in better.remarks():
            warn(f"Of the rejected answers: {text}")
    return rows


def judged(selection: Selection, tokenizer: Any, config: RunConfig) -> Rows:
    """Rows with ``prompt_ids``, ``completion_ids``, cut where ``data.max_length`` tokens end, and ``label``.

    Raises:
        DataError: a record does not say whether its answer is a good one, or none fits; what the encoder raises.
    """
    encoder, counts = _encoder(tokenizer, config), _Counts()

    def row(record: Record) -> Row | None:
        if record.desirable is None:
            raise DataError(
                f"{_place(record, selection)} does not say whether its answer is a good one, and objective="
                f"{config.objective.name} learns from that: give rows with prompt, completion and label (true, false)."
            )
        sample = encoder.sample(record)
        if not sample.trained:
            return counts.left_out("rows have no answer within data.max_length and were left out")
        if sample.truncated:
            counts.cut("rows have an answer that was cut at data.max_length")
        prompt, answer = _divided(sample, record)
        length = len(prompt) + len(answer)
        return {"prompt_ids": prompt, "completion_ids": answer, "label": record.desirable, "length": length}

    rows = _made(selection, row, counts)
    if len({one["label"] for one in rows.train}) == 1:
        verdict = "good" if rows.train[0]["label"] else "bad"
        warn(f"All answers to train on are judged {verdict}, so nothing says what the others would be.")
        return rows
    own, good = config.objective.own, sum(one["label"] for one in rows.train)
    bad = len(rows.train) - good
    ratio = own.desirable_weight * good / (own.undesirable_weight * bad) if own.undesirable_weight else 0.0
    if own.undesirable_weight and not 1 <= ratio <= 4 / 3:
        warn(
            f"{good:,} good and {bad:,} bad answers weigh {ratio:.3g} to 1 with their weights, where the paper advises "
            f"1 to 4/3: objective.desirable_weight={own.undesirable_weight * bad / good:.3g} is 1, for example."
        )
    return rows


def prompts(selection: Selection, tokenizer: Any, config: RunConfig) -> Rows:
    """Rows with ``prompt`` (messages), ``prompt_ids`` and ``answer``: the record's final answer, else its text, or None
    where it has none. Prompts that leave no room for an answer within ``data.max_length`` are left out.

    Raises:
        DataError: a prompt has tools or what chat templates alone read, or none leaves room.
    """
    rewards, names = scorers(config.objective.own.rewards), ",".join(config.objective.own.rewards)
    counts, room = _Counts(), config.data.max_length - config.objective.own.max_completion_length
    if room < 1:
        raise ConfigError(
            f"objective.max_completion_length={config.objective.own.max_completion_length} leaves no room for a prompt "
            f"within data.max_length={config.data.max_length}. Raise the one, or lower the other."
        )

    def row(record: Record) -> Row | None:
        if record.tools or any(message.extra for message in record.question):
            raise DataError(
                f"{record.place}: the prompt has tools, or more than role and content, which rewards are not given. "
                "Delete the row."
            )
        gold = _gold(record)
        if lacks := next((lacks for reward in rewards if (lacks := reward.lacks(gold))), None):
            raise DataError(
                f"{_place(record, selection)} has {lacks}, and objective.reward={names} compares with one. Give a "
                "column 'answer', or another reward."
            )
        (ids,) = encode_prompts([record], tokenizer)
        if len(ids) > room:
            return counts.left_out(
                f"prompts are longer than {room} tokens (data.max_length less objective.max_completion_length) and "
                "were left out"
            )
        asked = [{"role": message.role, "content": message.content} for message in record.question]
        return {"prompt": asked, "prompt_ids": ids, "answer": gold}

    return _made(selection, row, counts)


def _made(
    selection: Selection, row: Callable[[Record], Row | None], counts: _Counts, check: Callable[[], None] | None = None
) -> Rows:
    """The rows of all records; those of the training in the order of the selection."""
    of_number = {number: row(record) for number, record in selection.training()}
    if check is not None:
        check()
    train = [made for number in selection.order.tolist() if (made := of_number[number]) is not None]
    heldout = [made for record in selection.heldout if (made := row(record)) is not None]
    if not train:
        raise DataError(f"None of the rows of {selection.source} can be trained on: {' '.join(counts.said())}")
    return Rows(train, heldout, counts.said(), counts.dropped, counts.truncated)


def _encoder(tokenizer: Any, config: RunConfig) -> Encoder:
    return Encoder(tokenizer, config.data.max_length)


def _with_rejected(record: Record) -> Record:
    return replace(record, messages=(*record.question, *record.rejected), answer=None)


def _divided(sample: Sample, record: Record) -> tuple[list[int], list[int]]:
    """The ids before the answer and those of it; what a template writes behind its end is read by nothing.

    Raises:
        DataError: what is trained is not one stretch.
    """
    trained = [at for at, label in enumerate(sample.labels) if label != IGNORE]
    first, last = trained[0], trained[-1] + 1
    if len(trained) != last - first:
        raise DataError(
            f"{record.place}: there are turns between those that are trained, and an answer is one turn. Put earlier "
            "ones into the prompt."
        )
    return list(sample.input_ids[:first]), list(sample.input_ids[first:last])


def _gold(record: Record) -> str | None:
    text = record.messages[-1].content
    return record.answer if record.answer is not None else text if text.strip() else None


def _longer(one: Sample, other: Sample) -> int:
    return max(len(one.input_ids), len(other.input_ids))


def _require_different(same: Iterable[bool], selection: Selection) -> None:
    found = list(same)
    if found and all(found):
        raise DataError(
            f"In every one of the {len(found):,} rows of {selection.source} 'chosen' and 'rejected' are the same "
            "answer, so there is nothing to prefer. Check the two columns."
        )


def _place(record: Record, selection: Selection) -> str:
    return record.place or f"A row of {selection.source}"
