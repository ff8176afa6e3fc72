"""Put a planned adapter on a model; what fails halfway is taken back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from lorafa.context import CurrentCall
from lorafa.layers.base import LoraLayer
from lorafa.layers.host import Host
from lorafa.layers.tied import attach_tied
from lorafa.storage.fingerprint import describe
from lorafa.surgery.bypassed import weight_is_read
from lorafa.surgery.plan import Plan
from lorafa.surgery.replicate import Replication
from lorafa.surgery.targets import Target
from lorafa.surgery.walk import Parents, base_parameters, hosts, wrappers


@dataclass(frozen=True)
class Undo:
    """How to take an applied plan back: the model is bit-identical after it, ``requires_grad`` included."""

    name: str
    requires_grad: list[tuple[nn.Parameter, bool]]
    """The flags of the base's parameters before; a plan changes those of no other adapter."""
    replaced: list[tuple[nn.Module, str, nn.Module]]
    carriers: list[Host]
    """Wrappers that were there before and got the adapter."""
    replication: Replication | None = None
    """What was put into the model before the adapter."""

    def __call__(self) -> None:
        for parent, child, old in reversed(self.replaced):
            setattr(parent, child, old)
        for host in self.carriers:
            host.detach_adapter(self.name)
        for parameter, flag in self.requires_grad:
            parameter.requires_grad = flag  # by method, a lazy layer's parameter refuses
        if self.replication is not None:
            self.replication.undo()


def apply(model: nn.Module, planned: Plan, call: CurrentCall | None = None) -> Undo:
    """Carry out a plan: wrap what is not wrapped, attach the adapter, freeze everything that is not an adapter.

    The adapter is attached inactive; :func:`lorafa.surgery.activate.set_adapter` makes it count.

    Args:
        call: what new layers read of the call that runs; they share it.
    """
    if planned.replication is not None:
        planned.replication.apply()
    parents, before = Parents(model), [host for _, host in hosts(model)]
    flags = [(parameter, parameter.requires_grad) for _, parameter in base_parameters(model)]
    call = CurrentCall() if call is None else call
    undo = Undo(planned.name, flags, parents.history, before, planned.replication)
    try:
        for parameter, _ in flags if not before else ():
            parameter.requires_grad = False
        carriers: dict[Target, LoraLayer] = {}
        for layer in planned.layers:
            carriers[layer.target] = _host_for(model, layer.target, parents, call, layer.parts.base)
            carriers[layer.target].attach(planned.name, layer.parts)
        for tie in planned.ties:
            tied = _host_for(model, tie.target, parents, call)
            attach_tied(tied, carriers[tie.owner], planned.name, transposed=tie.transposed)
        planned.auxiliary.apply(planned.name, parents)
        for _, host in wrappers(model):
            host.call = call
    except BaseException:
        undo()
        raise
    return undo


def _host_for(
    model: nn.Module, target: Target, parents: Parents, call: CurrentCall, base: nn.Module | None = None
) -> LoraLayer:
    """The layer that carries the target's adapters, put in the model if it is not there yet.

    Args:
        base: put around this layer, and not around the one that is there.
    """
    wrapper = target.wrapper
    if wrapper is None:
        module = target.module if target.parameter is None else target.to_wrap(model.get_submodule(target.path))
        wrapper = target.layer_type.around(module if base is None else base, target.parameter)
        wrapper.origin = None if base is None else describe(cast(Tensor, module.weight))
        wrapper.call = call
        wrapper.weight_is_read = weight_is_read(module, parents)
        parents.replace(module, wrapper)
    return wrapper
