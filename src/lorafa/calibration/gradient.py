"""The gradient of a weight as its leading singular triplets, without forming it.

G = sum over tokens of d x^T, with x (in,) the layer's input and d (out,) the gradient of its output. Products with thin
random matrices follow the sum exactly:  G Omega = sum d (x^T Omega)  and  Psi G = sum (Psi d) x^T. From a range sketch
Y = G Omega (out, k) and a co-range sketch Z = Psi G (l, in) the leading triplets are recovered: Tropp, Yurtsever, Udell
and Cevher 2017, arXiv:1609.00048, algorithms 4 and 7. A third sketch, Theta G with ten rows, tells the error.

Where the data is kept as two half samples, the first has a range and triplets of its own, in which the second has no
part: what the second holds of them is then an unbiased estimate. With more than one pass the first half is followed
beside the whole sample, in further columns and rows of the same sketches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorafa.calibration.base import Measured, Statistic
from lorafa.calibration.processes import of_first
from lorafa.errors import CalibrationError
from lorafa.numerics.linalg import SVD, leading_svd, spd_eigh, svd_within, working_dtype

CHECK_ROWS = 10
"""Rows of Theta: the estimate of a squared norm has a relative standard deviation of at most sqrt(2 / 10)."""
WHITENING = 0.01
"""Damping of the second moment, in units of its mean eigenvalue."""
WHITENED_CONDITION = 1e4
"""Largest condition number of the damped second moment: where one direction of the inputs dwarfs the others, damping
alone leaves 1e2 times in."""


def sketch_sizes(rank: int, passes: int) -> tuple[int, int]:
    """(k, l): columns of the range sketch and rows of the co-range sketch for ``rank`` triplets.

    With one pass k = 4 r and l = 2 k + 1, which hold 97 % of the energy of the best r triplets and more on SmolLM2-135M
    (docs/LOG.md). With more passes k = 2 r + 8, and there is no co-range sketch.
    """
    return (4 * rank, 8 * rank + 1) if passes == 1 else (2 * rank + 8, 0)


SUMS = "sums."
"""What the names of tensors begin with that are kept to be added up, and are no part of the result."""


@dataclass
class _Sums:
    """Accumulators of one (half) sample."""

    G: Tensor | None = None
    """(out, in), dense."""
    Y: Tensor | None = None
    """(out, k) = G Omega."""
    Z: Tensor | None = None
    """(l + q, in) = [Psi; Theta] G, or [Q^T; Theta] G once a range Q is known."""

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.G, self.Y, self.Z) if tensor is not None]

    def mean(self, share: float, other: _Sums) -> _Sums:
        """The weighted mean: ``share``, in [0, 1], of this and the rest of ``other``."""
        pairs = ((self.G, other.G), (self.Y, other.Y), (self.Z, other.Z))
        return _Sums(*(None if a is None or b is None else share * a + (1 - share) * b for a, b in pairs))


@dataclass(frozen=True)
class _Bases:
    """The thin matrices of a pass, in the dtype products are computed in."""

    right: Tensor | None = None
    """(in, k), what G is multiplied with."""
    left: Tensor | None = None
    """(l + q, out), what multiplies G."""


@dataclass
class _Found:
    """What passes have found so far."""

    range: Tensor | None = None
    """Q (out, k), orthonormal columns; of halves (out, 2 k), the last k those of the first half alone."""
    directions: Tensor | None = None
    """V (in, k), orthonormal columns; of halves (in, 2 k), likewise."""
    means: list[_Sums] = field(default_factory=list)
    """The sums of each (half) sample in the last pass, divided by the weight of its batches."""
    share: float = 1.0
    """The share of the first sample in the weight of all batches."""


class GradientSketch(Statistic):
    """Result: U (out, k), S (k,), Vh (k, in), ``norm2`` = ||G||^2 and ``error2`` = ||G - U S Vh||^2 (estimates where G
    was not formed); ``dense``, G itself (out, in), where it was; with ``halves`` also ``cross`` (k,), see
    :func:`cross_validated`, and ``S_half`` (k,), of the first half. :meth:`finish` adds ``largest`` (). With
    ``keep_sums`` also what :meth:`combined` adds up, under names that begin with :data:`SUMS`.
    """

    reads_gradient = True
    linear = True

    def __init__(self, layer: Measured) -> None:
        super().__init__(layer)
        options = layer.options
        self.k, self.l = sketch_sizes(layer.rank, options.passes)
        self.k = min(self.k, layer.out, layer.in_)
        self.whole, self.first = slice(self.k), slice(-self.k, None)
        """Which columns of the sketches are the whole sample's, and which its first half's: the same if there are k."""
        sketching = (self.k + self.l + CHECK_ROWS) * (layer.out + layer.in_)  # products for each token
        self.dense = layer.out * layer.in_ <= sketching if options.dense is None else options.dense
        self.found = _Found()
        self.samples: list[_Sums] = []
        self.bases: _Bases | None = None
        self.half = 0
        self.last = False

    def wants_pass(self, number: int) -> bool:
        return number < (1 if self.dense else self.layer.options.passes)

    def start_pass(self, number: int, done: Mapping[str, Statistic]) -> None:
        self.samples = [_Sums() for _ in range(2 if self.layer.options.halves else 1)]
        self.bases, self.half = None, 0
        self.last = not self.wants_pass(number + 1)

    def start_batch(self, half: int) -> None:
        self.half = half % len(self.samples)

    def update(self, x: Tensor, d: Tensor | None) -> None:
        assert d is not None  # reads_gradient
        if x.dtype is torch.float16:  # products of gradients leave its range
            x, d = x.float(), d.float()
        sums, dtype = self.samples[self.half], working_dtype(x.dtype)
        if self.dense:
            sums.G = _add(sums.G, d.mT @ x, dtype)
            return
        bases = self.bases = self.bases or self._bases(x)
        if bases.right is not None:
            sums.Y = _add(sums.Y, d.mT @ (x @ bases.right), dtype)
        if bases.left is not None:
            sums.Z = _add(sums.Z, (d @ bases.left.mT).mT @ x, dtype)

    def _bases(self, like: Tensor) -> _Bases:
        layer, found = self.layer, self.found
        if found.range is not None:
            left = found.range.mT.to(like)
            return _Bases(left=torch.cat([left, self._check(like)]) if self.last else left)
        right = self._right(like) if found.directions is None else found.directions.to(like)
        if layer.options.passes > 1:
            return _Bases(right)
        co_range = layer.projections.get("co-range", layer.out, self.l, like).mT
        return _Bases(right, torch.cat([co_range, self._check(like)]))

    def _right(self, like: Tensor) -> Tensor:
        """Omega (in, k)."""
        return self.layer.projections.get("range", self.layer.in_, self.k, like)

    def _check(self, like: Tensor) -> Tensor:
        """Theta (q, out), of variance 1 / out."""
        return self.layer.projections.get("check", self.layer.out, CHECK_ROWS, like).mT

    def sums(self) -> list[Tensor]:
        self._fill()
        return [tensor for sample in self.samples for tensor in sample.tensors()]

    def _fill(self) -> None:
        """A layer no batch reached has a gradient of zero, and ranks must agree on what they add up."""
        out, in_ = self.layer.out, self.layer.in_
        known = next((tensor for sample in self.samples for tensor in sample.tensors()), torch.zeros(()))
        for sample in self.samples:
            if self.dense:
                sample.G = known.new_zeros(out, in_) if sample.G is None else sample.G
                continue
            bases = self.bases = self.bases or self._bases(known)
            if bases.right is not None and sample.Y is None:
                sample.Y = known.new_zeros(out, bases.right.shape[1])
            if bases.left is not None and sample.Z is None:
                sample.Z = known.new_zeros(bases.left.shape[0], in_)

    def end_pass(self, number: int, weights: tuple[float, float]) -> None:
        self._fill()
        shares = weights if self.layer.options.halves else (sum(weights),)
        _require_both(shares)
        self.found.means = [self._mean(sample, share) for sample, share in zip(self.samples, shares, strict=True)]
        self.found.share = shares[0] / sum(shares)
        self.samples = []
        total = self._total()
        if self.dense or self.layer.options.passes == 1 or not all(t.isfinite().all() for t in total.tensors()):
            return
        followed = [(total, self.whole), *((first, self.first) for first in self.found.means[:-1])]
        if total.Y is not None:
            self.found.range = _beside(sums.Y[:, part] for sums, part in followed if sums.Y is not None)
        elif not self.last:
            self.found.directions = _beside(sums.Z[part].mT for sums, part in followed if sums.Z is not None)
            self.found.range = None

    def _mean(self, sample: _Sums, weight: float) -> _Sums:
        return _Sums(*(None if t is None else self._whiten(t, side).div_(weight) for side, t in vars(sample).items()))

    def _whiten(self, sums: Tensor, side: str) -> Tensor:
        return sums

    def _total(self) -> _Sums:
        """The mean over the whole sample."""
        first, *second = self.found.means
        return first.mean(self.found.share, second[0]) if second else first

    def result(self) -> dict[str, Tensor]:
        total = self._total()
        kept = self._sums_kept() if self.layer.options.keep_sums else {}
        if not all(bool(tensor.isfinite().all()) for tensor in total.tensors()):
            return self._nothing(total.tensors()[0]) | kept
        triplets = self._within(total, self.whole)[0]
        found = {"U": triplets.U, "S": triplets.S, "Vh": triplets.Vh} | self._norms(total, triplets)
        if total.G is not None:
            found["dense"] = total.G
        if len(self.found.means) == 2:
            found |= self._confirmed(*self.found.means)
        self.found = _Found()  # the sketches have served
        return found | kept

    def _sums_kept(self) -> dict[str, Tensor]:
        means = {f"{SUMS}{i}.{side}": t for i, mean in enumerate(self.found.means) for side, t in vars(mean).items()}
        kept = {name: tensor for name, tensor in means.items() if tensor is not None}
        like = next(iter(kept.values()))
        kept |= {} if self.dense else {f"{SUMS}left": self._bases_used().left}  # type: ignore[dict-item]
        return kept | {f"{SUMS}share": like.new_tensor(self.found.share, dtype=torch.float64)}

    @classmethod
    def combined(cls, layer: Measured, parts: Sequence[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
        """The result for a weighted sum of gradients, of which the data is not needed again: sketches are linear.

        Args:
            parts: the weight of each, and its result with ``keep_sums``; all collected by one seed over the same data.
        """
        made, (_, first) = cls(layer), parts[0]
        halves = 2 if f"{SUMS}1.Z" in first or f"{SUMS}1.G" in first else 1
        made.dense = f"{SUMS}0.G" in first
        made.found.share = float(first[f"{SUMS}share"])
        for half in range(halves):
            mean = _Sums()
            for side in vars(mean):
                name = f"{SUMS}{half}.{side}"
                if name in first:
                    setattr(mean, side, torch.stack([weight * part[name] for weight, part in parts]).sum(0))
            made.found.means.append(mean)
        made.bases = None if made.dense else _Bases(left=first[f"{SUMS}left"])
        return made.result()

    def _nothing(self, like: Tensor) -> dict[str, Tensor]:
        """Triplets of a gradient with inf or nan."""
        U, Vh = like.new_zeros(self.layer.out, self.k), like.new_zeros(self.k, self.layer.in_)
        bad = {name: like.new_tensor(torch.nan) for name in ("norm2", "error2")}
        return {"U": U, "S": like.new_full((self.k,), torch.nan), "Vh": Vh} | bad

    def _confirmed(self, first: _Sums, second: _Sums) -> dict[str, Tensor]:
        """What the triplets of the first half hold in the second, whose sketches are read within the first's range."""
        triplets, Q = self._within(first, self.first)
        if Q is None:
            assert second.G is not None
            return {"cross": cross_validated(triplets, second.G), "S_half": triplets.S}
        inside = SVD(Q.mT @ triplets.U, triplets.S, triplets.Vh)
        return {"cross": cross_validated(inside, self._coordinates(second, Q, self.first)), "S_half": triplets.S}

    def _within(self, sums: _Sums, part: slice) -> tuple[SVD, Tensor | None]:
        """The leading triplets, and the range Q (out, k) they were found in; None where G was formed."""
        if sums.G is not None:
            return leading_svd(sums.G, self.k, torch.Generator().manual_seed(self.layer.options.seed)), None
        if self.found.range is not None:
            Q = self.found.range[:, part]
        else:
            assert sums.Y is not None
            Q = torch.linalg.qr(sums.Y).Q
        return svd_within(Q, self._coordinates(sums, Q, part), self.k), Q

    def _coordinates(self, sums: _Sums, Q: Tensor, part: slice) -> Tensor:
        """X (k, in) with G ~ Q X; linear in G."""
        assert sums.Z is not None
        Z = sums.Z[:-CHECK_ROWS]
        if self.layer.options.passes > 1:
            return Z[part]
        Psi = self._bases_used().left[: self.l].to(Q)  # type: ignore[index]
        solution: Tensor = torch.linalg.lstsq(Psi @ Q, Z).solution
        return solution

    def _bases_used(self) -> _Bases:
        assert self.bases is not None
        return self.bases

    def _norms(self, total: _Sums, triplets: SVD) -> dict[str, Tensor]:
        """``norm2`` and ``error2``.

        U S Vh lies in a range Q: where it is Q Q^T G, the squares of S and of the error add up to those of G. With one
        pass it also holds what Psi confuses of the rest R with the range, k / (l - k - 1) times ||R||^2 on average:
        all of it for l = 2 k + 1, so that the squares of S alone are an unbiased estimate.
        """
        held = triplets.S.square().sum()
        if total.G is not None:
            norm2 = total.G.square().sum()
            return {"norm2": norm2, "error2": (norm2 - held).clamp(min=0)}
        assert total.Z is not None
        E = total.Z[-CHECK_ROWS:]
        Theta = self._check(self._bases_used().left).to(E)  # type: ignore[arg-type]
        rest = E - Theta @ triplets.U * triplets.S @ triplets.Vh
        error2 = rest.square().sum() * self.layer.out / CHECK_ROWS  # Theta has variance 1 / out
        return {"norm2": held if self.layer.options.passes == 1 else held + error2, "error2": error2}

    @classmethod
    def finish(cls, name: str, values: Mapping[str, dict[str, Tensor]]) -> None:
        """Every layer gets the largest singular value of all layers, for starts that share one scale."""
        tops = [tensors[f"{name}.S"][:1] for tensors in values.values()]
        finite = [top.max().cpu() for top in tops if top.numel() and bool(torch.isfinite(top).all())]
        for tensors in values.values() if finite else ():
            tensors[f"{name}.largest"] = torch.stack(finite).max().to(tensors[f"{name}.S"].device)


class WhitenedGradientSketch(GradientSketch):
    """The same for G C^-1/2, with C the damped second moment of the inputs: see ``functional``."""

    after = ("second_moment",)

    def start_pass(self, number: int, done: Mapping[str, Statistic]) -> None:
        super().start_pass(number, done)
        if number == 0:
            self.whitening = whitening(done["second_moment"].result()["C"])

    def _right(self, like: Tensor) -> Tensor:
        return (self.whitening @ super()._right(like).to(self.whitening)).to(like)

    def _bases(self, like: Tensor) -> _Bases:
        bases = super()._bases(like)
        if self.found.directions is None or bases.right is None:
            return bases
        return _Bases((self.whitening @ self.found.directions).to(like), bases.left)

    def _whiten(self, sums: Tensor, side: str) -> Tensor:
        return sums if side == "Y" else sums @ self.whitening.to(sums)


def whitening(C: Tensor) -> Tensor:
    """M^-1/2 of the metric M that a second moment C (in, in) stands for, in C's dtype.

    M is C + d I with d = 0.01 of C's mean eigenvalue, and its eigenvalues below 1e-4 of the largest are raised to that.
    Sketch and start both call this, so that the step is undone in the metric it was found in. nan where C is not
    finite.
    """
    return _power_of_metric(C, -0.5)


def metric_root(C: Tensor) -> Tensor:
    """M^1/2, the inverse of :func:`whitening`."""
    return _power_of_metric(C, 0.5)


def metric_inverse(C: Tensor) -> Tensor:
    """M^-1, the square of :func:`whitening`."""
    return _power_of_metric(C, -1.0)


def _power_of_metric(C: Tensor, power: float) -> Tensor:
    if not bool(torch.isfinite(C).all()):
        return torch.full_like(C, torch.nan)
    values, vectors = spd_eigh(C)
    values = values + WHITENING * values.mean()
    values = values.maximum(values[-1] / WHITENED_CONDITION)
    return (vectors * values.pow(power) @ vectors.mT).to(C.dtype)


def cross_validated(first: SVD, second: Tensor) -> Tensor:
    """u_i^T G2 v_i for the triplets of one half sample and the gradient (out, in) of the other, (k,).

    The halves are independent and G2 enters linearly, so this is an unbiased estimate of what direction i holds of the
    population's gradient, where S is inflated by noise: near zero for a direction that is noise. With
    one pass G2 is known through its sketch only, within the range of the first half.
    """
    return (first.U * (second @ first.Vh.mT)).sum(0)


def _require_both(weights: tuple[float, ...]) -> None:
    if not all(weights):
        raise CalibrationError(
            "halves=True keeps every other batch apart, and one of the two half samples is empty: their batches weigh "
            f"{' and '.join(f'{weight:g}' for weight in weights)}. Pass at least two batches (over all processes) that "
            "have something to learn from, or halves=False."
        )


def _beside(columns: Iterable[Tensor]) -> Tensor:
    """Orthonormal bases of matrices of one height, side by side; the same on all processes."""
    return of_first(torch.cat([torch.linalg.qr(one).Q for one in columns], dim=1))


def _add(total: Tensor | None, product: Tensor, dtype: torch.dtype) -> Tensor:
    return product.to(dtype) if total is None else total.add_(product)


def gradient_triplets(stats: Mapping[str, Tensor], name: str = "gradient") -> SVD:
    """The triplets a gradient statistic found."""
    return SVD(stats[f"{name}.U"], stats[f"{name}.S"], stats[f"{name}.Vh"])
