"""The optimizers that transformers makes: AdamW, Adafactor, plain SGD."""

from __future__ import annotations

from typing import Any

from lorafa.optimizers.entry import AdamSettings, OptimizerEntry
from lorafa.optimizers.state_bytes import nothing, rows_and_columns, two_moments


def _adamw(settings: AdamSettings) -> dict[str, Any]:
    beta1, beta2 = settings.betas
    return {"optim": "adamw_torch", "adam_beta1": beta1, "adam_beta2": beta2, "adam_epsilon": settings.eps}


ADAMW = OptimizerEntry(lr=2e-3, state=two_moments, settings=AdamSettings, arguments=_adamw)
ADAFACTOR = OptimizerEntry(lr=1e-3, state=rows_and_columns, arguments=lambda _: {"optim": "adafactor"})
SGD = OptimizerEntry(lr=1e-1, state=nothing, adam_like=False, arguments=lambda _: {"optim": "sgd"})
