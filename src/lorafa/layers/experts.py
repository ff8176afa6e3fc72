"""LoraExperts: adapters on a bare parameter of a module (``target_parameters``), a matrix or a stack of experts.

The module computes with its parameter in ways of its own (batched, grouped, routed), so the updated parameter stands in
for the length of a forward pass. Several parameters of one module make nested layers, as in PEFT's files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lorafa.backends.base import Backend
from lorafa.backends.parameter import ParameterBackend
from lorafa.context import Rows
from lorafa.errors import ConfigError
from lorafa.layers.base import LoraLayer
from lorafa.layers.mixed import by_parts
from lorafa.layers.weights import call_with, require_in_memory, updated_tensors

if TYPE_CHECKING:
    from typing_extensions import Self


class LoraExperts(LoraLayer):
    """A is stored as (E r, in), expert by expert; B as (out, r E), the expert running fastest (PEFT's layout)."""

    kind = "experts"
    peft_name = "lora.ParamWrapper"
    changes_weight = True
    nests = True
    parameter_name: str
    takes_dropout = False
    takes_bias = False

    def __init__(self, base_layer: nn.Module, parameter_name: str) -> None:
        self.parameter_name = parameter_name
        super().__init__(base_layer)
        self.position = list(self.get_base_layer()._parameters).index(parameter_name)
        self._kept: tuple[nn.Parameter, ...] = ()  # the pristine parameter while a merged one stands in its place
        if self._parameter().dim() == 3:  # of a matrix the module may have its own word, as a router has
            self.num_experts = self._parameter().shape[0]

    @classmethod
    def around(cls, base_layer: nn.Module, parameter_name: str | None) -> Self:
        assert parameter_name is not None  # a back end of whole layers never names this kind
        return cls(base_layer, parameter_name)

    @classmethod
    def check(cls, name: str, base: nn.Module, rank: int, *, bias: bool, dropout: float) -> None:
        if dropout:
            raise ConfigError(
                f"{name}: lora_dropout={dropout} cannot act on a bare parameter, which has no input of its "
                "own. Set lora_dropout=0, or leave it out: of target_parameters, or where 'all-linear' takes it in by "
                "exclude_modules."
            )
        require_in_memory(name, base)
        super().check(name, base, rank, bias=bias, dropout=dropout)

    def _parameter(self) -> Tensor:
        return ParameterBackend(self.parameter_name).parameter(self.get_base_layer())

    @property
    def backend(self) -> Backend:
        return ParameterBackend(self.parameter_name)

    @property
    def weight(self) -> Tensor:
        return self._parameter()

    def stored_A(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, matrix.shape[-1])

    def stored_B(self, matrix: Tensor) -> Tensor:
        return matrix if matrix.dim() == 2 else matrix.permute(1, 2, 0).reshape(matrix.shape[1], -1)

    def matrix_A(self, stored: Tensor) -> Tensor:
        return stored if self._parameter().dim() == 2 else stored.view(self.num_experts, -1, stored.shape[-1])

    def matrix_B(self, stored: Tensor) -> Tensor:
        if self._parameter().dim() == 2:
            return stored
        return stored.view(stored.shape[0], -1, self.num_experts).permute(2, 0, 1)

    def factor_bias(self, name: str) -> Tensor | None:
        return None

    # A merged parameter takes the place of the pristine one in the module itself: the layers of other parameters of
    # the same module wrap that module too, so a second module cannot stand in for it.

    def base_weight(self) -> Tensor:
        stored = self._kept[0] if self._kept else self._parameter()
        return ParameterBackend(self.parameter_name).to_matrix(self.get_base_layer(), stored)

    def merged_parameters(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        for kept in self._kept:
            yield self.get_base_layer()._parameters[self.parameter_name], kept  # type: ignore[misc]

    def merged_base(self, names: Sequence[str]) -> nn.Module:
        require_in_memory(type(self).__name__, self.get_base_layer())
        return super().merged_base(names)

    def put_merged(self, base: nn.Module, names: Sequence[str]) -> None:
        parameters = self.get_base_layer()._parameters
        if not self._kept:
            self._kept = (parameters[self.parameter_name],)  # type: ignore[assignment]
        parameters[self.parameter_name] = base._parameters[self.parameter_name]
        self.merged_adapters = list(names)

    def unmerge(self) -> None:
        if self._kept:
            self.get_base_layer()._parameters[self.parameter_name] = self._kept[0]
            self._kept, self.merged_adapters = (), []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for kept in self._kept:
            kept.data = fn(kept.data)
        super()._apply(fn, recurse)
        return self

    def mixed_forward(self, rows: Rows, *args: Any, **kwargs: Any) -> Any:
        """The module run for each choice of adapters, on its rows or tokens alone."""
        return by_parts(self, rows, self.forward, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = self.mixing()
        if rows is not None and self.is_in(rows):
            return self.mixed_forward(rows, *args, **kwargs)
        layer, depth = self.base_layer, ""
        while isinstance(layer, LoraLayer):
            layer, depth = layer.base_layer, depth + "base_layer."
        name = depth + self.parameter_name
        if self._disable_adapters and self._kept:
            return call_with(self.base_layer, {name: self._kept[0]}, args, kwargs)
        if not self.counting():
            return self.base_layer(*args, **kwargs)
        return call_with(self.base_layer, updated_tensors(self, name), args, kwargs)
