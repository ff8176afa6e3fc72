"""CorDA: A and B are singular triplets of the weight seen through the data (Yang et al. 2024, arXiv:2406.05223)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorafa.initializers.base import DegenerateError, InitResult, Stages, check_rank, initializer
from lorafa.initializers.stages import leading, require_moment, taken_from_base, trailing
from lorafa.numerics.linalg import damped_until_invertible, float_matrix
from lorafa.settings.methods import CordaConfig
from lorafa.spec import LayerSpec

DAMPING = 0.01
"""Added to C at first, in units of its mean eigenvalue; doubled until the inverse is good to ``ERROR``."""
ERROR = 0.05
STEPS = 3
"""Steps of the block Krylov method; few are enough, since W C decays much faster than W."""


@initializer(
    needs=("corda_moment",),
    reads_weight=True,
    settings="corda_config",
    moves_base=True,
    stages=Stages(
        objective="product", target="W", metric="C on the right", selection="leading r, or trailing r (kpm)",
        split="sqrt, sqrt", scale="1/s", base="without s B A",
    ),
)  # fmt: skip
def corda(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """B = U sqrt(S / s), A = sqrt(S / s) V^T C^-1 with triplets of W C, for C the damped second moment of the inputs.

    "ipm" takes the r largest: ||(W - s B A) C|| is the least a matrix of rank r can leave. "kpm" takes the r smallest,
    those the data need least.

    Raises:
        ConfigError: r > min(out, in).
        DegenerateError: the inputs are zero, not finite or fewer than r, or some of the r triplets are zero.
    """
    settings: CordaConfig = spec.settings or CordaConfig()
    check_rank(spec, weight)
    C = require_moment(stats, "corda_moment", spec)
    W = float_matrix(weight)
    try:
        return _start(W, C.to(W), spec, settings)
    except DegenerateError:  # one input a thousand times larger than the others hides them from float32
        return _start(W.double(), C.double(), spec, settings)


def _start(W: Tensor, C: Tensor, spec: LayerSpec, settings: CordaConfig) -> InitResult:
    C, L = damped_until_invertible(C, DAMPING, ERROR)
    if settings.corda_method == "ipm":
        triplets = leading(W, spec, "its weight", steps=STEPS, times=C)
    else:
        triplets = trailing(W @ C, spec, "its weight")
    whitened = torch.cholesky_solve(triplets.Vh.mT, L).mT  # V^T C^-1
    return taken_from_base(triplets._replace(Vh=whitened), spec.scaling)
