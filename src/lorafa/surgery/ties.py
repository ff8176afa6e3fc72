"""Modules that share one weight, as an embedding and its head, and what ``ensure_weight_tying`` makes of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import nn

from lorafa.config import LoraConfig
from lorafa.errors import ConfigError
from lorafa.layers.base import LoraLayer
from lorafa.layers.host import Host
from lorafa.layers.tied import owner_of
from lorafa.surgery.targets import Target
from lorafa.surgery.walk import Place, tied_groups
from lorafa.variants import is_plain_lora, variant_types


@dataclass(frozen=True)
class Tie:
    """A target that counts the adapter of another one, whose weight it shares, as its own."""

    target: Target
    owner: Target
    transposed: bool
    """Whether the shared parameter is W^T to the one if it is W to the other."""


def find_ties(everything: Sequence[Place], config: LoraConfig, targets: Sequence[Target]) -> list[Tie]:
    """Which targets count the adapter of another one as their own; none without ``ensure_weight_tying``.

    Raises:
        ConfigError: an end of shared weights cannot have the adapter the other end has.
    """
    ties: list[Tie] = []
    for group in tied_groups(everything) if config.ensure_weight_tying else ():
        ends = {id(place.module): place.name for place in group}
        mine = {id(target.module): target for target in targets if id(target.module) in ends}
        if mine:
            _check_ends(group, list(mine.values()), config)
            owner, *others = (mine[key] for key in ends)
            ties += [Tie(t, owner, t.weight().stride() != owner.weight().stride()) for t in others]
    return ties


def _check_ends(group: Sequence[Place], targets: Sequence[Target], config: LoraConfig) -> None:
    names = " and ".join(repr(place.name) for place in group)
    problem = ""
    found = {id(target.module) for target in targets}
    left = [place.name for place in group if id(place.module) not in found]
    if any(not target.layer_type.can_be_tied for target in targets):
        problem = "an adapter can be shared by linear and embedding layers only, not by other layers or parameters"
    elif left:
        problem = f"exclude_modules or modules_to_save takes {left[0]!r} away from the targets"
    elif len({(target.rank, target.alpha) for target in targets}) > 1:
        problem = "rank_pattern or alpha_pattern gives them different ranks or alphas"
    elif not is_plain_lora(config):
        problem = f"{variant_types(config)[-1].name} is no plain B A, and its update of the one is none of the other"
    if problem:
        raise ConfigError(
            f"ensure_weight_tying: {names} share one weight and are to share one adapter, but {problem}. "
            "Change that, or set ensure_weight_tying=False."
        )


def share_merged(merged: Sequence[tuple[LoraLayer, nn.Module, list[str]]]) -> None:
    """Give new base layers of tied adapters the merged weight of the layer that owns them: they shared one before.

    Args:
        merged: layers, the base layers to be put in, and the adapters merged into these.
    """
    new = {id(layer): (base, names) for layer, base, names in merged}
    for layer, base, names in merged:
        owner = owner_of(layer, names)
        if owner is not None and owner.pristine.weight is layer.pristine.weight:
            owner_base, owner_names = new.get(id(owner), (owner.base_layer, owner.merged_adapters))
            if owner_names == names:
                base.weight = owner_base.weight


class SharedRows:
    """Lets modules share one table again whose wrappers shared one, and the rows trained in it."""

    def __init__(self) -> None:
        self._first: dict[Hashable, nn.Module] = {}

    def share(self, host: Host, plain: nn.Module, names: Sequence[str]) -> None:
        """Take in the ``plain`` module that a host has made with the rows of the adapters ``names``."""
        source = host.rows_from(names)
        if source is not None:
            plain.weight = self._first.setdefault(source, plain).weight
