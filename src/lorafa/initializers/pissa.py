"""PiSSA: A and B are the r largest singular triplets of W (Meng et al. 2024, arXiv:2404.02948, equations 2-4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorafa.errors import ConfigError
from lorafa.initializers.base import InitResult, LayerSpec, check_rank, initializer
from lorafa.linalg import truncated_svd


@initializer(reads_weight=True)
def pissa(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r^T, so that W - s B A is W without its r leading triplets.

    Raises:
        ConfigError: the weight has fewer than r singular values, or fewer that differ from zero by more than rounding.
    """
    check_rank(spec, weight)
    U, S, Vh = truncated_svd(weight, spec.rank)
    rounding = S[..., :1] * torch.finfo(S.dtype).eps * max(weight.shape[-2:])  # as torch.linalg.matrix_rank has it
    found = int(S.gt(rounding).sum(-1).min())
    if found < spec.rank:
        raise ConfigError(
            f"{spec.name}: init_lora_weights='pissa' needs {spec.rank} non-zero singular values, and its weight has "
            f"{found}; what starts from zero ones has no gradient and would never train. Lower the rank "
            "(rank_pattern), leave the layer out with exclude_modules, or choose another start."
        )
    root = (S / spec.scaling).sqrt()
    return InitResult(root[..., :, None] * Vh, U * root[..., None, :], subtract_from_base=True)
