"""Activated LoRA: the update counts from an invocation sequence on (Greenewald et al. 2025, arXiv:2504.12397).

Before it a row has the activations of the base model to the bit, so that its keys and values can be shared with the
base and with other such adapters.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafa.adapter import Adapter, Stage, Variant
from lorafa.errors import BackendError, ConfigError, warn
from lorafa.numerics.fused import is_traced
from lorafa.settings.checks import is_int
from lorafa.spec import LayerSpec

_NOWHERE = torch.iinfo(torch.long).max

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class Invoked:
    """Where the update counts in one forward pass of a model."""

    starts: Tensor
    """First place it counts at, in tokens from the beginning of the prompt, (rows,); the largest integer: nowhere."""
    rows: int
    tokens: int
    first: int
    """The place of the first token of the pass, in tokens from the beginning of the prompt."""
    places: Tensor
    """Where it counts among the rows x tokens of the pass, (n,)."""
    _last: list[tuple[weakref.ref[Tensor], int, weakref.ref[Tensor]]] = field(default_factory=list, repr=False)
    """The last input, its count of changes in place, and what was chosen of it: held by nothing but its graph."""

    @classmethod
    def of(cls, starts: Tensor, tokens: int, first: int = 0) -> Self:
        """Where it counts in a pass over ``tokens`` places of each row, of which the first is place ``first``."""
        counts = torch.arange(first, first + tokens, device=starts.device) >= starts[:, None]
        return cls(starts, len(starts), tokens, first, counts.flatten().nonzero().flatten())

    def chosen(self, x: Tensor) -> Tensor:
        """The inputs (n, ...) at those places of x (rows, tokens, ...); layers that share an input share them."""
        counted = not x.is_inference()  # where no one counts changes in place, nothing is shared
        if self._last and counted:
            seen, version, choice = self._last[0]
            known, follows = choice(), x.requires_grad and torch.is_grad_enabled()
            if known is not None and seen() is x and version == x._version and known.requires_grad is follows:
                return known
        chosen = x.flatten(0, 1).index_select(0, self.places.to(x.device))
        self._last[:] = [(weakref.ref(x), x._version, weakref.ref(chosen))] if counted else []
        return chosen


class ALoRA(Variant):
    """The update inside, from the last occurrence of the invocation tokens in a row on, and nowhere in a row without.

    Positions count from the beginning of a row, so that padding on either side does no harm. ``generate`` goes by the
    prompt: beams and several answers a prompt go by the place in their own. A call that continues another by its keys
    and values has the invocation in tokens it does not see; ``alora_offsets`` then says where it is.
    """

    name = "alora"
    stage: ClassVar[Stage] = "gate"
    switch = "alora_invocation_tokens"
    hosts = frozenset({"linear", "embedding"})
    reads_call = True
    call_arguments = frozenset({"alora_offsets"})
    uniform = False
    takes_empty_ranks = True

    def __init__(self, tokens: Sequence[int], inner: Variant | None = None) -> None:
        super().__init__(inner)
        self.tokens = tuple(tokens)

    @classmethod
    def of(cls, config: Any, spec: LayerSpec, inner: Variant | None = None) -> Self:
        return cls(config.alora_invocation_tokens, inner)

    @property
    def stacks_start(self) -> bool:
        return self._inside.stacks_start

    @property
    def _inside(self) -> Variant:
        assert self.inner is not None
        return self.inner

    # ---- where it counts

    def fact(self, arguments: Mapping[str, Any]) -> Invoked | None:
        """Where the update counts; None where the call has no token ids and does not say.

        Args:
            arguments: ``input_ids`` (rows, tokens); ``alora_offsets`` if given, one number a row: how many places from
                the end of ``input_ids`` the update begins, None where it does not count.

        Raises:
            ConfigError: ``alora_offsets`` is not one number or None a row, or the token ids are no rows.
        """
        ids, offsets = arguments.get("input_ids"), arguments.get("alora_offsets")
        if ids is None:  # what generate calls its first argument
            ids = arguments.get("inputs")
        if ids is None and offsets is None:
            return None
        seen = ids if ids is not None else arguments.get("inputs_embeds")
        if seen is None:
            return None
        if seen.dim() < 2:
            raise ConfigError(
                f"alora_invocation_tokens are looked for in rows of token ids, (rows, tokens), found "
                f"{tuple(seen.shape)}. Pass input_ids[None] for a single row."
            )
        rows, tokens = seen.shape[:2]
        starts = self._found(seen) if offsets is None else _counted(offsets, rows, tokens).to(seen.device)
        invoked = Invoked.of(starts, tokens)
        if offsets is None and seen.numel() and not len(invoked.places):
            warn(
                f"alora_invocation_tokens={list(self.tokens)} is in no row of this call, so the adapter changes "
                "nothing in it. Put the invocation into the text, tokenized as in the config; where the call "
                "continues another by its keys and values, pass alora_offsets."
            )
        return invoked

    def step(self, fact: Invoked | None, arguments: Mapping[str, Any]) -> Invoked | None:
        """Where it counts in a pass over the tokens that come after those in the cache, for rows that may be copies."""
        seen = arguments.get("input_ids")
        if seen is None:
            seen = arguments.get("inputs_embeds")
        if fact is None or seen is None:
            return None
        cache = arguments.get("past_key_values")
        first = 0 if cache is None else int(cache.get_seq_length())
        copies = max(seen.shape[0] // max(fact.rows, 1), 1)  # beams and answers of a prompt lie side by side
        return Invoked.of(fact.starts.repeat_interleave(copies), seen.shape[1], first)

    def of_rows(self, fact: Invoked | None, index: Tensor) -> Invoked | None:
        if fact is None:
            return None
        return Invoked.of(fact.starts[index.to(fact.starts.device)], fact.tokens, fact.first)

    def counts_in(self, tokens: Sequence[int]) -> bool:
        return bool(self._found(torch.tensor([list(tokens)])) < _NOWHERE)

    def _found(self, ids: Tensor) -> Tensor:
        """Where the last occurrence of the invocation begins in each row of (rows, tokens), (rows,)."""
        size = len(self.tokens)
        if ids.shape[1] < size:
            return ids.new_full(ids.shape[:1], _NOWHERE, dtype=torch.long)
        wanted = torch.tensor(self.tokens, device=ids.device)
        begins = (ids.unfold(1, size, 1) == wanted).all(dim=-1)
        places = torch.arange(begins.shape[1], device=ids.device)
        last = torch.where(begins, places, -1).amax(dim=1)
        return torch.where(last < 0, _NOWHERE, last)

    # ---- the formula

    def delta_output(self, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
        """The change of the update inside at the places where it counts, and 0 elsewhere."""
        places, change = self._change(adapter, x, y)
        return _added_at(torch.zeros_like(y.flatten(0, 1)), places, change.to(y.dtype)).view_as(y)

    def fused(self, adapter: Adapter, x: Tensor) -> Tensor | None:
        """The output of the base, to which the change is added where it counts: in place, if that is a plain product.
        """
        dense = adapter.layer.dense_weight(x)
        if dense is None:
            return None
        y: Tensor = adapter.layer.base_output(x.reshape(-1, x.shape[-1]))  # no view, which autograd would copy
        places, change = self._change(adapter, x, y.view(*x.shape[:-1], y.shape[-1]))
        if not isinstance(dense[0], Tensor):  # codes may give a view, which cannot be changed
            y = y.clone()
        y = _added_at(y, places, change.to(y.dtype))
        return y.view(*x.shape[:-1], y.shape[-1])

    def _change(self, adapter: Adapter, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The places among rows x tokens where the update counts, (n,), and its change there, (n, out).

        Raises:
            BackendError: the call had no token ids, or this layer sees its inputs in another order.
        """
        invoked: Invoked | None = adapter.fact
        if invoked is None:
            raise BackendError(
                f"Adapter {adapter.name!r} counts from alora_invocation_tokens on, and the call had no input_ids in "
                "which to look for them. Pass input_ids, or alora_offsets beside inputs_embeds: for each row how many "
                "places from its end the invocation begins."
            )
        if y.dim() != 3 or tuple(y.shape[:2]) != (invoked.rows, invoked.tokens):
            raise BackendError(
                f"Adapter {adapter.name!r} counts from alora_invocation_tokens on, but "
                f"{adapter.layer.call.place_of(adapter.layer)} gets {tuple(x.shape)} where the model was called with "
                f"{invoked.rows} rows of {invoked.tokens} tokens, so which place is which is not known. Leave such "
                "layers out with exclude_modules."
            )
        places = invoked.places.to(x.device)
        there = y.flatten(0, 1).index_select(0, places)
        return places, self._inside.delta_output(adapter, invoked.chosen(x), there)


class _AddedAt(torch.autograd.Function):
    """y with rows of a change added, in place; torch's own index_add keeps the change for the backward pass."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, places: Tensor, change: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        ctx.save_for_backward(places)
        return y.index_add_(0, places, change)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:
        (places,) = ctx.saved_tensors
        return grad, None, grad.index_select(0, places) if ctx.needs_input_grad[2] else None


def _added_at(y: Tensor, places: Tensor, change: Tensor) -> Tensor:
    """y (rows, out), which nobody else holds, with ``change`` (n, out) added to its rows ``places`` (n,)."""
    if is_traced():
        return y.index_add(0, places, change)
    added: Tensor = _AddedAt.apply(y, places, change)  # type: ignore[no-untyped-call]
    return added


def _counted(offsets: Any, rows: int, tokens: int) -> Tensor:
    """The places that lie so many tokens from the end of a row, (rows,).

    Raises:
        ConfigError: not one whole number >= 0, or None, a row; 0 is None.
    """
    values = offsets.tolist() if isinstance(offsets, Tensor) else offsets
    whole = isinstance(values, (list, tuple)) and len(values) == rows
    if not whole or not all(v is None or (is_int(v) and v >= 0) for v in values):
        raise ConfigError(
            f"alora_offsets must have a whole number or None for each of the {rows} rows, found {offsets!r}. It says "
            "how many places from the end of a row the invocation begins."
        )
    return torch.tensor([max(tokens - v, 0) if v else _NOWHERE for v in values], dtype=torch.long)
