"""What data-aware starts read of a layer, collected over calibration batches: statistics by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafa.registry import Registry

if TYPE_CHECKING:
    from lorafa.calibration.base import Statistic

STATISTICS: Registry[type[Statistic]] = Registry(
    "statistic",
    {
        "gradient": "lorafa.calibration.gradient:GradientSketch",
        "whitened_gradient": "lorafa.calibration.gradient:WhitenedGradientSketch",
        "second_moment": "lorafa.calibration.moments:SecondMoment",
        "moment_sketch": "lorafa.calibration.moments:MomentSketch",
        "corda_moment": "lorafa.calibration.moments:CordaMoment",
        "principal": "lorafa.calibration.principal:IncrementalPCA",
    },
)
