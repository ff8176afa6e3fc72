"""TrainableTokensWrapper: train single rows of an embedding (``trainable_token_indices``), and of a head tied to it."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.backends.base import replaced
from lorafa.backends.offload import in_memory, value_of, weight_of
from lorafa.errors import shorten
from lorafa.layers.mixed import require_rows
from lorafa.layers.own_modules import require_kept
from lorafa.layers.parts import Stored
from lorafa.layers.wrapper import Wrapper


class TokenAdapter(nn.Module):
    """For each adapter, new rows (tokens, dim) that stand in for the rows ``token_indices`` of the base table."""

    def __init__(self, base_layer: nn.Module, tied_to: TokenAdapter | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.token_indices: dict[str, list[int]] = {} if tied_to is None else tied_to.token_indices
        self.trainable_tokens_delta: nn.ParameterDict = (
            nn.ParameterDict() if tied_to is None else tied_to.trainable_tokens_delta
        )
        self._wrapper: tuple[TrainableTokensWrapper, ...] = ()  # no child: it is around this module

    # Libraries that know PEFT's layers tell this module, and not the wrapper, which adapters count.

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that count here, together."""
        return self._wrapper[0].active_adapters

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        """Whether none counts for now."""
        return self._wrapper[0].disable_adapters

    @property
    def merged(self) -> bool:
        """False: rows are chosen in each call."""
        return False

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make exactly these adapters count, and train (unless ``inference_mode``)."""
        self._wrapper[0].set_adapter(adapter_names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Let the active adapters count, or the base's rows alone."""
        self._wrapper[0].enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter and its rows."""
        self._wrapper[0].detach_adapter(adapter_name)


class TrainableTokensWrapper(Wrapper):
    """An embedding (x: indices) or a head (x: (..., dim)) whose chosen rows are those of the active adapter."""

    _own = "token_adapter"
    wrapped_path = "token_adapter.base_layer"
    peft_name = "TrainableTokensLayer"

    def __init__(self, base_layer: nn.Module, tied_to: TrainableTokensWrapper | None = None) -> None:
        super().__init__(base_layer)
        self.token_adapter: TokenAdapter = TokenAdapter(base_layer, None if tied_to is None else tied_to.token_adapter)
        self.token_adapter._wrapper = (self,)
        self.is_tied = tied_to is not None

    @property
    def original_module(self) -> nn.Module:
        return self.token_adapter.base_layer

    def attach(self, name: str, indices: Sequence[int]) -> None:
        """Start the rows ``indices`` of adapter ``name`` from the base table."""
        if self.is_tied:
            return
        rows = self._table()[list(indices)].detach().clone()
        self.token_adapter.token_indices[name] = list(indices)
        self.token_adapter.trainable_tokens_delta[name] = nn.Parameter(rows)

    def forget(self, name: str) -> None:
        if name in self.token_adapter.trainable_tokens_delta:
            del self.token_adapter.trainable_tokens_delta[name]
            del self.token_adapter.token_indices[name]

    def stored(self, name: str) -> Iterator[Stored]:
        rows, key = self.token_adapter.trainable_tokens_delta, "token_adapter.trainable_tokens_delta"
        if name in rows and not self.is_tied:
            yield Stored(key, f"{key}.{name}", rows[name])

    def held(self) -> Collection[str]:
        return list(self.token_adapter.trainable_tokens_delta)

    def tensors_of(self, name: str) -> list[Tensor]:
        """The rows, which of tied tables one alone stores."""
        return [self.token_adapter.trainable_tokens_delta[name]]

    def rows_from(self, names: Sequence[str]) -> Hashable | None:
        """The base table, and the rows in its place."""
        if self._rows(names) is None:
            return None
        return id(self.original_module.weight), id(self.token_adapter.token_indices), *names

    def wanted_twice(self, one: str, other: str, *, trains: bool) -> str | None:
        """Rows that both have, unless they are equal and stay so."""
        indices, rows = self.token_adapter.token_indices, in_memory(self.token_adapter.trainable_tokens_delta)
        mine, others = (dict(zip(indices[n], rows[n], strict=True)) for n in (one, other))
        both = [i for i in mine if i in others]
        different = both if trains else [i for i in both if not torch.equal(mine[i], others[i])]
        return f"values for rows {shorten(map(str, different))} (trainable_token_indices)" if different else None

    def answering(self) -> nn.Module:
        return self.original_module

    def _table(self) -> Tensor:
        return weight_of(self.original_module)

    @property
    def table_size(self) -> int:
        """The number of rows of the whole table."""
        table: Tensor = self.original_module.weight  # type: ignore[assignment]
        return table.shape[0]

    def _current(self) -> tuple[list[int], Tensor] | None:
        """Indices and rows (tokens, dim) in force."""
        return self._rows(self.in_force())

    def _rows(self, names: Sequence[str]) -> tuple[list[int], Tensor] | None:
        """Indices and rows (tokens, dim) of these adapters; a row that several have is equal in all of them."""
        chosen: dict[int, Tensor] = {}
        adapter = self.token_adapter
        rows = in_memory(adapter.trainable_tokens_delta)
        names = [name for name in names if name in rows]
        if len(names) == 1:
            return adapter.token_indices[names[0]], rows[names[0]]
        for name in names:
            chosen |= dict(zip(adapter.token_indices[name], rows[name], strict=True))
        return (list(chosen), torch.stack(list(chosen.values()))) if chosen else None

    @property
    def weight(self) -> Tensor:
        """The whole table with the rows in force."""
        return self._table_with(self._current())

    def _table_with(self, rows: tuple[list[int], Tensor] | None) -> Tensor:
        if rows is None:
            return self._table()
        index = torch.tensor(rows[0], device=self._table().device)
        return self._table().index_copy(0, index, rows[1].to(self._table().dtype))

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.original_module, "bias", None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.original_module(x, *args, **kwargs)
        mixing = self.mixing()
        if mixing is None:
            return self._replaced(x, y)
        if not self.is_in(mixing):
            return y
        require_rows(self, self.call, mixing, x)
        layout, outputs = mixing.layout(x.shape[0], x.device, sort=False), []
        for part in layout.parts:
            with self.call.looking_at(part):
                outputs.append(self._replaced(x[part.rows], y[part.rows]))
        return torch.cat(outputs)

    def _replaced(self, x: Tensor, y: Tensor) -> Tensor:
        """The output y of the wrapped module for x, with what the rows in force make of it."""
        current = self._current()
        if current is None:
            return y
        if self.training and torch.is_grad_enabled():
            require_kept(", ".join(self.in_force()), self.token_adapter.trainable_tokens_delta)
        index = torch.tensor(current[0], device=y.device)
        x, rows = x.to(y.device), current[1].to(y)
        if x.is_floating_point():  # a head: the columns of the chosen tokens
            bias = value_of(self.original_module, self.bias)
            columns = nn.functional.linear(x, rows, None if bias is None else bias[index])
            return y.index_copy(-1, index, columns)
        position = torch.full((self.table_size,), -1, device=x.device)
        position[index] = torch.arange(len(index), device=x.device)
        chosen = position[x]
        scale = getattr(self.original_module, "embed_scale", None)
        rows = rows if scale is None else rows * scale
        return torch.where((chosen >= 0)[..., None], nn.functional.embedding(chosen.clamp_min(0), rows), y)

    @torch.no_grad()
    def unwrapped(self, names: Sequence[str]) -> nn.Module:
        """The wrapped module, or one like it with the rows of these adapters in a new weight."""
        rows = self._rows(names)
        return self.original_module if rows is None else replaced(self.original_module, weight=self._table_with(rows))
