"""What a run measures of its model before and after: held-out answers, an evaluation, what was forgotten."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from lorafa.data.prompted import is_answered
from lorafa.evals.entry import Subject
from lorafa.evals.forgetting import forgetting
from lorafa.evals.loss import answer_loss
from lorafa.evals.sample_answers import SHOWN
from lorafa.models.batch_loss import summed_by_rows
from lorafa.models.head_loss import supervised_nll
from lorafa.train.objectives.making import measured
from lorafa.train.prepared import Prepared
from lorafa.train.progress import progress_bar
from lorafa.train.settings.run import RunConfig


def measure(prepared: Prepared, config: RunConfig, console: Console, when: str) -> dict[str, Any]:
    """The answer loss over all held-out samples, and what ``eval.name`` measures.

    Returns:
        loss (nats a token), answers (a few for the report) and, where the evaluation asks any record, its numbers; no
        loss where no rows are held out.
    """
    if not prepared.data.heldout.samples:
        return {"answers": []}
    settings, evaluation, of_kind = config.eval, prepared.evaluation, prepared.kind.row_losses()
    chunked = prepared.trial is not None and prepared.trial.own_loss_reason is None
    summed = supervised_nll if chunked else None if of_kind is None else summed_by_rows(of_kind)
    own = {}
    if prepared.rows is not None:
        own = dict(measured(prepared.model, prepared.tokenizer, prepared.rows, config))
        words = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in own.items())
        console.print(f"{when}: {words}" if own else f"{when}: the objective measures nothing.", highlight=False)
    if not config.objective.entry.answers or not all(map(is_answered, prepared.data.records)):
        return {**own, "answers": []}
    loss = answer_loss(prepared.model, prepared.data.heldout.samples, prepared.collator, settings.batch_size, summed)
    asked = evaluation.entry.asks(prepared.data.records, evaluation.own)
    if not asked:
        console.print(f"{when}: answer loss {loss:.4f}", highlight=False)
        return {"loss": loss, **own, "answers": []}
    ends = prepared.data.train.ends | prepared.data.heldout.ends
    subject = Subject(prepared.model, prepared.tokenizer, ends, config.data.max_length)
    with progress_bar(console, f"{when}: answering") as bar:
        scores = evaluation.entry.measure(subject, asked, evaluation.own, settings.batch_size, bar)
    console.print(f"{when}: {scores.words}, answer loss {loss:.4f}", highlight=False)
    return {"loss": loss, **own, **scores.numbers, "answers": list(scores.answers[:SHOWN])}


def forgotten(prepared: Prepared, config: RunConfig, console: Console) -> dict[str, Any]:
    """How far the model has moved from its base."""
    with progress_bar(console, "After: forgetting") as bar:
        scores = forgetting(Subject(prepared.model, prepared.tokenizer), config.eval.batch_size, bar)
    console.print(f"After: {scores.words}", highlight=False)
    return dict(scores.numbers)


def side_by_side(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a question: both answers."""
    return [
        {
            "question": old["question"],
            "gold": old["gold"],
            "before": {"output": old["output"], "correct": old["correct"]},
            "after": {"output": new["output"], "correct": new["correct"]},
        }
        for old, new in zip(before, after, strict=True)
    ]
