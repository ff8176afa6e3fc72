"""What the dual objective is made of, by name."""

from __future__ import annotations

from lorafa.alignment.entry import DivergenceEntry, MapEntry, TeacherEntry
from lorafa.registry import Registry

DIVERGENCES: Registry[DivergenceEntry] = Registry(
    "divergence",
    {
        "fkl": "lorafa.alignment.divergences.fkl:FKL",
        "js": "lorafa.alignment.divergences.js:JS",
        "logit_mse": "lorafa.alignment.divergences.logit_mse:LOGIT_MSE",
        "masked_target": "lorafa.alignment.divergences.masked_target:MASKED_TARGET",
        "rkl": "lorafa.alignment.divergences.rkl:RKL",
        "skew": "lorafa.alignment.divergences.skew:SKEW",
        "tv": "lorafa.alignment.divergences.tv:TV",
    },
)
"""Name -> how far the student's distribution over the next token is from the teacher's."""

MAPS: Registry[MapEntry] = Registry(
    "representation map",
    {
        "cka": "lorafa.alignment.maps.cka:CKA",
        "cos": "lorafa.alignment.maps.cos:COS",
        "functional": "lorafa.alignment.maps.functional:FUNCTIONAL",
        "gram": "lorafa.alignment.maps.gram:GRAM",
        "lens": "lorafa.alignment.maps.lens:LENS",
        "mse": "lorafa.alignment.maps.mse:MSE",
        "procrustes": "lorafa.alignment.maps.procrustes:PROCRUSTES",
        "proj": "lorafa.alignment.maps.proj:PROJ",
    },
)
"""Name -> how far the student's inner states are from the teacher's."""

TEACHERS: Registry[TeacherEntry] = Registry(
    "teacher",
    {
        "anchor": "lorafa.alignment.teachers.anchor:ANCHOR",
        "base": "lorafa.alignment.teachers.model_base:BASE",
        "ema": "lorafa.alignment.teachers.ema:EMA_OF_PRODUCTS",
        "snapshot": "lorafa.alignment.teachers.snapshot:SNAPSHOT",
    },
)
"""Name -> what the student is held close to, made of the student itself; any other model is one too."""
