"""What a teacher takes beside a training without one: states of the student that are kept, and the joint loss."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from lorafa.alignment.alignment import Alignment
from lorafa.alignment.registries import TEACHERS
from lorafa.costs.untouched import Untouched
from lorafa.models.kinds.causal import CAUSAL
from lorafa.train.settings.align import EXTERNAL, AlignConfig
from lorafa.train.settings.model import ModelConfig


def model_of(align: AlignConfig) -> ModelConfig | None:
    """The model that teaches, as settings of one; None where the teacher is made of the student, or there is none."""
    if not align.teaches or align.name != EXTERNAL:
        return None
    return ModelConfig(
        name=str(align.teacher), dtype=align.dtype, kind=CAUSAL.name, trust_remote_code=align.trust_remote_code
    )


def copied_bytes(align: AlignConfig, trained: int, state: int) -> int:
    """Bytes of the states of the student that are kept: by its teacher, and by a cyclic schedule to come back to.

    Args:
        trained: bytes of what is trained.
        state: bytes of the optimizer's state.
    """
    if not align.teaches:
        return 0
    own = {} if align.own is None else asdict(align.own)
    copies = 0 if align.name == EXTERNAL else TEACHERS.get(align.name)(**own).copies
    return copies * trained + (0 if align.schedule == "constant" else trained + state)


def alignment_of(align: AlignConfig, model: nn.Module, teacher: nn.Module | None) -> Alignment | None:
    """The alignment of models without numbers, as a step of a phase of the teacher has it; None without a teacher.

    What it keeps is not a part of what is counted: :func:`copied_bytes` has that.

    Raises:
        LoraError: as that of the training.
    """
    if not align.teaches:
        return None
    settings: dict[str, Any] = {"divergence": align.divergence, "map": align.map, "map_weight": align.map_weight}
    layers = None if align.map_layers is None else tuple(align.map_layers)
    with Untouched():
        return Alignment(model, teacher or align.name, weight=1.0, map_layers=layers, **settings)
