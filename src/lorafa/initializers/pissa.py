"""PiSSA: A and B are the r largest singular triplets of W (Meng et al. 2024, arXiv:2404.02948, equations 2-4)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorafa.initializers.base import InitResult, LayerSpec, check_rank, initializer
from lorafa.linalg import truncated_svd


@initializer(reads_weight=True)
def pissa(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r^T, so that W - s B A is W without its r leading triplets."""
    check_rank(spec, weight)
    U, S, Vh = truncated_svd(weight, spec.rank)
    root = (S / spec.scaling).sqrt()
    return InitResult(root[..., :, None] * Vh, U * root[..., None, :], subtract_from_base=True)
