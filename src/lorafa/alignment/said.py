"""What a teacher has said of a batch: states before its head, of which logits are made chunk by chunk, or letters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from lorafa.alignment.divergences.base import Divergence
from lorafa.alignment.divergences.letters import Letters
from lorafa.alignment.maps.base import Look, on_shared
from lorafa.errors import ConfigError
from lorafa.models.head_loss import HiddenStates, LogitTransform
from lorafa.models.positions import Positions

Found = tuple[Tensor, Tensor | None]
"""The divergence (n,), and its gradient with respect to the student's logits where one is wanted."""


class Said(Protocol):
    """What a teacher says at the supervised positions of a batch."""

    @property
    def inner(self) -> Mapping[int, Tensor]:
        """(positions, size) after so many layers, those that were asked for."""

    def __len__(self) -> int:
        """The number of positions."""

    def begin(self, start: int, end: int) -> None:
        """The next calls are of positions ``start`` to ``end``."""

    def compared(self, of: Divergence, own: Tensor, gold: Tensor, first: int, wants_gradient: bool) -> Found:
        """The divergence from it at positions from ``first`` on.

        Args:
            own: the student's logits (n, vocabulary), not to be changed.
            gold: the tokens that come next, (n,).
        """

    def look(self, layer: int, norm: nn.Module | None) -> Look:
        """What the teacher would say from its states after a layer, which its head reads through a norm."""


class Spoken(Positions):
    """What a teacher that has run says: its logits are made of states before its head, some positions at a time."""

    def __init__(self, layers: tuple[int, ...] = ()) -> None:
        super().__init__(layers)
        self._start, self._logits = 0, torch.empty(0)
        self._cast: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, states: HiddenStates, targets: Tensor, chunk_tokens: int | None) -> tuple[Tensor, int]:
        found, device = super().__call__(states, targets, chunk_tokens), self.rows.device.type
        if torch.is_autocast_enabled(device):  # logits are rounded as the student's: equal states have no divergence
            dtype = torch.get_autocast_dtype(device)
            weight, bias = _of(self.head)
            self._cast = weight.to(dtype), None if bias is None else bias.to(dtype)
        return found

    def begin(self, start: int, end: int) -> None:
        weight, bias = self._cast or _of(self.head)
        self._logits = nn.functional.linear(self.rows[start:end].to(weight.dtype), weight, bias)
        self._start = start

    def compared(self, of: Divergence, own: Tensor, gold: Tensor, first: int, wants_gradient: bool) -> Found:
        at = first - self._start
        theirs = self._logits[at : at + len(gold)].to(device=own.device, dtype=own.dtype)
        theirs = self.transform.apply_(theirs)
        if theirs.shape[-1] != own.shape[-1]:
            theirs, own = on_shared(theirs, own)
        if wants_gradient:
            return of.with_gradient(own.clone(), theirs, gold)
        return of(own, theirs, gold), None

    def look(self, layer: int, norm: nn.Module | None) -> Look:
        return look(self.head, self.transform, None if layer == self.depth else norm)


class Told:
    """What was kept of a teacher, which need not run any more."""

    inner: Mapping[int, Tensor] = {}

    def __init__(self, letters: Letters, vocabulary: int | None = None) -> None:
        """``vocabulary`` is the number of tokens that the letters are of; None: of as many as the student has."""
        self.letters, self.vocabulary = letters, vocabulary

    def __len__(self) -> int:
        return len(self.letters)

    def begin(self, start: int, end: int) -> None: ...

    def compared(self, of: Divergence, own: Tensor, gold: Tensor, first: int, wants_gradient: bool) -> Found:
        theirs = self.letters[first : first + len(gold)].to(own.device, own.dtype)
        own = own[:, : self.vocabulary]
        if wants_gradient:
            return of.of_letters_with_gradient(own, theirs, gold)
        return of.of_letters(own, theirs, gold), None

    def look(self, layer: int, norm: nn.Module | None) -> Look:
        raise ConfigError("A cache keeps no inner states of the teacher. Take align.map=null, or no cache.")


def look(head: nn.Linear, transform: LogitTransform, norm: nn.Module | None) -> Look:
    """The logits that a head makes of inner states; those after the last layer have come through the norm already."""

    def looked(hidden: Tensor) -> Tensor:
        states = hidden if norm is None else norm(hidden.to(head.weight.dtype))
        logits = nn.functional.linear(states.to(head.weight.dtype), *_of(head))
        return transform.apply_(logits.to(torch.promote_types(logits.dtype, torch.float32)).clone())

    return looked


def _of(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return head.weight, head.bias
