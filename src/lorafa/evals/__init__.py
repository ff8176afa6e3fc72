"""What a model scores: exact-match accuracy on GSM8K-style problems, and the loss of its answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafa.registry import Registry

if TYPE_CHECKING:
    from lorafa.evals.entry import Evaluation

EVALS: Registry[Evaluation] = Registry(
    "evaluation",
    {
        "accuracy": "lorafa.evals.accuracy:ACCURACY",
        "gsm8k": "lorafa.evals.gsm8k:GSM8K",
        "loss": "lorafa.evals.loss:LOSS",
        "match": "lorafa.evals.match:MATCH",
        "perplexity": "lorafa.evals.perplexity:PERPLEXITY",
    },
)
