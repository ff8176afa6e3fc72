"""What a model scores: exact-match accuracy on GSM8K-style problems, and the loss of its answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafa.registry import Registry

if TYPE_CHECKING:
    from lorafa.evals.entry import Evaluation

EVALS: Registry[Evaluation] = Registry(
    "evaluation",
    {
        "forgetting": "lorafa.evals.forgetting:FORGETTING",
        "gsm8k": "lorafa.evals.gsm8k:GSM8K",
        "humaneval": "lorafa.evals.humaneval:HUMANEVAL",
        "loss": "lorafa.evals.loss:LOSS",
        "perplexity": "lorafa.evals.perplexity:PERPLEXITY",
    },
)
