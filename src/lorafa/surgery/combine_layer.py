"""The combination of adapters on one layer: the shares of the adapters in, the factors of the result out.

Nothing here knows where the shares come from, a model or a file. Delta_i is the update of adapter i, s_i B_i A_i where
it is a product, and w_i its weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorafa.adapter import full_precision
from lorafa.errors import AdapterError, BackendError, ConfigError
from lorafa.numerics.linalg import all_finite, full_svd, working_dtype
from lorafa.numerics.low_rank import nearest_product, product_energy
from lorafa.numerics.task_arithmetic import task_arithmetic
from lorafa.spec import LayerSpec
from lorafa.surgery.combination import LayerError
from lorafa.surgery.combining import COMBINATIONS, Combining


@dataclass(frozen=True)
class Share:
    """What one adapter changes on one layer, and how much of it is wanted."""

    adapter: str
    weight: float
    scaling: float
    """s, as it is in force."""
    A: Tensor
    """(r, in), or (E, r, in) for experts: that of the whole update, a start that does not count taken off."""
    B: Tensor
    """(out, r), or (E, out, r); (out, r / groups) on a grouped convolution."""
    bias: Tensor | None = None
    """(out,), that of B, not scaled."""
    dense: Tensor | None = None
    """The update, (out, in), where it is not s B A (DoRA)."""

    @property
    def rank(self) -> int:
        return self.A.shape[-2]


@dataclass(frozen=True)
class Combined:
    """The combination on one layer: an update ``scaling`` B A of plain LoRA."""

    A: Tensor
    B: Tensor
    bias: Tensor | None
    scaling: float
    error: LayerError

    @property
    def alpha(self) -> float:
        """The alpha that makes alpha / r the scaling, to the bit where a float does, as it does for all but rsLoRA."""
        rank = self.A.shape[-2]
        near = self.scaling * rank
        for alpha in (near, math.nextafter(near, 0), math.nextafter(near, math.inf)):
            if alpha / rank == self.scaling:
                return int(alpha) if alpha.is_integer() else alpha
        return near

    def at_scaling(self, scaling: float) -> Combined:
        """The same update with another scaling, which is not 0; what the two differ by is in B."""
        if scaling == self.scaling:
            return self
        ratio = self.scaling / scaling
        bias = None if self.bias is None else self.bias * ratio
        return replace(self, B=self.B * ratio, bias=bias, scaling=scaling)


def is_copied(asked: Combining, shares: Sequence[Share], of: int) -> bool:
    """Whether the only adapter of a combination of ``of`` comes out as it is, with its own scaling; not with one of 0,
    of which no alpha could be made."""
    return of == 1 and asked.keeps_one and shares[0].weight == 1 and shares[0].dense is None and shares[0].scaling != 0


@torch.no_grad()
def combine_layer(
    asked: Combining, name: str, shares: Sequence[Share], *, of: int, groups: int = 1, key: str = ""
) -> Combined:
    """The combination of the adapters that are on one layer, in the widest dtype that their factors have.

    Args:
        name: the layer's, for errors and for what is drawn at random.
        shares: of the adapters that are on this layer.
        of: how many adapters are combined in the whole model.
        groups: of a convolution.
        key: the new adapter's name, for what is drawn at random.

    Raises:
        AdapterError: the values of an adapter are missing or not finite.
        ConfigError: ranks differ and the type needs equal ones, or ``svd_rank`` does not go with the layer.
        BackendError: the type needs factors, and an update has none (DoRA).
    """
    _require_values(name, shares)
    dtype = shares[0].A.dtype
    for share in shares[1:]:
        dtype = torch.promote_types(dtype, share.A.dtype)
    dtype = torch.promote_types(dtype, shares[0].B.dtype)
    bias = _bias(shares)
    if is_copied(asked, shares, of):
        only = shares[0]
        error = LayerError(only.rank, only.scaling**2 * product_energy(*_grouped(only, groups)), 0.0)
        own = None if only.bias is None else only.bias.clone()
        return Combined(only.A.clone(), only.B.clone(), own, only.scaling, error)
    rule, spec = asked.rule, LayerSpec(name, "", 0, 1.0, _seed(asked), key=key)
    if rule.of_factors or not rule.cuts:
        _require_factors(asked, name, shares)
    with full_precision(shares[0].A):
        if rule.of_factors:
            A, B, error = _by_factors(asked, name, shares, groups, spec)
        elif rule.cuts:
            A, B, error = _by_svd(asked, name, shares, groups, spec)
        else:
            A, B = _stacked(shares, groups)
            error = LayerError(_rank(A, groups), product_energy(A, B), 0.0)
            A, B = _ungrouped(A, B, groups)
    made = Combined(A.to(dtype), B.to(dtype), None if bias is None else bias.to(dtype), 1.0, error)
    _require_finite(name, dtype, made.A, made.B, *(() if made.bias is None else (made.bias,)))
    return made


def _seed(asked: Combining) -> int:
    return torch.initial_seed() if asked.seed is None else asked.seed


def _require_values(name: str, shares: Sequence[Share]) -> None:
    held = {
        share.adapter: [t for t in (share.A, share.B, share.bias, share.dense) if t is not None] for share in shares
    }
    for adapter, tensors in held.items():
        if any(tensor.is_meta for tensor in tensors):
            raise AdapterError(
                f"{name}: adapter {adapter!r} has no values (device 'meta'). Load it before it is combined. Nothing "
                "was changed."
            )
    sums = torch.stack([tensor.sum(dtype=torch.float32) for tensors in held.values() for tensor in tensors])
    if bool(sums.isfinite().all()) and all(math.isfinite(share.scaling) for share in shares):
        return  # a sum is not finite where a value is not
    for share in shares:
        finite = all(bool(tensor.isfinite().all()) for tensor in held[share.adapter])
        if not finite or not math.isfinite(share.scaling):
            raise AdapterError(
                f"{name}: adapter {share.adapter!r} holds values that are not finite (NaN or infinity). The training "
                "it comes from diverged: take an earlier checkpoint. Nothing was changed."
            )


def _require_finite(name: str, dtype: torch.dtype, *made: Tensor) -> None:
    """Raises AdapterError where finite values have been made more than a number format holds."""
    if not all(all_finite(tensor) for tensor in made):
        raise AdapterError(
            f"{name}: with these weights the combination has values that {str(dtype).removeprefix('torch.')} cannot "
            "hold. Give smaller weights, or adapters of a wider dtype. Nothing was changed."
        )


def _require_factors(asked: Combining, name: str, shares: Sequence[Share]) -> None:
    dense = next((share for share in shares if share.dense is not None), None)
    if dense is not None:
        svd = [kind for kind, rule in COMBINATIONS.items() if rule.cuts]
        raise BackendError(
            f"{name}: the update of adapter {dense.adapter!r} is no product of two factors (DoRA rescales the rows of "
            f"the weight), and {asked.combination_type!r} combines factors. Take one of {', '.join(svd)}, which "
            "approximate the matrix at svd_rank and say what is lost. Nothing was changed."
        )


def _bias(shares: Sequence[Share]) -> Tensor | None:
    """sum w_i s_i b_i, (out,); None where no adapter has a bias."""
    parts = [s.weight * s.scaling * s.bias.to(working_dtype(s.bias.dtype)) for s in shares if s.bias is not None]
    return torch.stack(parts).sum(0) if parts else None


# ---- a grouped convolution is a stack of products, one a group


def _grouped(share: Share, groups: int) -> tuple[Tensor, Tensor]:
    """A and B in float32 or float64; of a grouped convolution (groups, r / groups, in), (groups, out / groups, ...)."""
    dtype = working_dtype(torch.promote_types(share.A.dtype, share.B.dtype))
    A, B = share.A.to(dtype), share.B.to(dtype)
    if groups == 1:
        return A, B
    return A.reshape(groups, -1, A.shape[-1]), B.reshape(groups, -1, B.shape[-1])


def _ungrouped(A: Tensor, B: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    return (A, B) if groups == 1 else (A.flatten(0, 1), B.flatten(0, 1))


def _rank(A: Tensor, groups: int) -> int:
    """The rank of the adapter that has these grouped factors."""
    return A.shape[-2] * groups


def _stacked(shares: Sequence[Share], groups: int) -> tuple[Tensor, Tensor]:
    """Factors of sum w_i Delta_i: the A one under the other, times w_i s_i, and the B side by side."""
    pairs = [_grouped(share, groups) for share in shares]
    A = torch.cat([share.weight * share.scaling * A for share, (A, _) in zip(shares, pairs, strict=True)], dim=-2)
    return A, torch.cat([B for _, B in pairs], dim=-1)


# ---- the three ways


def _by_factors(
    asked: Combining, name: str, shares: Sequence[Share], groups: int, spec: LayerSpec
) -> tuple[Tensor, Tensor, LayerError]:
    """All A made one tensor and all B, with the root of |w_i s_i| on each and the sign on A, as PEFT does."""
    ranks = {share.adapter: share.rank for share in shares}
    if len(set(ranks.values())) > 1:
        found = ", ".join(f"{adapter!r} {rank}" for adapter, rank in ranks.items())
        raise ConfigError(
            f"{name}: combination_type={asked.combination_type!r} merges A with A and B with B, so it needs equal "
            f"ranks, found {found}. Take 'cat', or a type that ends in 'svd'. Nothing was changed."
        )
    family = asked.rule.family
    assert family is not None
    dtype = working_dtype(torch.promote_types(shares[0].A.dtype, shares[0].B.dtype))
    factors = [share.weight * share.scaling for share in shares]
    root = torch.tensor([math.sqrt(abs(factor)) for factor in factors], dtype=torch.float64)
    sign = torch.tensor([math.copysign(1, factor) for factor in factors], dtype=torch.float64)
    A = family([share.A.to(dtype) for share in shares], root * sign, asked, spec.generator("A"))
    B = family([share.B.to(dtype) for share in shares], root, asked, spec.generator("B"))
    product = _grouped(Share("", 1.0, 1.0, A, B), groups)
    if asked.rule.prunes:
        return A, B, LayerError(A.shape[-2], product_energy(*product), None)
    wanted = _stacked(shares, groups)
    return A, B, LayerError(A.shape[-2], product_energy(*wanted), _apart(wanted, product))


def _apart(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """||B A - B' A'||_F^2 without forming either."""
    return product_energy(torch.cat([one[0], other[0]], dim=-2), torch.cat([one[1], -other[1]], dim=-1))


def _by_svd(
    asked: Combining, name: str, shares: Sequence[Share], groups: int, spec: LayerSpec
) -> tuple[Tensor, Tensor, LayerError]:
    """The nearest product of a rank to what the family makes of the updates: B = U S, A = V^T."""
    A, B = _grouped(shares[0], groups)
    sides = B.shape[-2], A.shape[-1]
    rank = _wanted_rank(asked, name, shares, groups, sides)
    if asked.svd_driver is not None and A.device.type != "cuda":
        raise ConfigError(
            f"svd_driver={asked.svd_driver!r} is a method of cuSOLVER, and the adapters are on {A.device.type!r}. Drop "
            "svd_driver."
        )
    family, matrix = asked.rule.family, None
    if family is None and all(share.dense is None for share in shares):
        A, B = _stacked(shares, groups)
        _require_finite(name, A.dtype, A, B)
        A_cut, B_cut, S = nearest_product(A, B, rank, asked.svd_driver)
    else:
        weights = torch.tensor([share.weight for share in shares], dtype=torch.float64)
        updates = [_dense(share, groups) for share in shares]
        if family is None:
            matrix = task_arithmetic(updates, weights)
        else:
            matrix = family(updates, weights, asked, spec.generator())
        _require_finite(name, matrix.dtype, matrix)
        svd = full_svd(matrix, asked.svd_driver)
        A_cut, B_cut, S = svd.Vh[..., :rank, :], (svd.U * svd.S[..., None, :])[..., :rank], svd.S
    A_cut, B_cut = _filled_up(A_cut, B_cut, rank, spec)
    squares = S.double().square()
    lost = float(squares[..., rank:].sum())
    if asked.svd_clamp is not None:
        limit = _quantile(torch.cat([A_cut.flatten(), B_cut.flatten()]), asked.svd_clamp)
        A_cut, B_cut = A_cut.clamp(-limit, limit), B_cut.clamp(-limit, limit)
        if matrix is None:
            lost = _apart((A, B), (A_cut, B_cut))
        else:
            lost = float((matrix - B_cut @ A_cut).double().square().sum())
    error = LayerError(rank * groups, float(squares.sum()), lost)
    return (*_ungrouped(A_cut, B_cut, groups), error)


def _dense(share: Share, groups: int) -> Tensor:
    if share.dense is not None:
        return share.dense
    A, B = _grouped(share, groups)
    return share.scaling * (B @ A)


def _wanted_rank(asked: Combining, name: str, shares: Sequence[Share], groups: int, sides: tuple[int, int]) -> int:
    """The rank of each product, which is that of the adapter over the groups.

    Raises:
        ConfigError: ``svd_rank`` is more than the matrix has, or no multiple of the groups.
    """
    most = min(sides)
    if asked.svd_rank is None:
        return min(max(share.rank for share in shares) // groups, most)
    if asked.svd_rank % groups:
        raise ConfigError(
            f"{name}: svd_rank={asked.svd_rank} is not divisible by the convolution's groups={groups}. Choose another "
            "rank. Nothing was changed."
        )
    rank = asked.svd_rank // groups
    if rank > most:
        raise ConfigError(
            f"{name}: svd_rank={asked.svd_rank} is more than its matrix of {sides[0]} x {sides[1]} can have, which is "
            f"{most * groups}. Choose a smaller rank. Nothing was changed."
        )
    return rank


def _filled_up(A: Tensor, B: Tensor, rank: int, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """A (..., rank, in) and B (..., out, rank), filled up where there are fewer.

    The new rows of A are orthonormal to the others and those of B are zeros: they change nothing and can be trained.
    """
    have, inputs = A.shape[-2:]
    if rank <= have:
        return A, B
    drawn = torch.randn(*A.shape[:-2], inputs, rank - have, generator=spec.generator("rows"), dtype=torch.float64)
    rows = torch.linalg.qr(torch.cat([A.mT, drawn.to(A)], dim=-1)).Q[..., have:].mT
    return torch.cat([A, rows], dim=-2), torch.nn.functional.pad(B, (0, rank - have))


def _quantile(values: Tensor, share: float) -> float:
    """The quantile of the values and their negatives together, for a share of 1/2 or more; however many they are.

    Of the 2 n of them in order the upper n are the sizes, so the place share (2 n - 1) is one among these.
    """
    sizes = values.abs()
    place = share * (2 * sizes.numel() - 1) - sizes.numel()
    if place < 0:  # between the smallest size and its negative
        return float(sizes.min()) * (1 + 2 * place)
    low, high = (float(sizes.kthvalue(1 + math.floor(p)).values) for p in (place, min(place + 1, sizes.numel() - 1)))
    return low + (place - math.floor(place)) * (high - low)
