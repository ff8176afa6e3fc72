"""TiedAdapter: an adapter whose factors another layer owns, because the two layers share one weight."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor, nn

from lorafa.adapter import Adapter, Start
from lorafa.layers.base import LoraLayer


@dataclass(eq=False, slots=True, repr=False, kw_only=True)
class TiedAdapter(Adapter):
    """The update of ``owner``'s weight as that of ``layer``'s, which is the same parameter.

    An embedding sees a table as W (dim, vocabulary), the output head as W^T: the update s B A of the one is the update
    s A^T B^T of the other. The parameters are in the model once, under the owner's name, and get both gradients.
    """

    owner: LoraLayer
    transposed: bool

    @property
    def tied_to(self) -> tuple[LoraLayer, bool]:
        return self.owner, self.transposed

    @property
    def A(self) -> Tensor:
        own = self.owner.adapters[self.name]
        return own.B.T if self.transposed else own.A

    @property
    def B(self) -> Tensor:
        own = self.owner.adapters[self.name]
        return own.A.T if self.transposed else own.B

    @property
    def bias(self) -> Tensor | None:
        return self.owner.adapters[self.name].bias

    @property
    def modules(self) -> tuple[nn.Module | None, nn.Module | None]:
        """The modules of the owner; none where its update is turned round, which its modules do not compute."""
        return (None, None) if self.transposed else self.owner.adapters[self.name].modules

    @property
    def start(self) -> Start | None:
        own = self.owner.adapters[self.name].start
        return own if own is None or not self.transposed else Start(own.B.T, own.A.T)


def attach_tied(layer: LoraLayer, owner: LoraLayer, name: str, *, transposed: bool) -> None:
    """Let ``layer`` count adapter ``name`` of ``owner`` as its own, with the same numbers and dropout."""
    own = owner.adapters[name]
    layer.lora_dropout[name] = copy.deepcopy(owner.lora_dropout[name])
    layer.adapters[name] = TiedAdapter(
        layer, name, own.variant, own.rank, own.alpha, own.use_rslora, own.times, own.trains, own.fallback,
        own.has_bias,         owner=owner, transposed=transposed,
    )  # fmt: skip
    layer.adapters[name].scaling = own.scaling


def owner_of(layer: LoraLayer, names: list[str]) -> LoraLayer | None:
    """The layer that owns all these adapters of ``layer`` and scales them alike, or None."""
    adapters = [layer.adapters[name] for name in names]
    owners = {id(adapter.owner): adapter.owner for adapter in adapters if isinstance(adapter, TiedAdapter)}
    if len(owners) != 1 or not all(isinstance(adapter, TiedAdapter) for adapter in adapters):
        return None
    owner = next(iter(owners.values()))
    return owner if all(owner.adapters[a.name].scaling == a.scaling for a in adapters) else None
