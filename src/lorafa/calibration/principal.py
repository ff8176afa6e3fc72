"""Principal directions of a layer's inputs, batch by batch: EVA's incremental PCA (arXiv:2410.07170, section 3.2)."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorafa.calibration.base import Measured, Statistic, Tokens
from lorafa.calibration.explained_variance import by_explained_variance, most_components, variance_shares
from lorafa.calibration.moments import InputStatistic
from lorafa.errors import shorten, warn
from lorafa.models.rows import IGNORE_INDEX
from lorafa.numerics.linalg import fix_signs, float_matrix, leading_right
from lorafa.processes import gathered

MOST_PASSES = 10
"""Passes over the data where directions do not settle: with few batches the last of them may keep turning."""
_STEPS, _FIRST_STEPS = 2, 4
"""Steps of subspace iteration. Measured on SmolLM2-135M (k = 16 and 32, 384 and 1536 tokens a batch): two steps from
the last directions and as many random ones take half of PEFT's time and keep the same energy to 0.1 %."""


@dataclass(frozen=True)
class PCASettings:
    """What the statistic reads of EvaConfig, with its defaults."""

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = IGNORE_INDEX
    center: bool = True
    """Subtract the mean, as the paper and PEFT do; the mean direction is lost then. EvaConfig has no such field: a
    start of one's own that needs "principal" sets it by a field ``center`` of its settings."""

    @classmethod
    def of(cls, settings: Any) -> PCASettings:
        """From any object that has some of the fields; those it lacks are at their defaults."""
        return cls(**{f.name: getattr(settings, f.name) for f in fields(cls) if hasattr(settings, f.name)})


@dataclass(frozen=True)
class Scatter:
    """Sum over tokens of (x - mean)(x - mean)^T, as R^T R."""

    rows: Tensor
    """R (t, in)."""
    mean: Tensor
    """(in,)."""
    total: Tensor
    """(), the trace of the whole; ``rows`` may hold less of it."""
    count: float
    """Tokens."""

    @classmethod
    def of(cls, x: Tensor, *, center: bool = True) -> Scatter:
        """The scatter of tokens (t, in), about their mean or (``center=False``) about zero."""
        mean = x.mean(0) if center else x.new_zeros(x.shape[1])
        rows = x - mean
        return cls(rows, mean, rows.square().sum(), len(x))

    @classmethod
    def nothing(cls, components: int, width: int, like: Tensor | None = None) -> Scatter:
        """The scatter of no tokens, in the dtype and on the device of ``like``; None: float32 on the CPU."""
        like = torch.zeros(()) if like is None else like
        return cls(like.new_zeros(components, width), like.new_zeros(width), like.new_zeros(()), 0)

    def joined(self, other: Scatter) -> Scatter:
        """The scatter of both token sets together, exactly: R = [R1; R2; sqrt(N1 N2 / N) (mean1 - mean2)]."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        gap = math.sqrt(self.count * other.count / count) * (self.mean - other.mean)
        mean = self.mean + (other.mean - self.mean) * (other.count / count)
        rows = torch.cat([self.rows, other.rows, gap[None]])
        return Scatter(rows, mean, self.total + other.total + gap.square().sum(), count)

    def truncated(self, components: int, start: Tensor | None = None, steps: int = 0) -> Scatter:
        """Its leading components only, R = diag(S) V^T (components, in), signs fixed; see :func:`leading_right`.

        All nan if a token was not finite.
        """
        if not bool(self.total.isfinite()):
            return replace(self, rows=self.rows.new_full((components, self.rows.shape[1]), torch.nan))
        S, Vh = leading_right(self.rows, components, start, steps)
        return replace(self, rows=S[:, None] * fix_signs(Vh.mT, Vh)[1])

    def times(self, factor: float) -> Scatter:
        """As if every token had this weight."""
        return Scatter(self.rows * math.sqrt(factor), self.mean, self.total * factor, self.count * factor)

    def to(self, device: torch.device | str) -> Scatter:
        return Scatter(self.rows.to(device), self.mean.to(device), self.total.to(device), self.count)

    @property
    def singular_values(self) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(self.rows, dim=1)
        return norms

    @property
    def directions(self) -> Tensor:
        """(t, in), unit rows; zero where the singular value is."""
        lengths = self.singular_values.clamp(min=torch.finfo(self.rows.dtype).tiny)
        return self.rows / lengths[:, None]


def merged(parts: Sequence[Scatter], components: int) -> Scatter:
    """The leading components of several truncated scatters together, (components, in) as each of them."""
    return functools.reduce(Scatter.joined, parts).truncated(components)


class IncrementalPCA(InputStatistic):
    """Result: ``components`` (k, in) with k = round(rho r), orthonormal rows, the leading first, zero beyond the rank
    of the data; ``singular_values`` (k,) and ``total_variance`` (), so that singular_values^2 / total_variance are the
    explained-variance ratios; ``tokens`` (), ``converged`` (k,), bool, and ``settled`` (), whether the needed ones had.

    Each update decomposes [diag(S) V; X - mean(X); mean correction] and keeps k components; batches of fewer than k
    tokens wait for more. A component has converged when an update leaves its direction at a cosine of ``tau`` or more.
    Once the ``needed`` ones have, further tokens are passed over. The data are gone round again until then, but
    ``MOST_PASSES`` times at most.

    Under torch.distributed every rank follows its own tokens in a pass; :meth:`reduce` joins what they kept. In the
    next pass each carries an equal share of it, so that nothing counts twice.
    """

    settings_read: ClassVar[Mapping[str, Any]] = {
        one.name: one.default for one in fields(PCASettings) if one.name != "rho"
    }

    def __init__(self, layer: Measured) -> None:
        super().__init__(layer)
        self.settings = PCASettings.of(layer.settings)
        self.k = min(most_components(self.settings.rho, layer.rank), layer.in_)
        self.needed = self.k
        """Leading components that must converge; see :meth:`compare`."""
        self.scatter = Scatter.nothing(self.k, layer.in_)
        self.converged = torch.zeros(self.k, dtype=torch.bool)
        self._waiting: list[Tensor] = []
        self._ranks = 1
        self._absorbed = False
        """Any rows in this pass."""

    @property
    def tokens(self) -> Tokens:
        return "labelled" if self.settings.use_label_mask else "attended"

    @property
    def satisfied(self) -> bool:
        return bool(self.converged[: self.needed].all()) or not bool(self.scatter.total.isfinite())

    def wants_pass(self, number: int) -> bool:
        return number == 0 or (number < MOST_PASSES and self.scatter.count > 0 and not self.satisfied)

    @classmethod
    def compare(cls, layers: Sequence[tuple[Measured, IncrementalPCA]]) -> None:
        """Let each wait only for the components it would get if ranks were shared out now, as PEFT does.

        Args:
            layers: every layer with the statistic that serves it: one may serve many.
        """
        if not all(statistic.scatter.count for _, statistic in layers):
            return
        ratios = {layer.name: statistic.explained_variance.cpu() for layer, statistic in layers}
        rho = max(statistic.settings.rho for _, statistic in layers)
        found = by_explained_variance(ratios, {layer.name: layer.rank for layer, _ in layers}, rho)
        for _, statistic in layers:
            statistic.needed = 0
        for layer, statistic in layers:
            statistic.needed = max(statistic.needed, found[layer.name])

    @property
    def explained_variance(self) -> Tensor:
        """(k,) the components' shares of the total variance; zero where there is none, or it is not finite."""
        return variance_shares(self.scatter.singular_values, self.scatter.total).nan_to_num()

    def start_pass(self, number: int, done: Mapping[str, Statistic]) -> None:
        self.scatter, self._absorbed = self.scatter.times(1 / self._ranks), False

    def update(self, x: Tensor, d: Tensor | None) -> None:
        if self.satisfied:
            return
        x = float_matrix(x)
        if not self.scatter.count:
            self.scatter = Scatter.nothing(self.k, self.layer.in_, x)
        self._waiting.append(x)
        if sum(map(len, self._waiting)) >= self.k:
            self._absorb()
        else:
            self._waiting[-1] = self._waiting[-1].clone()  # x must not be kept

    def _absorb(self) -> None:
        """Take in the rows that wait."""
        x, before = torch.cat(self._waiting), self.scatter
        self._waiting, self._absorbed = [], True
        batch = Scatter.of(x, center=self.settings.center)
        random = self.layer.projections.get("principal", self.layer.in_, 2 * self.k, x)
        if before.count:
            start, steps = torch.cat([before.directions.mT, random[:, : self.k]], dim=1), _STEPS
        else:
            start, steps = random, _FIRST_STEPS
        self.scatter = before.joined(batch).truncated(self.k, start, steps)
        if before.count:
            self.converged = self._unchanged(before)

    def _unchanged(self, before: Scatter) -> Tensor:
        cosines = (self.scatter.directions * before.directions).sum(1).abs()
        missing = (self.scatter.singular_values == 0) & (before.singular_values == 0)
        return (cosines >= self.settings.tau) | missing

    def _flush(self) -> None:
        if self._waiting and sum(map(len, self._waiting)):
            self._absorb()

    def reduce(self) -> None:
        self._flush()
        device, abstains = self.scatter.rows.device, not self._absorbed
        everyone = gathered((self.scatter.to("cpu"), self.converged.cpu() | abstains))
        self._ranks = len(everyone)
        self.scatter = merged([scatter for scatter, _ in everyone], self.k).to(device)
        self.converged = torch.stack([converged for _, converged in everyone]).all(0).to(device)

    def end_pass(self, number: int, weights: tuple[float, float]) -> None:
        self._flush()

    def result(self) -> dict[str, Tensor]:
        found = self.scatter
        self.require(found.count)
        return {
            "components": found.directions,
            "singular_values": found.singular_values,
            "total_variance": found.total,
            "tokens": torch.tensor(round(found.count)),
            "converged": self.converged,
            "settled": torch.tensor(self.satisfied),
        }

    @classmethod
    def finish(cls, name: str, values: Mapping[str, dict[str, Tensor]]) -> None:
        """Warn of directions that never settled."""
        turning = [layer for layer, tensors in values.items() if not tensors[f"{name}.settled"]]
        if turning:
            warn(
                f"The principal directions of the inputs still turn after {MOST_PASSES} passes over the data on "
                f"{len(turning)} of {len(values)} layers: {shorten(turning, 3)}. They start from the last ones. Use "
                "more or larger batches, or lower tau or rho of EvaConfig."
            )
