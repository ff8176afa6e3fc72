"""What data-aware starts read of a layer, collected over calibration batches, and rules for ranks: both by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafa.registry import Registry

if TYPE_CHECKING:
    from lorafa.calibration.base import Statistic
    from lorafa.calibration.ranking import Rule

STATISTICS: Registry[type[Statistic]] = Registry(
    "statistic",
    {
        "gradient": "lorafa.calibration.gradient:GradientSketch",
        "whitened_gradient": "lorafa.calibration.gradient:WhitenedGradientSketch",
        "second_moment": "lorafa.calibration.moments:SecondMoment",
        "exact_moment": "lorafa.calibration.moments:ExactMoment",
        "moment_sketch": "lorafa.calibration.moments:MomentSketch",
        "corda_moment": "lorafa.calibration.moments:CordaMoment",
        "principal": "lorafa.calibration.principal:IncrementalPCA",
        "output_moment": "lorafa.calibration.outputs:OutputMoment",
        "teacher_change": "lorafa.calibration.teacher:TeacherChange",
    },
)

RANK_RULES: Registry[Rule] = Registry(
    "rule",
    {
        "budget": "lorafa.calibration.rank_rules:BUDGET",
        "cross_validation": "lorafa.calibration.rank_rules:CROSS_VALIDATION",
        "energy": "lorafa.calibration.rank_rules:ENERGY",
        "stable_rank": "lorafa.calibration.rank_rules:STABLE_RANK",
        "entropy": "lorafa.calibration.rank_rules:ENTROPY",
        "importance": "lorafa.calibration.rank_rules:IMPORTANCE",
        "explained_variance": "lorafa.calibration.explained_variance:EXPLAINED_VARIANCE",
    },
)
