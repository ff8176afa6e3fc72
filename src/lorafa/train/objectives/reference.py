"""The reference of a preference training: the model with what is trained as it was where the training began."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.alignment.teachers.base import copied, exchanged
from lorafa.errors import CheckpointError
from lorafa.storage.tensors import read_tensors, write_tensors
from lorafa.surgery.walk import uncompiled_name

STATE = "reference.safetensors"
"""The file of a checkpoint that has the values of the reference."""


class Reference(nn.Module):
    """A model that is called as TRL calls its reference, and is the policy with other values of all that is trained.

    The base is shared. The values are copies made when this is: those of an adapter that is trained on, or of a new
    one. Its modules are in eval mode, so that dropout and noise do not make it another model with each call.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self._policy = [policy]  # no module of this one: nothing of it is moved, counted or saved twice
        self.values: dict[str, Tensor] = copied(policy)

    @property
    def config(self) -> Any:
        """The config of the model."""
        return self.policy.config

    @property
    def policy(self) -> Any:
        """The model that is trained."""
        return self._policy[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the policy would have said at the start; TRL replaces ``forward`` of its models, and this goes by the
        policy's."""
        modes = {module: module.training for module in self.policy.modules()}
        with exchanged(self._parameters_of_policy(), self.values):
            self.policy.eval()
            try:
                return self.policy(*args, **kwargs)
            finally:
                for module, mode in modes.items():
                    module.training = mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As a call."""
        return self(*args, **kwargs)

    def save(self, folder: Path) -> None:
        """Keep the values beside a checkpoint."""
        write_tensors(folder / STATE, self.values)

    def load(self, folder: Path) -> None:
        """Go on with the values of a checkpoint.

        Raises:
            CheckpointError: it has none, or those of other parameters.
        """
        path = folder / STATE
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no {STATE}: it was made by another objective, and cannot be continued with this one."
            )
        kept, _ = read_tensors(path)
        if _shapes(kept) != _shapes(self.values):
            raise CheckpointError(f"{path} has values of other parameters than are trained here.")
        self.values = {name: value.to(self.values[name]) for name, value in kept.items()}

    def _parameters_of_policy(self) -> dict[str, nn.Parameter]:
        """All parameters: an optimizer may have frozen some that were trained when the values were copied."""
        return {uncompiled_name(name): parameter for name, parameter in self.policy.named_parameters()}


def _shapes(values: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in values.items()}
