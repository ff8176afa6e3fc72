"""A start from a teacher: the best copy of rank r, on the data, of what it changes of a weight.

The teacher has the layer's own shape: a copy of the model that was trained in full, or an adapter on the same base.
With D = W_T - W and the second moment of the inputs as the metric M, the nearest update of rank r in the outputs of the
layer, min ||(D - s B A) M^1/2||, is the leading part of D M^1/2 by Eckart and Young. Its left half alone, with A = 0,
is the published start of SAD-LoRA (arXiv:2607.04306).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafa.calibration.gradient import gradient_triplets, whitening
from lorafa.calibration.teacher import require_named
from lorafa.errors import CalibrationError
from lorafa.initializers.base import DegenerateError, InitResult, Stages, check_rank, initializer
from lorafa.initializers.kaiming import kaiming
from lorafa.initializers.stages import halves, require_finite
from lorafa.settings.checks import check_choice, check_number, check_text
from lorafa.spec import LayerSpec


@dataclass
class FromTeacherConfig:
    """Who the teacher is, and what of it A and B begin with."""

    teacher: str | None = None
    """The folder or Hub id of a model whose layers have the shapes of this one's, or of an adapter on the same base."""
    part: str = "full"
    """"full": s B A is the best copy of what the teacher changes; "left": B is its left half and A zero, so that the
    model starts as it is."""
    kappa: float = 1.0
    """What part of the change "full" begins with."""

    def __post_init__(self) -> None:
        check_text("teacher", self.teacher)
        check_choice("part", self.part, ("full", "left"))
        check_number("kappa", self.kappa, "a number > 0", 0)


def complete(settings: FromTeacherConfig) -> None:
    """Raises ConfigError where no teacher is named."""
    require_named(settings.teacher)


@initializer(
    needs=("second_moment", "teacher_change"),
    settings=FromTeacherConfig,
    complete=complete,
    keeps_function=False,
    stages=Stages(
        objective="product", target="W_T - W", metric="C^1/2 on the right", selection="leading r",
        split="sqrt, sqrt; B alone with part=left", scale="kappa / s", base="kept",
    ),
)  # fmt: skip
def from_teacher(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    """s B A = kappa [D M^1/2]_r M^-1/2; with part="left" A = 0 and B = U sqrt(S) of the same triplets.

    Where the teacher changes fewer than r directions, the rows of A that are left over are random and the columns of B
    zero: both zero would never train.

    Raises:
        ConfigError: r > min(out, in).
        CalibrationError: the statistics hold fewer than r directions.
        DegenerateError: the teacher has the layer's own weight, or one that is not finite.
    """
    check_rank(spec, weight)
    settings: FromTeacherConfig = spec.settings or FromTeacherConfig()
    found = gradient_triplets(stats, "teacher_change")
    what = "what its teacher changes"
    require_finite(found.S, what)
    if len(found.S) < spec.rank:
        raise CalibrationError(
            f"{spec.name}: the statistics hold {len(found.S)} directions of the teacher's change, and r = {spec.rank} "
            "takes as many as that. Collect them with a config of this rank or a larger one."
        )
    top = found.at(slice(0, spec.rank))
    if not bool(top.S[0] > 0):
        raise DegenerateError("its teacher has the same weight")
    nothing = top.S[0] * torch.finfo(top.S.dtype).eps * max(weight.shape[-2:]) >= top.S
    random = kaiming(weight, {}, spec).A.to(top.S)
    if settings.part == "left":
        zero = torch.zeros_like(random)
        left = halves(top)[1]
        return InitResult(torch.where(nothing[:, None], random, zero), torch.where(nothing, 0.0, left))
    A, B = halves(top, settings.kappa / spec.scaling)
    A = A @ whitening(stats["second_moment.C"]).to(A)
    return InitResult(torch.where(nothing[:, None], random, A), torch.where(nothing, 0.0, B))
