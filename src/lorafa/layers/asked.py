"""What scripts ask PEFT's layers by name, and nothing in lorafa does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lorafa.backends import own_weight
from lorafa.backends.offload import rests_elsewhere
from lorafa.errors import AdapterError, BackendError, ConfigError, NotAvailableError, shape_text

if TYPE_CHECKING:
    from lorafa.adapter import Adapter, Variant
    from lorafa.backends.base import Backend


def _absent(name: str, why: str, instead: str) -> Callable[..., Any]:
    """A method of PEFT's layers that has no counterpart: it says what to do when it is called."""

    def method(self: nn.Module, *values: object, **settings: object) -> Any:
        raise NotAvailableError(f"{type(self).__name__}.{name}: {why}. {instead}")

    method.__name__ = name
    method.__doc__ = f"Raises NotAvailableError: {why}."
    return method


def _start(name: str) -> Callable[..., Any]:
    why = "a start is computed while the adapter is made, and the base stays as it is"
    return _absent(name, why, "Name it in the config: LoraConfig(init_lora_weights=...).")


class AskedOfLayers:
    """Methods of a LoraLayer."""

    adapters: dict[str, Adapter]
    factor_names: ClassVar[tuple[str, str]]
    is_table: ClassVar[bool]
    _pristine: tuple[nn.Module, ...]
    frozen_peft_weight_names: ClassVar[tuple[str, ...]] = ()
    """What never trains, in PEFT's MiCA; here ``trains`` of each adapter says it."""
    quantization_backend: ClassVar[None] = None
    """PEFT's name for what some methods other than LoRA read a weight by; a LoRA layer has none there either."""
    cast_input_dtype_enabled: ClassVar[bool] = False
    """Whether layers copy their input in the dtype of the factors: they cast the factors."""

    if TYPE_CHECKING:

        @property
        def backend(self) -> Backend: ...

        def get_base_layer(self) -> nn.Module: ...

        def stored_parameters(self, name: str) -> dict[str, nn.Parameter]: ...

    @property
    def lora_variant(self) -> dict[str, Variant]:
        """Adapter -> its formula, where that is another than s B A; a copy."""
        return {name: one.variant for name, one in self.adapters.items() if not one.variant.is_plain_lora}

    @torch.no_grad()
    def get_base_weight(self) -> Tensor:
        """The weight of the base layer as it runs, in its own layout; numbers where it is quantized."""
        return own_weight(self.get_base_layer(), self.backend).detach()

    @torch.no_grad()
    def set_base_weight(self, weight_data: Tensor) -> None:
        """Write new values into the weight of the base layer, rounded to its dtype.

        The parameter stays the one it is, so layers that share it have the new values. Nothing else in lorafa writes
        there.

        Args:
            weight_data: values in the layer's own layout, as :meth:`get_base_weight` gives them.

        Raises:
            AdapterError: an update is merged, so that another weight than the base's own runs.
            BackendError: the weight is quantized, or rests elsewhere (accelerate's offloading).
            ConfigError: another shape.
        """
        if self._pristine:
            raise AdapterError(
                "An update is merged into this layer, or a start taken out of it, and the weight that it had will be "
                "brought back. Call unmerge_adapter() before set_base_weight. Nothing was changed."
            )
        base = self.get_base_layer()
        weight = base._parameters.get("weight")
        if weight is None or weight.is_meta or rests_elsewhere(base) or own_weight(base, self.backend) is not weight:
            raise BackendError(
                f"The weight of this {type(base).__name__} is quantized, rests elsewhere, or is not one tensor, so no "
                "values can be written into it. Change it before the adapter is put on. Nothing was changed."
            )
        if weight.shape != weight_data.shape:
            raise ConfigError(
                f"weight_data is {shape_text(weight_data.shape)}, the weight {shape_text(weight.shape)}. Pass what "
                "get_base_weight() gives, with other values. Nothing was changed."
            )
        weight.data = torch.empty_like(weight.data)  # what get_base_weight() gave before keeps its values, as in PEFT
        weight.copy_(weight_data)

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str = True) -> None:
        """Draw the factors of an adapter anew, by torch's own random source, as PEFT does: B A is then zero.

        What a start has taken out of the base (PiSSA ...) stays taken out, and what a formula has beside A and B stays
        as it is (a magnitude ...).

        Args:
            init_lora_weights: True (A uniform within 1 / sqrt(in)), "gaussian" (A normal with standard deviation
                1 / r), or False, which leaves them as they are. On tables A is zero and B is drawn, N(0, 1).

        Raises:
            AdapterError: the adapter has no factors of its own here.
            ConfigError: another start, which only an adapter that is made takes.
        """
        if init_lora_weights is False:
            return
        if init_lora_weights is not True and str(init_lora_weights).lower() != "gaussian":
            raise ConfigError(
                f"init_lora_weights={init_lora_weights!r}: factors are drawn anew by True or 'gaussian'. Every other "
                "start is taken by an adapter when it is made: delete_adapter, then add_adapter with a config."
            )
        own = self.stored_parameters(adapter_name)
        if not set(self.factor_names) <= own.keys():
            raise AdapterError(
                f"Adapter {adapter_name!r} has no factors of its own on this layer. It has those of: "
                f"{', '.join(self.adapters) or '(none)'}; the factors of a tied layer are the other one's."
            )
        A, B = (own[name] for name in self.factor_names)
        if self.is_table:
            A.zero_()
            B.normal_()
        elif init_lora_weights is True:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            B.zero_()
        else:
            A.normal_(std=1 / self.adapters[adapter_name].rank)
            B.zero_()
        if (bias := own.get("lora_B.bias")) is not None:
            bias.zero_()

    # ---- what has no counterpart

    @property
    def lora_variants(self) -> Any:
        """Raises NotAvailableError: formulas are lines of a registry, not of a class of layers."""
        raise NotAvailableError(
            f"{type(self).__name__}.lora_variants: formulas are lines of a registry and not of a class of layers. "
            "CONTRIBUTING.md says how to add one; layer.adapters[name].variant is that of an adapter."
        )

    update_layer = _absent(
        "update_layer", "an adapter is put on all of its layers at once, by one config, which its file holds too",
        "Use get_peft_model or add_adapter; rank_pattern and alpha_pattern set the numbers of single layers.",
    )  # fmt: skip
    resolve_lora_variant = _absent(
        "resolve_lora_variant", "the formula of an adapter is chosen where its config meets the model",
        "Read layer.adapters[name].variant of one that is on.",
    )  # fmt: skip
    corda_init, loftq_init, lora_ga_init = _start("corda_init"), _start("loftq_init"), _start("lora_ga_init")
    mica_init, olora_init = _start("mica_init"), _start("olora_init")
    orthogonal_init, pissa_init = _start("orthogonal_init"), _start("pissa_init")
