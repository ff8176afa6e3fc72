"""What is trained beside the student: linear maps between the inner states of two models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafa.alignment.maps.proj import projection
from lorafa.alignment.said import Spoken
from lorafa.alignment.teachers.base import Teacher
from lorafa.backends.offload import device_of
from lorafa.errors import CheckpointError, ConfigError
from lorafa.models.head_loss import supervised_loss
from lorafa.models.modes import evaluating


def projections(model: nn.Module, teacher: Teacher, layers: tuple[int, ...]) -> dict[int, nn.Linear]:
    """A linear map for each of the layers, from the student's states there to the teacher's, on the student's device.

    The sizes are those that a few tokens have.
    """
    own = _sizes(model, layers)
    with teacher.running(model) as teaching:
        theirs = _sizes(teaching, layers)
    made = {}
    for layer in layers:
        (student, dtype), (goal, _) = own[layer], theirs[layer]
        made[layer] = projection(student, goal, torch.promote_types(dtype, torch.float32), seed=layer)
        made[layer].to(device_of(model))
    return made


def _sizes(model: nn.Module, layers: tuple[int, ...]) -> dict[int, tuple[int, torch.dtype]]:
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device_of(model))
    kept = Spoken(layers)
    with evaluating(model):
        supervised_loss(model, {"input_ids": tokens, "labels": tokens}, objective=kept, num_items=1)
    return {layer: (kept.inner[layer].shape[-1], kept.inner[layer].dtype) for layer in layers}


def require_trained(parameters: Iterable[nn.Parameter], optimizer: Optimizer | None) -> None:
    """Raises ConfigError where an optimizer does not move these parameters."""
    own = list(parameters)
    if not own or optimizer is None:
        return
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) not in moved for p in own):
        raise ConfigError(
            "The map between inner states is trained, and the optimizer does not have it. Make the optimizer of the "
            "student's parameters and of alignment.parameters()."
        )


def load_values(parameters: Iterable[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Give parameters the values that were kept.

    Raises:
        CheckpointError: they are others.
    """
    own = list(parameters)
    if [p.shape for p in own] != [value.shape for value in values]:
        raise CheckpointError(
            f"The checkpoint has {len(values)} linear maps between inner states, of other sizes or layers than the "
            f"{len(own)} here. Set align.map and align.map_layers as they were, and take the same teacher."
        )
    with torch.no_grad():
        for p, value in zip(own, values, strict=True):
            p.copy_(value)


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """No gradient arrives at these parameters inside the block."""
    own = list(parameters)
    try:
        for p in own:
            p.requires_grad_(False)
        yield
    finally:
        for p in own:
            p.requires_grad_(True)
