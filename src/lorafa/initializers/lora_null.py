"""LoRA-Null: A reads only what the data to be kept hardly use (Tang et al. 2025, arXiv:2503.02659).

The method's second version trains B alone: ``LoraConfig(freeze_A=True)``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorafa.initializers.base import InitResult, Stages, check_rank, initializer
from lorafa.initializers.stages import leading, require_moment, taken_from_base
from lorafa.numerics.linalg import float_matrix, spd_eigh
from lorafa.spec import LayerSpec


@initializer(
    needs=("exact_moment",),
    reads_weight=True,
    moves_base=True,
    stages=Stages(
        objective="product", target="W Q Q^T, Q the directions the inputs use least", metric="identity",
        selection="leading r",
        split="sqrt, sqrt", scale="1/s", base="without s B A",
    ),
)  # fmt: skip
def lora_null(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """s B A = W Q Q^T, shared evenly, with Q (in, r) the eigenvectors of C = X^T X / T of the r smallest eigenvalues.

    C is summed and decomposed in float64: in float32 one large direction of the inputs hides the smallest eigenvalues.
    X is as it came. The authors' code divides each batch by its largest entry first, so that batches weigh unequally
    and the directions are those of another C.

    Raises:
        ConfigError: r > min(out, in).
        DegenerateError: the inputs are zero, not finite or fewer than r, or the weight is zero along some of Q.
    """
    check_rank(spec, weight)
    W = float_matrix(weight)
    C = require_moment(stats, "exact_moment", spec).to(W.device)
    _, vectors = spd_eigh(C)
    Q = vectors[:, : spec.rank].to(W)
    triplets = leading(W @ Q, spec, "its weight along the directions its input leaves free", exact=True)
    return taken_from_base(triplets._replace(Vh=triplets.Vh @ Q.mT), spec.scaling)
