"""What every optimizer here checks before it takes in a saved state."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lorafa.errors import CheckpointError


def check_state_shapes(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """A hook before `load_state_dict`: moments must have their parameter's shape, groups its number of parameters.

    Raises:
        CheckpointError: they do not; nothing was loaded.
    """
    saved, mine = state_dict["param_groups"], optimizer.param_groups
    sizes, expected = [len(group["params"]) for group in saved], [len(group["params"]) for group in mine]
    if sizes != expected:
        raise CheckpointError(
            f"The saved optimizer has groups of {sizes} parameters, this one of {expected}; nothing was loaded. Make "
            "the optimizer for the same model and adapters as the saved one."
        )
    parameters = [p for group in mine for p in group["params"]]
    for index, parameter in zip((i for group in saved for i in group["params"]), parameters, strict=True):
        for key, value in state_dict["state"].get(index, {}).items():
            if key.startswith("exp_avg") and isinstance(value, Tensor) and value.shape != parameter.shape:
                raise CheckpointError(
                    f"Parameter {index} has shape {tuple(parameter.shape)}, its saved {key} {tuple(value.shape)}; "
                    "nothing was loaded. The state is that of an adapter of another rank, or of another model."
                )
