"""Second moments of a layer's inputs: how much of the data lies in which direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorafa.calibration.base import Measured, Statistic, Tokens
from lorafa.calibration.processes import add_up
from lorafa.errors import CalibrationError
from lorafa.numerics.linalg import add_gram, float_matrix, mirror_, nystrom, wide


class InputStatistic(Statistic):
    """A statistic of the inputs that the attention mask keeps, the same for all layers that are given them."""

    @property
    def tokens(self) -> Tokens:
        return "attended"

    @property
    def shares_input(self) -> bool:
        return True

    def require(self, seen: float) -> None:
        """Raises CalibrationError if nothing was."""
        if not seen:
            raise CalibrationError(
                f"No input reached {self.layer.name!r} in calibration, so there is nothing to start it from. Use "
                "batches that pass through this layer and have tokens that count, or leave the layer out with "
                "exclude_modules."
            )


class SecondMoment(InputStatistic):
    """Result: ``C`` (in, in) = sum over tokens of x x^T / T, and their number T as ``tokens``.

    Products are in float32 whatever the model's dtype (float64 stays). Of bfloat16 inputs they are exact that way; a
    product rounded to bfloat16 would bury every direction that holds less than 1/256 of the largest. float16 would
    overflow. That is enough where C is damped; for its smallest eigenvectors there is :class:`ExactMoment`.
    """

    depends_on_rank = False

    def __init__(self, layer: Measured) -> None:
        super().__init__(layer)
        self.sum: Tensor | None = None
        self.count = _counter()

    def update(self, x: Tensor, d: Tensor | None) -> None:
        x = self._rows(x)
        if self.sum is None:
            self.sum, self.count = self._zeros(x), _counter(x.device)
        self._add(self.sum, x)
        self.count += len(x)

    def _rows(self, x: Tensor) -> Tensor:
        """Inputs in the dtype that products and sums are made in."""
        return float_matrix(x)

    def _zeros(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.layer.in_, self.layer.in_)

    def _add(self, total: Tensor, x: Tensor) -> None:
        add_gram(total, x)

    def sums(self) -> list[Tensor]:
        if self.sum is None:
            self.sum = self._zeros(self._rows(torch.zeros(())))
        return [self.sum, self.count]

    def result(self) -> dict[str, Tensor]:
        return {"C": mirror_(self._mean()), "tokens": self.count}

    def _mean(self) -> Tensor:
        self.require(float(self.count))
        assert self.sum is not None
        return self.sum / self.count.to(self.sum)


class ExactMoment(SecondMoment):
    """The same C in float64 (float32 on mps, which has no other), for the directions the inputs use least.

    C squares the inputs: where one direction is a thousand times larger than the rest, rounding its entries to float32
    moves them by as much as the least directions hold. Both products and sums have to be in float64; sums of float32
    products, and a C that is rounded at the end, lose these directions too. It costs twice the memory of C, a copy of
    each batch of inputs in float64, and their product in float64, which is slow on most accelerators.
    """

    def _rows(self, x: Tensor) -> Tensor:
        return wide(float_matrix(x))


class MomentSketch(SecondMoment):
    """C for wide layers, from C Omega with a thin random Omega (in, k): memory in * k instead of in^2.

    Result: ``values`` (k,) and ``vectors`` (in, k) with C ~ vectors diag(values) vectors^T (:func:`nystrom`, with
    k = 4 r), ``trace`` of C, () (exact: what the sketch misses is ``trace`` - ``values.sum()``), and ``tokens``.
    """

    depends_on_rank = True

    def __init__(self, layer: Measured) -> None:
        super().__init__(layer)
        self.k = min(4 * layer.rank, layer.in_)
        self.trace = torch.zeros(())

    def _zeros(self, like: Tensor) -> Tensor:
        self.trace = like.new_zeros(())
        return like.new_zeros(self.layer.in_, self.k)

    def _omega(self, like: Tensor) -> Tensor:
        return self.layer.projections.get("moment", self.layer.in_, self.k, like)

    def _add(self, total: Tensor, x: Tensor) -> None:
        total.addmm_(x.mT, x @ self._omega(x))
        self.trace += x.square().sum()

    def sums(self) -> list[Tensor]:
        return [*super().sums(), self.trace]

    def result(self) -> dict[str, Tensor]:
        Y = self._mean()
        values, vectors = nystrom(Y, self._omega(Y))
        return {"values": values, "vectors": vectors, "trace": self.trace / self.count.to(Y), "tokens": self.count}


class CordaMoment(InputStatistic):
    """Result: ``C`` (in, in), the mean over batches of X^T X / max|X|^2 with X (T, in) one batch's inputs, and the
    numbers of ``batches`` and ``tokens`` (CorDA, arXiv:2406.05223; its code divides by |max X|, and PEFT's).

    With ``use_float16_for_covariance`` of CordaConfig C is kept in float16, rounded after every batch; it overflows,
    and the start falls back, if a batch has more than 65504 tokens.
    """

    depends_on_rank = False
    settings_read: ClassVar[Mapping[str, Any]] = {"use_float16_for_covariance": False}

    def __init__(self, layer: Measured) -> None:
        super().__init__(layer)
        self.half = bool(getattr(layer.settings, "use_float16_for_covariance", False))
        self.mean: Tensor | None = None
        self.batches, self.count = _counter(), _counter()

    def update(self, x: Tensor, d: Tensor | None) -> None:
        x = float_matrix(x)
        if self.mean is None:
            self.mean = self._zeros(x)
            self.batches, self.count = _counter(x.device), _counter(x.device)
        self.count += len(x)
        largest = x.abs().amax() if len(x) else 0
        if not largest:
            return
        self.batches += 1
        x, share = x / largest, 1 / float(self.batches)
        if self.half:
            self.mean.lerp_((x.mT @ x).half(), share)
        else:
            add_gram(self.mean, x, beta=1 - share, alpha=share)

    def _zeros(self, like: Tensor) -> Tensor:
        dtype = torch.float16 if self.half else like.dtype
        return like.new_zeros(self.layer.in_, self.layer.in_, dtype=dtype)

    def reduce(self) -> None:
        mean = self._zeros(torch.zeros(())) if self.mean is None else self.mean
        total = float_matrix(mean) * self.batches
        for tensor in (total, self.batches, self.count):
            add_up(tensor)
        self.mean = (total / self.batches.clamp(min=1)).to(mean.dtype)

    def result(self) -> dict[str, Tensor]:
        self.require(float(self.count))
        assert self.mean is not None
        return {"C": mirror_(float_matrix(self.mean)), "batches": self.batches, "tokens": self.count}


def _counter(device: torch.device | None = None) -> Tensor:
    """Zero, in a type that counts far."""
    return torch.zeros((), dtype=torch.int64, device=device)
