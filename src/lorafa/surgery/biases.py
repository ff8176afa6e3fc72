"""The biases of the base that an adapter trains (``bias="all"``, ``"lora_only"``): there is one set of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorafa.errors import shorten, warn
from lorafa.layers.base import LoraLayer
from lorafa.layers.host import Host
from lorafa.surgery.walk import hosts, skeleton


class _Bias(NamedTuple):
    path: str
    module: nn.Module
    before: Tensor
    """Its values before the adapter came."""
    trains: bool


class BaseBiases:
    """Which adapter has the biases of which modules, and their values before it.

    They train while their adapter does, and go back to what they were when it goes: another adapter would learn on them
    as they are, and its file, which has none of them, would be read on a base that has others.
    """

    def __init__(self) -> None:
        self._of: dict[str, list[_Bias]] = {}

    def take(self, name: str, model: nn.Module, which: str) -> None:
        """Remember the biases that adapter ``name``, which is on the model, has by the setting ``bias``."""
        if which != "none":
            self._of[name] = list(_biases(model, name, which))

    def let_train(self, names: Collection[str]) -> None:
        """Let the biases of these adapters train, and no others of them."""
        for name in self._of:
            self.set_requires_grad(name, name in names)

    def set_requires_grad(self, name: str, requires_grad: bool) -> None:
        """Let the biases of an adapter train, or freeze them; where it has none, nothing."""
        for one in self._of.get(name, []):
            if one.trains and (bias := one.module._parameters.get("bias")) is not None:
                bias.requires_grad_(requires_grad)

    @torch.no_grad()
    def give_back(self, name: str) -> None:
        """Let the biases of an adapter that goes be those of the base again, frozen; warns where that cannot be."""
        left = []
        for one in self._of.pop(name, []):
            bias = one.module._parameters.get("bias")
            if bias is None:
                continue
            bias.requires_grad_(False)
            if type(bias) is not nn.Parameter or bias.is_meta or bias.shape != one.before.shape:
                left.append(one.path)
            else:
                bias.copy_(one.before)
        if left:
            warn(
                f"The biases of {shorten(left, 3)} stay as adapter {name!r} has trained them: their values are spread "
                "over processes or rest elsewhere. What is trained from now on is for these; load the base anew."
            )

    def forget(self, name: str) -> None:
        """Drop what is remembered for an adapter that was taken back, or that became a part of the base."""
        self._of.pop(name, None)

    def __contains__(self, name: str) -> bool:
        return name in self._of


def _biases(model: nn.Module, name: str, which: str) -> Iterator[_Bias]:
    """The biases of an adapter's layers, or of all modules; where it holds a copy of a module, the copy's."""
    held = [host for _, host in hosts(model) if name in host.held()]
    adapted = {id(host.get_base_layer()) for host in held if isinstance(host, LoraLayer)}
    copied = {id(p) for host in held if not isinstance(host, LoraLayer) for p in host.parameters()}
    for path, module in skeleton(model):
        bias = None if isinstance(module, Host) else module._parameters.get("bias")
        if bias is not None and (which == "all" or id(module) in adapted):
            yield _Bias(path, module, bias.detach().clone(), id(bias) not in copied)
