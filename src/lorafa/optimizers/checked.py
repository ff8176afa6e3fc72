"""What the optimizers have in common: pairs are checked before a step, saved states before they are taken in."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lorafa.errors import AdapterError, BackendError, CheckpointError, ConfigError
from lorafa.numerics.linalg import working_dtype
from lorafa.optimizers.pairs import Pair, check_finite
from lorafa.settings.checks import check_betas, check_number, check_rate, found

_OF_ADAM = frozenset({"step", "exp_avg", "exp_avg_sq"})


class PairOptimizer(Optimizer, ABC):
    """An optimizer that knows its pairs; a subclass moves the parameters in :meth:`update`.

    It can be copied and pickled, best together with its model: its pairs hold their layers.

    Args:
        params: parameter groups.
        defaults: settings of groups that do not say otherwise.
        pairs: pairs whose factors are among ``params``; where A is frozen it may be missing there.
    """

    copied: ClassVar[tuple[str, ...]] = ("pairs",)
    """Attributes that go with a copy, besides torch's."""

    def __init__(self, params: Any, defaults: dict[str, Any], pairs: Sequence[Pair]) -> None:
        super().__init__(params, defaults)
        self.pairs = list(pairs)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; ``closure`` computes the loss and its gradients again, and the loss is returned.

        Raises:
            AdapterError: the adapters this optimizer was made for are not the active ones, or hold nan or inf.
            DivergedError: their gradients do, in optimizers that would lose more by that than a stock one.
            BackendError: a gradient is sparse.
            Nothing was changed in any case, unless the step itself takes a factor out of all bounds.
        """
        check_pairs(self, self.pairs)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_dense()
        with computing(self.pairs):
            self.update()
        return loss

    def _check_dense(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                    raise BackendError(
                        f"A parameter {tuple(parameter.shape)} has a sparse gradient, which {type(self).__name__} does "
                        "not take. Make its module with sparse=False. Nothing was changed."
                    )

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
                    dtype, layout = working_dtype(parameter.dtype), torch.contiguous_format
                    self.state[parameter][key] = value.to(parameter.device, dtype, copy=True, memory_format=layout)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return state | {name: getattr(self, name) for name in self.copied}


def check_adam_numbers(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raise a ConfigError where a number of Adam's is out of range."""
    check_rate("lr", lr)
    check_betas("betas", betas)
    check_number("eps", eps, "a number >= 0", 0, closed="[")
    check_number("weight_decay", weight_decay, "a number >= 0", 0, closed="[")


def check_stock(optimizer_cls: Any, settings: Mapping[str, Any]) -> None:
    """Raise a ConfigError where ``optimizer_cls`` cannot make an optimizer, or would not decay what is to be."""
    if not callable(optimizer_cls):
        raise ConfigError(f"optimizer_cls must be a class such as torch.optim.AdamW, found {found(optimizer_cls)}.")
    decay = settings.get("weight_decay", 0.0)
    check_number("weight_decay", decay, "a number >= 0", 0, closed="[")
    taken = inspect.signature(optimizer_cls).parameters
    if decay and "weight_decay" not in taken and all(one.kind is not one.VAR_KEYWORD for one in taken.values()):
        raise ConfigError(f"{name_of(optimizer_cls)} has no weight_decay. Leave it out, or use another optimizer.")


def name_of(optimizer_cls: Any) -> str:
    """The name of a class, or of what a functools.partial will call."""
    return str(getattr(getattr(optimizer_cls, "func", optimizer_cls), "__name__", optimizer_cls))


def check_pairs(optimizer: Optimizer, pairs: Iterable[Pair]) -> None:
    """Before a step: every adapter is the one the optimizer was made for, and both still hold the same parameters.

    Raises:
        AdapterError: it is not so; nothing was changed.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for pair in pairs:
        pair.check_active()
        if id(pair.B) not in held or not pair.is_in_place():
            raise AdapterError(
                f"{pair.path}: the factors of adapter {pair.name!r} are not the optimizer's parameters: they were "
                "replaced since it was made, as sharding does. Make the optimizer after that. Nothing was changed."
            )


def check_idle_pairs(optimizer: Optimizer, pairs: Iterable[Pair]) -> None:
    """As :func:`check_pairs`, for a stock optimizer, of pairs whose B has no gradient: the others were in use."""
    idle = [pair for pair in pairs if pair.B.grad is None]
    if idle:
        check_pairs(optimizer, idle)


@contextmanager
def computing(pairs: Iterable[Pair]) -> Iterator[None]:
    """Products keep their dtype, also under autocast; a decomposition that fails says which factors are not finite.

    Raises:
        AdapterError: as above.
    """
    try:
        with ExitStack() as precise:
            for device in {pair.B.device.type for pair in pairs}:
                precise.enter_context(torch.autocast(device, enabled=False))
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


_ADAMS = (PairOptimizer, torch.optim.Adam, torch.optim.AdamW)
"""Optimizers that keep a count and two moments of a parameter; others keep what they like."""


def check_state(
    optimizer: Optimizer, state_dict: dict[str, Any], shapes: Mapping[Tensor, tuple[int, ...]] | None = None
) -> None:
    """A hook before `load_state_dict`: the state must be one of the same algorithm, complete, and of these parameters.

    Groups must have as many parameters, moments their parameter's shape.

    Args:
        shapes: of the moments of parameters that do not have the parameter's own.

    Raises:
        CheckpointError: they do not; nothing was loaded.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise CheckpointError(
            f"An optimizer's state has 'state' and 'param_groups', this is {found(state_dict)[:80]}; nothing was "
            "loaded."
        )
    saved, mine = state_dict["param_groups"], optimizer.param_groups
    sizes, expected = [len(group["params"]) for group in saved], [len(group["params"]) for group in mine]
    if sizes != expected:
        raise CheckpointError(
            f"The saved optimizer has groups of {sizes} parameters, this one of {expected}; nothing was loaded. Make "
            "the optimizer for the same model and adapters as the saved one."
        )
    algorithms = [{group.get("algorithm", "a stock one") for group in groups} for groups in (saved, mine)]
    if algorithms[0] != algorithms[1]:
        raise CheckpointError(
            f"The saved optimizer is {'/'.join(sorted(algorithms[0]))}, this one is {'/'.join(sorted(algorithms[1]))}; "
            "nothing was loaded. Their moments are of different gradients: make the optimizer that was saved."
        )
    for index, parameter in _numbered(optimizer, state_dict):
        shape = tuple((shapes or {}).get(parameter, parameter.shape))
        missing = sorted(_OF_ADAM - state_dict["state"].get(index, {}).keys())
        if isinstance(optimizer, _ADAMS) and 0 < len(missing) < len(_OF_ADAM):
            raise CheckpointError(
                f"The saved state of parameter {index} lacks {' and '.join(missing)}; nothing was loaded. The file is "
                "incomplete: take an earlier one."
            )
        for key, value in state_dict["state"].get(index, {}).items():
            if key.startswith("exp_avg") and isinstance(value, Tensor) and tuple(value.shape) != shape:
                raise CheckpointError(
                    f"Parameter {index} needs moments of shape {shape}, its saved {key} has {tuple(value.shape)}; "
                    "nothing was loaded. The state is that of an adapter of another rank, of another model, or of "
                    "another form of the optimizer."
                )
