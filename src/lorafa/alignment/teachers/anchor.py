"""Halfway between the student and where it began (arXiv:2605.04468), in the space of the product B A."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.alignment.entry import TeacherEntry
from lorafa.alignment.teachers.base import OfTheAdapters, Refreshed, copied
from lorafa.alignment.teachers.products import Pair, trained_pairs, weighed_sum
from lorafa.errors import CheckpointError
from lorafa.settings.checks import check_number


@dataclass(frozen=True)
class AnchorSettings:
    """What an anchor is made of."""

    share: float = 0.5
    """What the student counts in it, between 0 and 1; the rest is where the training began."""

    def __post_init__(self) -> None:
        check_number("align.share", self.share, "a number in [0, 1]", 0.0, 1.0, closed="[]")


class Anchor(OfTheAdapters):
    """Delta_T = w Delta_S + (1 - w) Delta_0, made anew at each refresh and cut to the student's rank.

    Delta_0 is the update the training began from: that of an adapter that is trained on, or none, the base.
    """

    name = "anchor"
    copies = 2

    def __init__(self, share: float = 0.5) -> None:
        """``share`` is w, what the student counts, between 0 and 1."""
        super().__init__()
        check_number("share", share, "a number in [0, 1]", 0.0, 1.0, closed="[]")
        self.share = share
        self.reference: dict[str, Tensor] = {}
        self._pairs: list[Pair] = []

    def begin(self, model: nn.Module) -> None:
        super().begin(model)
        self._pairs = trained_pairs(model, f"align={self.name} averages")
        self.reference = dict(self.values)

    @torch.no_grad()
    def refresh(self, model: nn.Module) -> Refreshed:
        self.require_same(model)
        self.values, discarded = weighed_sum(self._pairs, self.reference, copied(model), self.share)
        return Refreshed(discarded)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "reference": {name: value.clone() for name, value in self.reference.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if set(state.get("reference", {})) != set(self.reference):
            raise CheckpointError("The checkpoint's teacher 'anchor' has another reference than is trained here.")
        self.reference = {name: value.to(self.reference[name]) for name, value in state["reference"].items()}


ANCHOR = TeacherEntry(make=Anchor, settings=AnchorSettings)
