"""What a teacher of the same shapes changes of a weight, in the metric of the layer's inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorafa.calibration.base import Measured, Statistic
from lorafa.calibration.gradient import metric_root
from lorafa.errors import CalibrationError, ConfigError
from lorafa.numerics.linalg import float_matrix, leading_svd


def require_named(teacher: object) -> None:
    """Raises ConfigError where a start from a teacher has none."""
    if teacher is None:
        raise ConfigError(
            "A start from a teacher needs one. Pass init_config={'teacher': ...}, the folder or Hub id of a model of "
            "the same shapes, or of an adapter on the same base (init.teacher= for a run)."
        )


class Known(Statistic):
    """A statistic whose value is there already, for those that are made after it; it sees no data."""

    reads_data = False

    def __init__(self, layer: Measured, value: Mapping[str, Tensor]) -> None:
        super().__init__(layer)
        self.value = dict(value)

    def update(self, x: Tensor, d: Tensor | None) -> None:
        """It sees what others need the data for, and takes nothing of it."""

    def result(self) -> dict[str, Tensor]:
        return self.value


class TeacherChange(Statistic):
    """Result: the leading triplets of D M^1/2, ``U`` (out, k), ``S`` (k,), ``Vh`` (k, in), and its squared norm
    ``norm2`` (). D = W_T - W is the change, M the damped second moment of the inputs, as
    :func:`~lorafa.calibration.gradient.whitening` has it, and k = 4 r.

    One weight of the teacher is in memory at a time. Where nothing is changed all of them are zero.
    """

    reads_data = False
    after = ("second_moment",)

    def __init__(self, layer: Measured) -> None:
        super().__init__(layer)
        require_named(layer.change)
        self.moment: Tensor | None = None

    def start_pass(self, number: int, done: Mapping[str, Statistic]) -> None:
        self.moment = done["second_moment"].result()["C"]

    def update(self, x: Tensor, d: Tensor | None) -> None:
        """It sees what others need the data for, and takes nothing of it."""

    def result(self) -> dict[str, Tensor]:
        layer, C = self.layer, self.moment
        assert layer.change is not None
        if C is None:
            raise CalibrationError(f"{layer.name}: the metric of its inputs was not collected.")
        D = float_matrix(layer.change()).to(C)
        k = min(4 * layer.rank, layer.out, layer.in_)
        if not D.any() or not bool(torch.isfinite(D).all()) or not bool(torch.isfinite(C).all()):
            bad = 0.0 if not D.any() else torch.nan
            return {
                "U": D.new_zeros(layer.out, k), "S": D.new_full((k,), bad), "Vh": D.new_zeros(k, layer.in_),
                "norm2": D.new_tensor(bad),
            }  # fmt: skip
        inside = D @ metric_root(C)
        found = leading_svd(inside, k, torch.Generator().manual_seed(layer.options.seed))
        return {"U": found.U, "S": found.S, "Vh": found.Vh, "norm2": inside.square().sum()}
