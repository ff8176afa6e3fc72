"""OLoRA: A and B are the first r steps of W = Q R (Büyükakyüz 2024, arXiv:2406.01775, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lorafa.initializers.base import DegenerateError, InitResult, Stages, check_rank, initializer
from lorafa.initializers.stages import numerical_rank, require_finite
from lorafa.numerics.linalg import leading_qr
from lorafa.settings.checks import check_flag
from lorafa.spec import LayerSpec


@dataclass(frozen=True)
class OloraConfig:
    """Which columns of the weight span B."""

    pivoted: bool = False
    """Take the r columns that stick out farthest, one after the other, in place of the first r."""

    def __post_init__(self) -> None:
        check_flag("pivoted", self.pivoted)


@initializer(
    reads_weight=True,
    settings=OloraConfig,
    moves_base=True,
    stages=Stages(
        objective="product", target="W", metric="identity", selection="first r columns of a QR decomposition",
        split="A = R, B = Q", scale="1", base="without s B A",
    ),
)  # fmt: skip
def olora(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """B = Q_r (orthonormal columns), A = R_r, and W - s B A stays in the base.

    Neither factor is divided by s: the start is Q_r R_r whatever alpha is, as in the paper and in PEFT.

    Raises:
        ConfigError: r > min(out, in).
        DegenerateError: the r columns are linearly dependent, so that rounding would choose directions.
    """
    check_rank(spec, weight)
    require_finite(weight, "its weight")
    pivoted = spec.settings is not None and spec.settings.pivoted
    Q, R, lengths = leading_qr(weight, spec.rank, pivoted=pivoted)
    if numerical_rank(lengths, lengths.amax(-1), weight.shape[-2]) < spec.rank:
        which = f"no {spec.rank} columns of its weight are independent" if pivoted else (
            f"the first {spec.rank} columns of its weight are linearly dependent (init_config={{'pivoted': True}} "
            "chooses others)"
        )  # fmt: skip
        raise DegenerateError(which)
    return InitResult(R, Q, subtract_from_base=True)
