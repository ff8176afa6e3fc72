"""TrainableTokensWrapper: train single rows of an embedding (``trainable_token_indices``), and of a head tied to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.backends.base import replaced
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


class TrainableTokensWrapper(Wrapper):
    """An embedding (x: indices) or a head (x: (..., dim)) whose chosen rows are those of the active adapter."""

    _own = "token_adapter"
    wrapped_path = "token_adapter.base_layer"

    def __init__(self, base_layer: nn.Module, tied_to: TrainableTokensWrapper | None = None) -> None:
        super().__init__(base_layer)
        self.token_adapter: TokenAdapter = TokenAdapter(base_layer, None if tied_to is None else tied_to.token_adapter)
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

    def held(self) -> Iterable[str]:
        return self.token_adapter.trainable_tokens_delta

    def answering(self) -> nn.Module:
        return self.original_module

    def _table(self) -> Tensor:
        table: Tensor = self.original_module.weight  # type: ignore[assignment]
        return table

    def _current(self) -> tuple[list[int], Tensor] | None:
        """Indices and rows (tokens, dim) in force."""
        return None if self._disable_adapters else self._rows(self._active_adapter)

    def _rows(self, names: Sequence[str]) -> tuple[list[int], Tensor] | None:
        """Indices and rows (tokens, dim) of these adapters; of several the later ones win."""
        chosen: dict[int, Tensor] = {}
        adapter = self.token_adapter
        names = [name for name in names if name in adapter.trainable_tokens_delta]
        if len(names) == 1:
            return adapter.token_indices[names[0]], adapter.trainable_tokens_delta[names[0]]
        for name in names:
            chosen |= dict(zip(adapter.token_indices[name], adapter.trainable_tokens_delta[name], strict=True))
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
        current = self._current()
        if current is None:
            return y
        index = torch.tensor(current[0], device=y.device)
        rows = current[1].to(y.dtype)
        if x.is_floating_point():  # a head: the columns of the chosen tokens
            bias = self.bias
            columns = nn.functional.linear(x, rows, None if bias is None else bias[index])
            return y.index_copy(-1, index, columns)
        position = torch.full((self._table().shape[0],), -1, device=x.device)
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
