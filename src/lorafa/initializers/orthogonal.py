"""``init_lora_weights="orthogonal"``: both factors non-zero, yet B A = 0 exactly.

Take the odd and the even rows of a random orthogonal (r, r) matrix: Q_o and Q_e. A = Q_o^T Z^T / 10 and
B = Z' Q_e / 10 with Gaussian Z, Z'; then B A contains Q_e Q_o^T = 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorafa.errors import ConfigError
from lorafa.initializers.base import InitResult, Stages, initializer
from lorafa.spec import LayerSpec


def check_even(rank: int, found: str) -> None:
    """Raises ConfigError for an odd rank: the rows of Q are split in two halves."""
    if rank % 2:
        raise ConfigError(
            "init_lora_weights='orthogonal' shares the rows of one orthogonal matrix between A and B and needs an even "
            f"rank, found {found}. Use {rank + 1} or another start."
        )


@initializer(
    check_rank=check_even,
    peft_makes_on=frozenset({"linear", "embedding"}),
    stages=Stages(
        objective="zero product", target="rows of a random orthogonal matrix", metric="-",
        selection="odd rows for A, even rows for B",
        split="A, B non-zero, B A = 0", scale="1/100", base="kept",
    ),
)  # fmt: skip
def orthogonal(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """Raises ConfigError for an odd rank, and for a grouped convolution, whose B would be cut apart."""
    check_even(spec.rank, f"r={spec.rank} of {spec.name}")
    if spec.groups > 1:
        raise ConfigError(
            f"{spec.name}: init_lora_weights='orthogonal' does not start at zero on a convolution with "
            f"groups={spec.groups}, whose B is cut to the ranks of its group. Choose another start, or exclude the "
            "layer."
        )
    A_shape, B_shape = spec.stored_shapes(weight)
    generator, half = spec.generator(), spec.rank // 2
    experts = A_shape[:-2]
    square = torch.empty(*experts, spec.rank, spec.rank, dtype=torch.float64).normal_(generator=generator)
    Q = torch.linalg.qr(square).Q
    Z_A = torch.empty(*experts, half, A_shape[-1], dtype=torch.float64).normal_(generator=generator)
    Z_B = torch.empty(*experts, B_shape[-2], half, dtype=torch.float64).normal_(generator=generator)
    A = Q[..., 0::2, :].transpose(-2, -1) @ Z_A / 10
    B = Z_B @ Q[..., 1::2, :] / 10
    return InitResult(A, B)
