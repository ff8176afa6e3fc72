"""What the optimizers have in common: pairs are checked before a step, saved states before they are taken in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lorafa.adapter import working_dtype
from lorafa.checks import check_number
from lorafa.errors import AdapterError, CheckpointError
from lorafa.optimizers.pairs import Pair, check_finite


class PairOptimizer(Optimizer, ABC):
    """An optimizer that knows its pairs; a subclass moves the parameters in :meth:`update`.

    It can be copied and pickled, best together with its model: its pairs hold their layers.

    Args:
        params: parameter groups.
        defaults: settings of groups that do not say otherwise.
        pairs: pairs whose factors are among ``params``; where A is frozen it may be missing there.
    """

    own: ClassVar[tuple[str, ...]] = ("pairs",)
    """Attributes that go with a copy, besides torch's."""

    def __init__(self, params: Any, defaults: dict[str, Any], pairs: Sequence[Pair]) -> None:
        super().__init__(params, defaults)
        self.pairs = list(pairs)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; ``closure`` computes the loss and its gradients again, and the loss is returned.

        Raises:
            AdapterError: the adapters this optimizer was made for are not the active ones, or hold nan or inf.
        """
        check_pairs(self, self.pairs)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with explained(self.pairs):
            self.update()
        return loss

    @abstractmethod
    def update(self) -> None:
        """Move every parameter that has a gradient."""

    def moment_shapes(self) -> Mapping[Tensor, tuple[int, ...]]:
        """Shapes of the moments of parameters that do not have the parameter's own."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but moments keep their own dtype where the parameter's is a half one.

        Raises:
            CheckpointError: the state is not one of this optimizer; nothing was loaded.
        """
        check_state(self, state_dict, self.moment_shapes())
        super().load_state_dict(state_dict)
        for index, parameter in _numbered(self, state_dict):
            for key, value in state_dict["state"].get(index, {}).items():
                if key.startswith("exp_avg"):
                    dtype, layout = working_dtype(value.dtype), torch.contiguous_format
                    self.state[parameter][key] = value.to(parameter.device, dtype, copy=True, memory_format=layout)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return state | {name: getattr(self, name) for name in self.own}


def check_adam_numbers(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raise a ConfigError where a number of Adam's is out of range."""
    check_number("lr", lr, "a number >= 0", 0, closed="[")
    for beta in betas:
        check_number("betas", beta, "two numbers in [0, 1)", 0, 1, closed="[")
    check_number("eps", eps, "a number >= 0", 0, closed="[")
    check_number("weight_decay", weight_decay, "a number >= 0", 0, closed="[")


def check_pairs(optimizer: Optimizer, pairs: Iterable[Pair]) -> None:
    """Before a step: every adapter is the one the optimizer was made for, and the optimizer still holds its B.

    Raises:
        AdapterError: it is not so; nothing was changed.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for pair in pairs:
        pair.check_active()
        if id(pair.B) not in held:
            raise AdapterError(
                f"{pair.path}: B of adapter {pair.name!r} is not among the optimizer's parameters: they were replaced "
                "since it was made, as sharding does. Make the optimizer after that. Nothing was changed."
            )


@contextmanager
def explained(pairs: Iterable[Pair]) -> Iterator[None]:
    """A decomposition that fails on factors which are not finite says which ones those are.

    Raises:
        AdapterError: as above.
    """
    try:
        yield
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        for pair in pairs:
            check_finite(pair)
        raise


def _numbered(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> Iterator[tuple[int, Tensor]]:
    """The parameters of an optimizer with the numbers they have in a saved state of it."""
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    mine = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return zip(saved, mine, strict=True)


def check_state(
    optimizer: Optimizer, state_dict: dict[str, Any], shapes: Mapping[Tensor, tuple[int, ...]] | None = None
) -> None:
    """A hook before `load_state_dict`: groups must have their number of parameters, moments their parameter's shape.

    Args:
        shapes: of the moments of parameters that do not have the parameter's own.

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
    algorithms = [{str(group.get("algorithm")) for group in groups} for groups in (saved, mine)]
    if algorithms[0] != algorithms[1]:
        raise CheckpointError(
            f"The saved optimizer has algorithm={'/'.join(sorted(algorithms[0]))}, this one "
            f"{'/'.join(sorted(algorithms[1]))}; nothing was loaded. Their moments belong to different bases of B: "
            "make the optimizer with the saved one's algorithm."
        )
    for index, parameter in _numbered(optimizer, state_dict):
        shape = tuple((shapes or {}).get(parameter, parameter.shape))
        for key, value in state_dict["state"].get(index, {}).items():
            if key.startswith("exp_avg") and isinstance(value, Tensor) and tuple(value.shape) != shape:
                raise CheckpointError(
                    f"Parameter {index} needs moments of shape {shape}, its saved {key} has {tuple(value.shape)}; "
                    "nothing was loaded. The state is that of an adapter of another rank, of another model, or of "
                    "another form of the optimizer."
                )
