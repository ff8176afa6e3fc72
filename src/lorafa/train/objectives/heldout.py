"""What preference and reward models are measured by on held-out rows: which of two answers they take for the better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorafa.data.collate import padded
from lorafa.data.records import Message
from lorafa.data.unanswered import Unanswered
from lorafa.evals.answering import ends_of
from lorafa.evals.generation import generate_greedy
from lorafa.models.modes import evaluating
from lorafa.train.objectives.rewards import scorers

if TYPE_CHECKING:
    from lorafa.train.settings.run import RunConfig

Row = Mapping[str, Any]


def preferred(model: Any, tokenizer: Any, rows: Sequence[Row], config: RunConfig) -> dict[str, float]:
    """By log-probabilities of whole answers, in nats: the share of pairs whose chosen answer is the likelier one, and
    the mean of log p(chosen) - log p(rejected)."""
    size = config.eval.batch_size
    chosen, rejected = (
        log_probabilities(model, [(row["prompt_ids"], row[f"{which}_ids"]) for row in rows], size)
        for which in ("chosen", "rejected")
    )
    return _compared(chosen, rejected)


def by_verdict(model: Any, tokenizer: Any, rows: Sequence[Row], config: RunConfig) -> dict[str, float]:
    """Mean log-probabilities of whole answers, in nats: of those judged good, and of those judged bad."""
    answers = [(row["prompt_ids"], row["completion_ids"]) for row in rows]
    found = log_probabilities(model, answers, config.eval.batch_size)
    good = torch.tensor([row["label"] for row in rows])
    names = {"logp_desirable": found[good], "logp_undesirable": found[~good]}
    return {name: float(values.mean()) for name, values in names.items() if len(values)}


def scored(model: Any, tokenizer: Any, rows: Sequence[Row], config: RunConfig) -> dict[str, float]:
    """By the scores of a reward model: the share of pairs whose chosen answer has the higher one, and the mean of the
    difference."""
    size = config.eval.batch_size
    chosen, rejected = (
        _scores(model, [[*row["prompt_ids"], *row[f"{which}_ids"]] for row in rows], tokenizer.pad_token_id, size)
        for which in ("chosen", "rejected")
    )
    return _compared(chosen, rejected)


def rewarded(model: Any, tokenizer: Any, rows: Sequence[Row], config: RunConfig) -> dict[str, float]:
    """The mean reward of the likeliest answers, by the weights that the training adds rewards up with."""
    own = config.objective.own
    prompts, ends = [row["prompt_ids"] for row in rows], ends_of(tokenizer, Unanswered((Message("user", "?"),)))
    longest, size = own.max_completion_length, config.eval.batch_size
    written = generate_greedy(model, tokenizer, prompts, batch_size=size, max_new_tokens=longest, ends=ends)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    told = {
        "prompts": [row["prompt"] for row in rows],
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "completion_ids": written,
        "answer": [row["answer"] for row in rows],
    }
    rewards = scorers(own.rewards)
    weights = own.reward_weights or [1.0] * len(rewards)
    total = sum(weight * sum(reward(**told)) for weight, reward in zip(weights, rewards, strict=True))
    return {"reward": total / len(rows)}


@torch.no_grad()
def log_probabilities(model: Any, answers: Sequence[tuple[list[int], list[int]]], size: int) -> Tensor:
    """log p of each answer after its prompt, in nats, float64 (answers,): the sum over its tokens."""
    found: list[Tensor] = []
    with evaluating(model):
        for batch in _batches(answers, size):
            ids = [[*prompt, *answer] for prompt, answer in batch]
            inputs = _inputs(ids, 0, model.device)
            logits = model(**inputs, use_cache=False).logits
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))[:, :-1].log_softmax(-1)
            of_next = wide.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0].double()
            for row, (prompt, answer) in zip(of_next, batch, strict=True):
                found.append(row[len(prompt) - 1 : len(prompt) + len(answer) - 1].sum().cpu())
    return torch.stack(found)


@torch.no_grad()
def _scores(model: Any, texts: Sequence[list[int]], pad_id: int, size: int) -> Tensor:
    found = []
    with evaluating(model):
        for batch in _batches(texts, size):
            found.append(model(**_inputs(batch, pad_id, model.device)).logits[:, 0].double().cpu())
    return torch.cat(found)


def _compared(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    return {
        "preference_accuracy": float((chosen > rejected).double().mean()),
        "preference_margin": float((chosen - rejected).mean()),
    }


def _inputs(ids: Sequence[list[int]], pad_id: int, device: Any) -> dict[str, Tensor]:
    made = {"input_ids": padded(list(ids), pad_id), "attention_mask": padded([[1] * len(row) for row in ids], 0)}
    return {name: tensor.to(device) for name, tensor in made.items()}


def _batches(things: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (things[at : at + size] for at in range(0, len(things), size))
