"""A few answers to look at, of records that nothing grades: conversations, instructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorafa.data.records import Record
from lorafa.evals.by_length import Progress
from lorafa.evals.entry import Subject
from lorafa.evals.generation import generate_greedy, room_for

SHOWN = 6
"""Questions whose answers are kept for the report."""


def with_question(records: Sequence[Record]) -> list[Record]:
    """The first few that ask something before their last answer."""
    return [record for record in records if record.question][:SHOWN]


def sample_answers(
    subject: Subject, records: Sequence[Record], max_new_tokens: int, batch_size: int, progress: Progress
) -> list[dict[str, Any]]:
    """What the model writes for each record; those whose prompt leaves no room for an answer are left out."""
    prompts = subject.prompts(records)
    fit = [place for place, prompt in enumerate(prompts) if room_for(subject.model, prompt, max_new_tokens)]
    written = generate_greedy(
        subject.model,
        subject.tokenizer,
        [prompts[place] for place in fit],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        ends=subject.ends,
        progress=progress,
    )
    return [
        {
            "question": records[place].question[-1].content,
            "gold": records[place].messages[len(records[place].question)].content,
            "output": subject.tokenizer.decode(ids, skip_special_tokens=True),
            "correct": None,
        }
        for place, ids in zip(fit, written, strict=True)
    ]
