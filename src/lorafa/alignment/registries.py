"""What the dual objective is made of, by name."""

from __future__ import annotations

from collections.abc import Callable

from lorafa.alignment.divergences.base import Divergence
from lorafa.alignment.maps.base import RepresentationMap
from lorafa.alignment.teachers.base import Teacher
from lorafa.registry import Registry

DIVERGENCES: Registry[type[Divergence]] = Registry(
    "divergence",
    {
        "fkl": "lorafa.alignment.divergences.fkl:ForwardKL",
        "js": "lorafa.alignment.divergences.js:JensenShannon",
        "logit_mse": "lorafa.alignment.divergences.logit_mse:LogitMSE",
        "masked_target": "lorafa.alignment.divergences.masked_target:MaskedTarget",
        "rkl": "lorafa.alignment.divergences.rkl:ReverseKL",
        "skew": "lorafa.alignment.divergences.skew:SkewKL",
        "tv": "lorafa.alignment.divergences.tv:TotalVariation",
    },
)
"""Name -> how far the student's distribution over the next token is from the teacher's."""

MAPS: Registry[type[RepresentationMap]] = Registry(
    "representation map",
    {
        "cka": "lorafa.alignment.maps.cka:CKA",
        "cos": "lorafa.alignment.maps.cos:Cosine",
        "functional": "lorafa.alignment.maps.functional:Functional",
        "gram": "lorafa.alignment.maps.gram:Gram",
        "lens": "lorafa.alignment.maps.lens:Lens",
        "mse": "lorafa.alignment.maps.mse:MSE",
        "procrustes": "lorafa.alignment.maps.procrustes:Procrustes",
    },
)
"""Name -> how far the student's inner states are from the teacher's."""

TEACHERS: Registry[Callable[..., Teacher]] = Registry(
    "teacher",
    {
        "anchor": "lorafa.alignment.teachers.anchor:Anchor",
        "base": "lorafa.alignment.teachers.model_base:Base",
        "ema": "lorafa.alignment.teachers.ema:EMA",
        "external": "lorafa.alignment.teachers.external:External",
        "snapshot": "lorafa.alignment.teachers.snapshot:Snapshot",
    },
)
"""Name -> what the student is held close to."""
