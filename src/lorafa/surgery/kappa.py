"""KappaTune: which layers to adapt, by the condition numbers of their weights (arXiv:2506.16289)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.backends import backend_of
from lorafa.backends.base import Backend
from lorafa.backends.offload import in_memory
from lorafa.backends.parameter import ParameterBackend
from lorafa.errors import BackendError, ConfigError, shorten, warn
from lorafa.numerics.linalg import working_dtype
from lorafa.settings.checks import check_int, check_number
from lorafa.surgery.carriers import kind_of_layer
from lorafa.surgery.walk import Place, places, pristine_of, require_module

Stored = Mapping[str, tuple[nn.Module, Backend]]
"""Full name of a layer or a parameter -> its module, and the back end that reads the weight."""
STACKS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
"""Ends of the names of parameters that hold the layers of a mixture's experts."""
_EPSILON = 1e-8


def condition_number(weight: Tensor) -> float:
    """The largest singular value of a matrix over the smallest one; of a stack (E, out, in) the mean over its matrices.

    1e-8 is added below, as in PEFT, so that a singular matrix has a large number instead of none. Of a matrix of zeros,
    which is singular whatever its largest value, it is infinite.
    """
    matrices = weight.detach() if weight.dim() > 2 else weight.detach()[None]
    numbers = []
    for matrix in matrices:
        values = torch.linalg.svdvals(matrix.to(working_dtype(matrix.dtype)))
        largest, smallest = float(values[0]), float(values[-1])
        numbers.append(largest / (smallest + _EPSILON) if largest > 0 else float("inf"))
    return sum(numbers) / len(numbers)


class KappaTuneSelector:
    """Ranks linear layers, and stacks of experts, by the condition numbers of their weights, lowest first.

    A weight with a low one has an even spectrum, and a change of it is said to disturb what the model knows the least.
    Numbers are computed when the first choice is made, and kept: one decomposition a layer, which takes minutes for
    large models. Quantized weights are those their codes stand for.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        """Look at ``model``, with or without adapters, and change nothing.

        Args:
            max_dim_size_to_analyze: leave out weights with more rows or columns; a warning names them.
            moe_param_suffixes: ends of the names of parameters (E, out, in) that hold experts; None: the usual ones.
            show_progress: a bar that is gone afterwards, where rich is installed.

        Raises:
            ConfigError: ``max_dim_size_to_analyze`` is no whole number above zero.
        """
        check_int("max_dim_size_to_analyze", max_dim_size_to_analyze, at_least=1)
        self.model = require_module(model)
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = STACKS if moe_param_suffixes is None else tuple(moe_param_suffixes)
        self.show_progress = show_progress
        self._found: tuple[dict[str, float], dict[str, float]] | None = None

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Full names of linear layers for ``target_modules``, best first; all of them if nothing is said.

        Args:
            top_p: this share of them, rounded down, but at least one.
            num_modules: so many, or all there are.
            threshold: those with a condition number of at most this.

        Raises:
            ConfigError: more than one of the three is given, or one is out of range.
            BackendError: a weight has no values (device meta), or holds nan or inf.
        """
        return _best(self._numbers()[0], top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """The same of stacks of experts, for ``target_parameters``; arguments as in :meth:`get_best_targets`."""
        return _best(self._numbers()[1], top_p, num_modules, threshold)

    def _numbers(self) -> tuple[dict[str, float], dict[str, float]]:
        """Condition numbers of linear layers, and of stacks of experts, by full names."""
        if self._found is None:
            every = _once(places(self.model))
            large: list[str] = []
            linear = dict(self._shown(self._readable(every), "linear layers", large))
            stacked = dict(self._shown(self._stacks(every), "stacks of experts", large))
            if large:
                warn(
                    f"{len(large)} weights have more than max_dim_size_to_analyze={self.max_dim_size_to_analyze} rows "
                    f"or columns and are no candidates: {shorten(large, 3)}."
                )
            self._found = linear, stacked
        return self._found

    def _readable(self, every: Iterable[tuple[str, nn.Module]]) -> Stored:
        found: dict[str, tuple[nn.Module, Backend]] = {}
        odd = []
        for name, module in every:
            kind, backend = kind_of_layer(module), backend_of(module)
            if kind is None or backend is None or not kind.is_linear:
                continue
            if backend.serves(module) is not None or backend.reads(module) is not None:
                odd.append(name)
            else:
                found[name] = (module, backend)
        if odd:
            warn(
                f"{len(odd)} linear layers compute with another weight than the one they store, or store it in a way "
                f"nobody knows, and are no candidates: {shorten(odd, 3)}."
            )
        return found

    def _stacks(self, every: Iterable[tuple[str, nn.Module]]) -> Stored:
        return {
            f"{name}.{key}": (module, ParameterBackend(key))
            for name, module in every
            for key, parameter in module._parameters.items()
            if parameter is not None and parameter.dim() == 3 and f".{name}.{key}".endswith(self.moe_param_suffixes)
        }

    def _number(self, name: str, weight: Tensor) -> float:
        if weight.is_meta or not bool(weight.isfinite().all()):
            why = "has no values (device meta)" if weight.is_meta else "holds nan or inf"
            raise BackendError(f"{name}: its weight {why}, so it has no condition number. Load the weights first.")
        return condition_number(weight)

    def _shown(self, found: Stored, what: str, large: list[str]) -> Iterator[tuple[str, float]]:
        """The condition number of each weight that is not too large, with a bar; ``large`` gets the other names."""
        bar: Any = None
        if self.show_progress and found:
            try:
                from rich.progress import Progress

                bar = Progress(transient=True)
            except ImportError:
                bar = None
        with nullcontext() if bar is None else bar:
            task = None if bar is None else bar.add_task(f"Condition numbers of {what}", total=len(found))
            for name, (module, backend) in found.items():
                if max(backend.full_shape(module)[-2:]) > self.max_dim_size_to_analyze:
                    large.append(name)
                else:
                    yield name, self._number(name, backend.weight(in_memory(module)))
                if bar is not None:
                    bar.advance(task)


def _once(found: Iterable[Place]) -> list[tuple[str, nn.Module]]:
    """Every module at the first of its names, as it is without adapters."""
    seen: dict[int, tuple[str, nn.Module]] = {}
    for place in found:
        seen.setdefault(id(place.module), (place.name, pristine_of(place.module)))
    return list(seen.values())


def _best(
    numbers: Mapping[str, float], top_p: float | None, num_modules: int | None, threshold: float | None
) -> list[str]:
    given = {"top_p": top_p, "num_modules": num_modules, "threshold": threshold}
    if len(said := [f"{name}={value}" for name, value in given.items() if value is not None]) > 1:
        raise ConfigError(f"{' and '.join(said)} choose by different rules, and only one can count. Pass one of them.")
    ranked = sorted(numbers, key=lambda name: numbers[name])
    if num_modules is not None:
        check_int("num_modules", num_modules, at_least=1)
        return ranked[:num_modules]
    if top_p is not None:
        check_number("top_p", top_p, "the share of layers to take, in (0, 1]", 0, 1, closed="]")
        return ranked[: max(1, int(len(ranked) * top_p))]
    if threshold is not None:
        check_number("threshold", threshold, "a number > 0", 0)
        return [name for name in ranked if numbers[name] <= threshold]
    return ranked


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """The share ``top_p`` of linear layers, and of stacks of experts, with the lowest condition numbers (KappaTune).

    Returns:
        ``target_modules`` and ``target_parameters``, as ``LoraConfig(**found)`` takes them; the second is None where
        the model has no experts in stacks.

    Raises:
        ConfigError, BackendError: as :class:`KappaTuneSelector` and its methods.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }
