"""The weight of the teacher beside the task, by the sizes of their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from lorafa.errors import CalibrationError, ConfigError
from lorafa.settings.checks import check_number

LEAST, MOST = 0.05, 20.0
"""A balanced weight is never outside of these."""
NOTHING = 1e-3
"""A teacher whose gradient is no larger than this share of the task's has nothing to say yet."""


def balanced_weight(task_norms: Sequence[float], align_norms: Sequence[float], rho: float = 0.5) -> float | None:
    """lambda = rho median ||G_task|| / median ||G_align||, within 0.05 and 20 (section 2.3 of the project's sheet).

    Args:
        task_norms: the norm of the gradient of the task's loss, layer by layer.
        align_norms: that of the divergence's, of the same layers, without any weight.
        rho: how large the teacher's share is to be beside the task's: 1 for equal ones.

    Returns:
        None where the teacher's median is at most 1e-3 of the task's, or both are zero: it says what the student says,
        as a teacher that is the student's own start does, and no weight can be read of it.

    Raises:
        ConfigError: ``rho`` is no number above 0, or the lists are empty or of unequal lengths.
        CalibrationError: a norm is not finite.
    """
    check_number("rho", rho, "a number above 0", 0.0)
    if not task_norms or len(task_norms) != len(align_norms):
        raise ConfigError(
            f"Gradients are balanced layer by layer, and there are norms of {len(task_norms)} layers for the task and "
            f"of {len(align_norms)} for the teacher. Pass both of the same layers, at least one."
        )
    for whose, norms in (("task", task_norms), ("teacher", align_norms)):
        bad = sum(not math.isfinite(norm) for norm in norms)
        if bad:
            raise CalibrationError(
                f"The gradients of {bad} of {len(norms)} layers are not finite for the {whose}, so the two cannot be "
                "balanced. Check the rows and the model's loss on them, or set the weight by a number."
            )
    task, align = median(task_norms), median(align_norms)
    if align <= NOTHING * task:
        return None
    return min(max(rho * task / align, LEAST), MOST)
