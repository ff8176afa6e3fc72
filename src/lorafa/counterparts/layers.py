"""Classes of PEFT's layers, for ``isinstance``: lorafa has one class for what PEFT has several, and other bases."""

from __future__ import annotations

from abc import ABC
from typing import Any

from lorafa.errors import NotAvailableError
from lorafa.layers.base import LoraLayer
from lorafa.layers.tokens import TokenAdapter


class BaseTunerLayer(ABC):  # noqa: B024 - nothing is to be written: its classes are registered
    """What holds factors or rows of adapters, and is told by libraries which of them count.

    Wrappers of whole modules are none, as in PEFT: trainers refuse a head that is one.
    """


BaseTunerLayer.register(LoraLayer)  # type: ignore[type-abstract]
BaseTunerLayer.register(TokenAdapter)


class _Over(type):
    """A class whose instances are the adapted layers over a base of some name, its own or that of a class it has."""

    def __instancecheck__(cls, instance: Any) -> bool:
        over: tuple[str, ...] = type.__getattribute__(cls, "over")
        if not isinstance(instance, LoraLayer):
            return False
        base = instance.get_base_layer()
        kinds = (*type(base).__mro__, type(getattr(base, "weight", None)))
        return any(f"{kind.__module__.partition('.')[0]}.{kind.__name__}" in over for kind in kinds)


class LayerOver(metaclass=_Over):
    """An adapted layer, by PEFT's class for the layer below it.

    Raises:
        NotAvailableError: when it is called: a config makes layers.
    """

    over: tuple[str, ...] = ()
    """The library of a base layer, or of its weight, and the name of the class."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise NotAvailableError(
            f"peft.tuners.lora.{type(self).__name__} is for isinstance: lorafa makes adapted layers by get_peft_model "
            "and a LoraConfig. Name the layer in target_modules."
        )


class Conv1d(LayerOver):
    over = ("torch.Conv1d",)


class Conv2d(LayerOver):
    over = ("torch.Conv2d",)


class Conv3d(LayerOver):
    over = ("torch.Conv3d",)


class Linear4bit(LayerOver):
    over = ("bitsandbytes.Linear4bit",)


class Linear8bitLt(LayerOver):
    over = ("bitsandbytes.Linear8bitLt",)


class TorchaoLoraLinear(LayerOver):
    over = ("torchao.Int8Tensor", "torchao.IntxUnpackedToInt8Tensor", "torchao.Float8Tensor")
