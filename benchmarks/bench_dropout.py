"""What does dropout on a layer's input cost beside the layer's product, drawn by torch and made from tables?

    python benchmarks/bench_dropout.py

1600 rows of 576 bfloat16 features, as in SmolLM2-135M; one thread. The rates are compared first.
"""

from __future__ import annotations

import torch
from harness import emit, median, timed

from lorafa.numerics.masks import dropped_into, keep_mask
from lorafa.train.memory import keep_freed_memory

NAME = "dropout"
ROWS, COLUMNS, P = 1600, 576, 0.05


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    x = torch.randn(ROWS, COLUMNS, dtype=torch.bfloat16)
    weight = torch.randn(COLUMNS, COLUMNS, dtype=torch.bfloat16)
    cases = {
        "product x W^T": lambda: x @ weight.T,
        "torch dropout": lambda: torch.nn.functional.dropout(x, P),
        "bernoulli_ of torch": lambda: torch.empty(ROWS, COLUMNS, dtype=torch.bool).bernoulli_(1 - P),
        "keep_mask and dropped_into": lambda: dropped_into(keep_mask(*x.shape, P, 1, x.device), x),
    }
    for name in ("torch dropout", "keep_mask and dropped_into"):
        rate = (cases[name]() == 0).double().mean().item()
        assert abs(rate - P) < 2e-3, f"{name} drops {rate}"
    for name, run in cases.items():
        run()
        emit(benchmark=NAME, case=name, milliseconds=round(1e3 * median([timed(run) for _ in range(30)]), 3))


if __name__ == "__main__":
    main()
