"""Intruder dimensions: directions of a tuned weight that its base does not have, found and taken back.

Shuttleworth et al. 2024 (arXiv:2410.21228): LoRA gives W' = W + s B A leading singular vectors that are far from all
of W's; they go with what the model forgets. A left vector u'_j of W' among the ``top_k`` is an intruder where
max_i |<u'_j, u_i>| < epsilon over all left vectors u_i of W. The repair is
W'' = W' + (lambda - 1) sum_j sigma'_j u'_j v'_j^T over the intruders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorafa.adapter import Adapter
from lorafa.errors import AdapterError, BackendError
from lorafa.layers.base import LoraLayer
from lorafa.layers.slots import used_factors
from lorafa.numerics.linalg import SVD, float_matrix
from lorafa.numerics.low_rank import energy, leading_of_sum, left_vectors, padded, product_svd, to_rank
from lorafa.settings.checks import check_flag, check_int, check_number
from lorafa.storage.tensors import is_part
from lorafa.surgery.activate import require_adapters, require_nothing_merged, require_uniform, without_start
from lorafa.surgery.adapted import AdaptedModel
from lorafa.surgery.plain_copy import NewFactors, put_on
from lorafa.surgery.plan import check_adapter_name
from lorafa.surgery.walk import lora_layers, places

TOP_K, EPSILON = 10, 0.5
"""How many leading vectors of W' are looked at by default, and the cosine below which one is an intruder."""


@dataclass(frozen=True)
class Intruder:
    """One direction of a tuned weight that its base does not have."""

    place: int
    """Which singular value of W' it belongs to, from 0."""
    singular_value: float
    cosine: float
    """max_i |<u'_j, u_i>| over the left singular vectors of W."""
    expert: int | None = None
    """Which matrix of a stack it is of."""


@dataclass(frozen=True)
class Repaired:
    """What was done to the adapter of one layer."""

    intruders: tuple[Intruder, ...]
    rank: int
    """The rank of the new factors."""
    discarded: float
    """||.||_F^2 of the part of the repaired update that the new factors do not hold; 0 where nothing was cut off."""
    energy: float
    """||.||_F^2 of the whole repaired update (under DoRA of its low-rank part, scaled as its rows are)."""

    @property
    def share(self) -> float:
        """The discarded share of the energy."""
        return self.discarded / self.energy if self.energy else 0.0


@dataclass(frozen=True)
class IntruderReduction:
    """What :func:`reduce_intruder_dimension` has done."""

    adapter: str
    """The name of the new adapter."""
    layers: dict[str, Repaired]
    """By the layer's path in the model."""

    @property
    def intruders(self) -> int:
        """How many there were."""
        return sum(len(layer.intruders) for layer in self.layers.values())

    @property
    def discarded(self) -> float:
        """||.||_F^2 of what the new factors do not hold, over all layers."""
        return sum(layer.discarded for layer in self.layers.values())

    @property
    def share(self) -> float:
        """The discarded share of the energy of all repaired updates."""
        whole = sum(layer.energy for layer in self.layers.values())
        return self.discarded / whole if whole else 0.0


def intruders_of(
    base: Tensor, A: Tensor, B: Tensor, top_k: int, epsilon: float, gain: Tensor | None = None
) -> tuple[SVD, list[Intruder]]:
    """The leading singular triplets of W' = diag(g) (W + B A), and those of them that are intruders.

    The triplets come from products with W, B and A (:func:`lorafa.numerics.low_rank.leading_of_sum`), the left vectors
    of W from one decomposition, O(m n min(m, n)).

    Args:
        base: W (out, in).
        A, B: (r, in) and (out, r), scaled.
        top_k: how many leading vectors of W' are looked at; at most the smaller side of W counts.
        epsilon: below which cosine a vector is one.
        gain: g (out,); None for one.

    Raises:
        ValueError: a value is not finite.
    """
    W = float_matrix(base)
    scaled = (W, B) if gain is None else (gain.to(W)[:, None] * W, gain.to(B)[:, None] * B)
    generator = torch.Generator().manual_seed(0)
    top = leading_of_sum(scaled[0], A, scaled[1], min(top_k, *W.shape), generator)
    there = top.at(top.S.gt(top.S[:1] * torch.finfo(W.dtype).eps * max(W.shape)))  # others are rounding
    own = left_vectors(W)
    cosines = (own.mT @ there.U).abs().amax(dim=0) if own.shape[1] else torch.zeros(len(there.S))
    listed = zip(there.S.tolist(), cosines.tolist(), strict=True)
    return there, [Intruder(j, value, cosine) for j, (value, cosine) in enumerate(listed) if cosine < epsilon]


def numbered(found: Iterable[Iterable[Intruder]], *, stacked: bool) -> tuple[Intruder, ...]:
    """The intruders of several matrices, each with the number of its own where they are a stack."""
    return tuple(replace(one, expert=at) if stacked else one for at, some in enumerate(found) for one in some)


def reduce_intruder_dimension(
    peft_model: AdaptedModel,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = TOP_K,
    threshold_epsilon: float = EPSILON,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[..., Any] | None = print,
    *,
    exact: bool = False,
) -> IntruderReduction:
    """Put a copy of an adapter, with its intruder dimensions weakened, beside it, and let the copy count.

    As PEFT's function of that name, on every kind of layer and for every formula that is one matrix. The copy is plain
    LoRA, or DoRA over it, with the same scaling on each layer; copied modules and trained rows come along. A layer
    without intruders is copied bit for bit. DoRA's gain g = m / ||W + s B A|| of each row stays: W' is
    diag(g) (W + s B A), and the repair of B A is scaled back by 1 / g. An adapter with a start that is subtracted
    (PiSSA) becomes the plain LoRA of rank 2 r that it is.

    Args:
        peft_model: a PeftModel.
        old_adapter_name: the adapter that is looked at; it stays as it is.
        new_adapter_name: what the copy is called.
        top_k: how many leading singular vectors of W' are looked at.
        threshold_epsilon: below which cosine to all left vectors of W a vector is an intruder, in [0, 1].
        mitigation_lambda: what is kept of an intruder, in [0, 1]: 1 leaves the adapter as it is, 0 removes them. PEFT's
            docstring says that a higher value subtracts more; its code does what is said here.
        logging_sink: is told in words what was found, layer by layer; None: nobody.
        exact: give the copy the rank that the repair has, r and one for each intruder, with ranks of its own for each
            layer. Otherwise it keeps the rank of the old factors, and what that cuts off is said in the result.

    Returns:
        The intruders of each layer, and the energy that was discarded.

    Raises:
        AdapterError: no such adapter, the new name is taken, one is merged, or a weight is not finite.
        BackendError: the update is no matrix, or the weight of a layer cannot be read.
        ConfigError: a value is out of its range; or the adapter trains the base's biases, which there is one set of.
            The model is as it was in every case.
    """
    _check(peft_model, top_k, threshold_epsilon, mitigation_lambda, exact)
    tuner = peft_model.base_model
    model = tuner.model
    require_adapters(model, [old_adapter_name])
    check_adapter_name(places(model), new_adapter_name)
    require_nothing_merged(model)
    if (changed := without_start(model)) is not None:
        raise AdapterError(
            f"The start of adapter {changed!r} is taken out of the base weights, so no other can count. Call "
            "restore_base(model) first. Nothing was changed."
        )
    require_uniform(model, [old_adapter_name], "Taking the intruder dimensions out of")
    layers = {path: layer for path, layer in lora_layers(model) if layer.has_update(old_adapter_name)}
    owned = {path: layer for path, layer in layers.items() if layer.adapters[old_adapter_name].tied_to is None}
    made = {
        path: _repaired(
            path, layer.adapters[old_adapter_name], layer, top_k, threshold_epsilon, mitigation_lambda, exact
        )
        for path, layer in owned.items()
    }
    say = logging_sink or _silent
    for path, repair in made.items():
        say(f"{path}: {_words(repair.done)}")
    put_on(tuner, old_adapter_name, new_adapter_name, {owned[path]: repair.factors for path, repair in made.items()})
    say(f"Enabling new adapter {new_adapter_name}")
    return IntruderReduction(new_adapter_name, {path: repair.done for path, repair in made.items()})


@dataclass(frozen=True)
class _Repair:
    """The new factors of one layer."""

    factors: NewFactors
    done: Repaired


def _check(model: object, top_k: int, epsilon: float, lam: float, exact: bool) -> None:
    if not isinstance(model, AdaptedModel):
        raise AdapterError(
            f"reduce_intruder_dimension takes a PeftModel, found a {type(model).__name__}. Put the adapter on with "
            "get_peft_model or PeftModel.from_pretrained."
        )
    check_int("top_k", top_k, at_least=1)
    check_number("threshold_epsilon", epsilon, "a cosine in [0, 1]", 0, 1, closed="[]")
    check_number("mitigation_lambda", lam, "the share that is kept, in [0, 1]", 0, 1, closed="[]")
    check_flag("exact", exact)


def _silent(*_: object) -> None:
    pass


def _words(done: Repaired) -> str:
    if not done.intruders:
        return "No intruders"
    cut = f", {done.share:.2%} of the update's energy discarded" if done.discarded else ""
    return f"Intruders: {len(done.intruders)}{cut}"


@torch.no_grad()
def _repaired(
    path: str, adapter: Adapter, layer: LoraLayer, top_k: int, epsilon: float, lam: float, exact: bool
) -> _Repair:
    """The factors of the repaired update of one layer, in the dtype that those of the whole old one have."""
    W, A, B, gain = _read(path, adapter, layer)
    scaling = float(adapter.scaling)
    gains = [gain] * (len(W) if W.dim() == 3 else 1)
    try:
        parts = [
            _corrected(matrix, one_A, one_B, one_gain, scaling, top_k, epsilon, lam)
            for matrix, one_A, one_B, one_gain in zip(matrices(W), matrices(A), matrices(B), gains, strict=True)
        ]
    except ValueError as error:
        raise AdapterError(
            f"{path}: the weight or the update of adapter {adapter.name!r} holds inf or nan, so its directions are not "
            "defined. It probably diverged: take an earlier checkpoint. Nothing was changed."
        ) from error
    intruders = numbered([part.intruders for part in parts], stacked=W.dim() == 3)
    old = {kind: adapter.extra(kind).clone() for kind in adapter.variant.extras}
    if not intruders or lam == 1:
        whole = sum(_energies(part.A, part.B, scaling, part.gain)[1] for part in parts)
        return _Repair(NewFactors(A.clone(), B.clone(), old), Repaired(intruders, A.shape[-2], 0.0, whole))
    rank = A.shape[-2]
    if exact:
        rank = max(rank, min(rank + max(len(part.intruders) for part in parts), *W.shape[-2:]))
    cut = [part.cut(rank, scaling) for part in parts]
    new_A = torch.stack([one[0] for one in cut]).reshape(*A.shape[:-2], rank, A.shape[-1]).to(A.dtype)
    new_B = torch.stack([one[1] for one in cut]).reshape(*B.shape[:-1], rank).to(B.dtype)
    extras = old if gain is None else old | adapter.variant.extras_of_gain(gain, W, new_A, new_B, scaling)
    done = Repaired(intruders, rank, sum(one[2] for one in cut), sum(one[3] for one in cut))
    return _Repair(NewFactors(new_A, new_B, extras), done)


def _read(path: str, adapter: Adapter, layer: LoraLayer) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """W (out, in), A (r, in), B (out, r), each with E in front on a stack, and the gain of rows, (out,) or None.

    Raises:
        BackendError: they cannot be read here, or the update is not made of one product.
    """
    if not adapter.as_made:
        layer.require_readable(adapter)
    A, B = used_factors(layer, adapter.name)
    W = _weight(path, layer)
    if any(is_part(tensor, 2) for tensor in (W, A, B)):
        raise BackendError(
            f"{path}: only a part of its weight or of the adapter is in this process (FSDP, DeepSpeed ZeRO-3), and "
            "intruders are directions of the whole. Save the adapter and load it on a model that is not sharded. "
            "Nothing was changed."
        )
    gain = adapter.variant.row_gain(adapter, W)
    if gain is None and not adapter.variant.plain:
        raise BackendError(
            f"{path}: the update of {adapter.variant.name} is not made of one product B A, so it cannot be repaired in "
            "its factors. Make LoRA of it first (convert_to_lora). Nothing was changed."
        )
    return W, A, B, gain


def _weight(path: str, layer: LoraLayer) -> Tensor:
    """The pristine weight that the layer multiplies with, (out, in) or (E, out, in)."""
    odd = layer.backend.reads(layer.pristine)
    if odd is not None:
        raise BackendError(
            f"{path}: intruders are found in the weight that the layer multiplies with, and no back end is sure of "
            f"it: {odd}. Remove what is odd about the layer. Nothing was changed."
        )
    try:
        weight = layer.base_weight()
    except BackendError as error:
        raise BackendError(f"{path}: {error}") from error
    if weight.is_meta:
        raise BackendError(f"{path}: its weight is on the meta device and has no values. Load it. Nothing was changed.")
    return weight


def matrices(tensor: Tensor) -> list[Tensor]:
    """The matrices of a stack (E, m, n), or the one (m, n) there is, in float32 or float64."""
    return [float_matrix(each) for each in (tensor if tensor.dim() == 3 else tensor[None])]


@dataclass(frozen=True)
class _Corrected:
    """Unscaled factors of the repaired update of one matrix, all of it."""

    A: Tensor
    B: Tensor
    intruders: list[Intruder]
    gain: Tensor | None

    def cut(self, rank: int, scaling: float) -> tuple[Tensor, Tensor, float, float]:
        """Factors of this rank, the energy they do not hold, and that of the whole."""
        if self.A.shape[0] <= rank:
            return (*padded(self.A, self.B, rank), 0.0, _energies(self.A, self.B, scaling, self.gain)[1])
        A, B, _ = to_rank(self.A, self.B, rank)
        lost, whole = _energies(self.A, self.B, scaling, self.gain, rank)
        return A, B, lost, whole


def _energies(
    A: Tensor, B: Tensor, scaling: float, gain: Tensor | None, rank: int | None = None
) -> tuple[float, float]:
    """||.||_F^2 of diag(g) s (B A - [B A]_rank), and of all of it."""
    svd = product_svd(A, B)
    values = scaling * svd.S
    if gain is not None:  # the right vectors are orthonormal whatever the rows are scaled by
        values = values * torch.linalg.vector_norm(gain.to(svd.U)[:, None] * svd.U, dim=0)
    return (0.0 if rank is None else energy(values[rank:])), energy(values)


def _corrected(
    W: Tensor, A: Tensor, B: Tensor, gain: Tensor | None, scaling: float, top_k: int, epsilon: float, lam: float
) -> _Corrected:
    """[B, (lambda - 1) / s diag(1 / g) u' sigma'] and [A; v'^T] for the intruders, each pair of the same length."""
    top, intruders = intruders_of(W, A, scaling * B, top_k, epsilon, gain)
    if not intruders or lam == 1 or not scaling:
        return _Corrected(A, B, intruders, gain)
    chosen = top.at(torch.tensor([one.place for one in intruders], device=top.S.device))
    sizes = (1 - lam) / abs(scaling) * chosen.S
    u = chosen.U if gain is None else torch.where(gain[:, None] != 0, chosen.U / gain[:, None], 0)
    added_B, added_A = -u * (sizes.sqrt() * (1 if scaling > 0 else -1)), sizes.sqrt()[:, None] * chosen.Vh
    return _Corrected(torch.cat([A, added_A]), torch.cat([B, added_B], dim=1), intruders, gain)
