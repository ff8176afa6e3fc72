"""What starts are made of: triplets of a matrix are picked, split over A and B, and scaled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorafa.errors import CalibrationError, ConfigError
from lorafa.initializers.base import DegenerateError, InitResult, check_rank
from lorafa.numerics.linalg import SVD, full_svd, leading_svd, truncated_svd
from lorafa.settings.checks import check_number
from lorafa.spec import LayerSpec


def random_start(weight: Tensor, spec: LayerSpec, draw: Callable[[Tensor, torch.Generator], Tensor]) -> InitResult:
    """A as ``draw`` fills an empty tensor, B = 0.

    For an embedding A = 0 and B ~ N(0, 1): a row of A is met only when its token is, B always. A frozen A is drawn
    there too.
    """
    A_shape, B_shape = spec.stored_shapes(weight)
    if spec.is_table and not spec.freeze_A:
        return InitResult(torch.zeros(A_shape), torch.empty(B_shape).normal_(generator=spec.generator()))
    return InitResult(draw(torch.empty(A_shape), spec.generator()), torch.zeros(B_shape))


def halves(triplets: SVD, scale: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """A = sqrt(c S) V^T and B = U sqrt(c S) for triplets of a matrix and a scale c, so that B A is c U S V^T."""
    root = (triplets.S * scale).sqrt()
    return root[..., :, None] * triplets.Vh, triplets.U * root[..., None, :]


def taken_from_base(triplets: SVD, scaling: float) -> InitResult:
    """s B A is the product of the triplets, and the base is left without it: PiSSA and its relatives."""
    A, B = halves(triplets, 1 / scaling)
    return InitResult(A, B, subtract_from_base=True)


def check_gamma(gamma: object) -> None:
    """Raises ConfigError for a ``stable_gamma`` that is neither a number above 0 nor "auto"."""
    if gamma != "auto":
        check_number("stable_gamma", gamma, "a number > 0, or 'auto'", 0)


def known_gamma(gamma: float | str, usual: str) -> float:
    """``stable_gamma`` as a number.

    Args:
        usual: a number to set, and whose it is, for the error: "128 is LoRA-One's".

    Raises:
        ConfigError: it is still "auto".
    """
    if gamma == "auto":
        raise ConfigError(
            "stable_gamma='auto' is found by the loss on held-out rows. Call lorafa.initialize(model, config, data, "
            f"heldout=rows), or set a number: {usual}."
        )
    return float(gamma)


def clipped(result: InitResult, weight: Tensor, spec: LayerSpec) -> InitResult:
    """The start with both factors shrunk alike where the largest entry of s B A is larger than that of the weight.

    What is taken out of the base is then no larger than the base (``norm_clip`` of LoRA-GA's scripts).
    """
    largest = (spec.scaling * (result.B @ result.A)).abs().amax((-2, -1), keepdim=True)
    ratio = weight.to(largest).abs().amax((-2, -1), keepdim=True) / largest.clamp(min=torch.finfo(largest.dtype).tiny)
    root = ratio.clamp(max=1.0).sqrt()
    return replace(result, A=result.A * root, B=result.B * root)


def leading(
    matrix: Tensor,
    spec: LayerSpec,
    what: str,
    *,
    exact: bool = False,
    steps: int | None = None,
    times: Tensor | None = None,
) -> SVD:
    """The r leading triplets of a matrix (..., out, in).

    Args:
        what: the matrix, for errors: "its weight".
        exact: decompose the whole matrix.
        steps: of the block Krylov method that is used otherwise; None takes its default.
        times: (..., in, in), finite: the triplets are those of the product with it.

    Raises:
        ConfigError: r > min(out, in).
        DegenerateError: fewer than r singular values differ from zero.
    """
    check_rank(spec, matrix)
    require_finite(matrix, what)
    if exact:
        found = truncated_svd(matrix if times is None else matrix @ times, spec.rank)
    else:
        own = {} if steps is None else {"steps": steps}
        found = leading_svd(matrix, spec.rank, spec.generator(), times=times, **own)
    require_directions(found.S, found.S[..., 0], max(matrix.shape[-2:]), what)
    return found


def mean_root_of_weight(weight: Tensor, spec: LayerSpec) -> float:
    """The mean of sqrt(sigma_i(W) / s) over the r leading singular values."""
    return float((leading_svd(weight, spec.rank, spec.generator()).S / spec.scaling).sqrt().mean())


def trailing(matrix: Tensor, spec: LayerSpec, what: str) -> SVD:
    """The r triplets of a matrix (..., out, in) with the smallest singular values, exact; raises as :func:`leading`."""
    check_rank(spec, matrix)
    require_finite(matrix, what)
    everything = full_svd(matrix)
    found = everything.at(slice(-spec.rank, None))
    require_directions(found.S, everything.S[..., 0], max(matrix.shape[-2:]), what)
    return found


def require_triplets(found: SVD, count: int, weight: Tensor, spec: LayerSpec, what: str) -> SVD:
    """The ``count`` leading triplets of a statistic of a layer with this weight (out, in).

    Raises:
        ConfigError: r > min(out, in) of the matrix.
        CalibrationError: the statistic was made for fewer.
        DegenerateError: they are not finite, or fewer differ from zero.
    """
    check_rank(spec, weight)
    if len(found.S) < count:
        raise CalibrationError(
            f"{spec.name}: the statistics hold {len(found.S)} directions of {what.removeprefix('its ')}, and r = "
            f"{spec.rank} takes {count} here. Collect them with a config of this rank or a larger one."
        )
    require_finite(found.S, what)
    top = found.at(slice(0, count))
    require_directions(top.S, top.S[..., 0], max(weight.shape), what)
    return top


def whole_gradient(stats: Mapping[str, Tensor], spec: LayerSpec, why: str) -> Tensor:
    """The gradient (out, in) itself.

    Args:
        why: a start needs it, for the error.

    Raises:
        DegenerateError: it is not finite.
        CalibrationError: the statistics hold a sketch of it, collected for another start.
    """
    require_finite(stats["gradient.S"], "its gradient")
    if "gradient.dense" not in stats:
        raise CalibrationError(
            f"{spec.name}: {why} of the gradient, and the statistics hold a sketch, which does not have them. Collect "
            "them with dense=True, or with the config of this start."
        )
    return stats["gradient.dense"]


def require_moment(stats: Mapping[str, Tensor], name: str, spec: LayerSpec) -> Tensor:
    """C (in, in) of the statistic ``name``, a second moment of the inputs.

    Raises:
        DegenerateError: it is zero, not finite, or of fewer than r tokens.
    """
    C = stats[f"{name}.C"]
    require_finite(C.sum(), "the second moment of its input")  # which keeps inf and nan
    if not bool(C.diagonal().any()):
        raise DegenerateError("its input is zero")
    tokens = stats.get(f"{name}.tokens")
    if tokens is not None and tokens < spec.rank:
        raise DegenerateError(f"its statistics are of {int(tokens)} tokens, fewer than r = {spec.rank}")
    return C


def require_finite(matrix: Tensor, what: str) -> None:
    """Raises DegenerateError for inf and nan, which no decomposition survives."""
    if not bool(torch.isfinite(matrix).all()):
        raise DegenerateError(f"{what} is not finite")


def require_directions(values: Tensor, largest: Tensor, size: int, what: str) -> None:
    """Every singular value in ``values`` (..., r) differs from zero by more than rounding; as :func:`numerical_rank`.

    Raises:
        DegenerateError: some value is zero; a factor made of it would have no gradient and never train.
    """
    found, rank = numerical_rank(values, largest, size), values.shape[-1]
    if found < rank:
        raise DegenerateError(f"{what} has {found} singular values other than zero where {rank} are needed")


def numerical_rank(values: Tensor, largest: Tensor, size: int) -> int:
    """How many of ``values`` (..., r) differ from zero by more than rounding, in the matrix that has the fewest.

    Args:
        values: those a start is made of.
        largest: (...,) the largest of the matrix.
        size: the matrix's larger side: rounding is as torch.linalg.matrix_rank has it.
    """
    rounding = largest[..., None] * torch.finfo(values.dtype).eps * size
    return int(values.gt(rounding).sum(-1).min())
