"""What a model scores: benchmarks, the loss of its answers, how far it has moved from its base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafa.registry import Registry

if TYPE_CHECKING:
    from lorafa.evals.entry import Evaluation

EVALS: Registry[Evaluation] = Registry(
    "evaluation",
    {
        "accuracy": "lorafa.evals.accuracy:ACCURACY",
        "commonsense": "lorafa.evals.commonsense:COMMONSENSE",
        "forgetting": "lorafa.evals.forgetting:FORGETTING",
        "glue": "lorafa.evals.glue:GLUE",
        "gsm8k": "lorafa.evals.gsm8k:GSM8K",
        "humaneval": "lorafa.evals.humaneval:HUMANEVAL",
        "loss": "lorafa.evals.loss:LOSS",
        "match": "lorafa.evals.match:MATCH",
        "mmlu": "lorafa.evals.mmlu:MMLU",
        "perplexity": "lorafa.evals.perplexity:PERPLEXITY",
    },
)
