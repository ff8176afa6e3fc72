"""What scripts and libraries ask PEFT's LoraModel by name, and nothing in lorafa does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lorafa.config import LoraConfig
from lorafa.errors import AdapterError, ConfigError
from lorafa.surgery.activate import require_adapters
from lorafa.surgery.architectures import DEFAULT_TARGETS
from lorafa.surgery.build import Options
from lorafa.surgery.doubled import stacked_start
from lorafa.surgery.given import lora_config
from lorafa.surgery.penalty import penalty_of
from lorafa.surgery.targets_of_tensors import with_targets_of
from lorafa.surgery.walk import PREFIX, lora_layers

_A, _B = ".lora_A.", ".lora_B."


class AskedByName:
    """Methods of a LoraModel."""

    model: nn.Module
    peft_config: dict[str, LoraConfig]
    target_module_mapping: ClassVar[Mapping[str, Any]] = DEFAULT_TARGETS
    """Type of a model -> the layers that are adapted where a config names none."""
    uses_shared_state: ClassVar[bool] = False
    """Whether layers share tensors of an adapter, as those of VeRA do."""

    if TYPE_CHECKING:

        def put_on(self, config: LoraConfig, adapter_name: str, options: Options) -> None: ...

        def set_adapter(self, adapter_name: str, inference_mode: bool) -> None: ...

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The settings of a model as a mapping; that of one without any names its type "custom"."""
        config = getattr(model, "config", None)
        if callable(to_dict := getattr(config, "to_dict", None)):
            return dict(to_dict())
        if is_dataclass(config) and not isinstance(config, type):
            return asdict(config)
        return dict(config) if isinstance(config, Mapping) else {"model_type": "custom"}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Put on the adapter whose config a script has written to ``peft_config``, as PEFT does.

        It counts at once where it is the only one.

        Args:
            model: the one that this LoraModel holds.
            state_dict: tensors of an adapter: the layers they are of get one, whatever ``target_modules`` names.

        Raises:
            ConfigError: no config has this name, or the model is another one.
            LoraError: as :func:`lorafa.inject_adapter_in_model`; the config then stays where it is.
        """
        if model is not self.model:
            raise ConfigError(
                f"inject_adapter was given a {type(model).__name__} that this LoraModel does not hold. Pass its .model."
            )
        if adapter_name not in self.peft_config:
            raise ConfigError(
                f"peft_config has no config by the name {adapter_name!r}. Write it there, or call add_adapter("
                f"{adapter_name!r}, config) of the PeftModel, which does both."
            )
        given = self.peft_config.pop(adapter_name)
        try:
            config = lora_config(given)
            chosen = config if state_dict is None else with_targets_of(state_dict, config, model)
            self.put_on(chosen, adapter_name, Options(autocast_adapter_dtype, low_cpu_mem_usage))
        except BaseException:
            self.peft_config[adapter_name] = given
            raise
        if list(self.peft_config) == [adapter_name]:
            self.set_adapter(adapter_name, config.inference_mode)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether :func:`lorafa.convert_to_lora` can make LoRA of an adapter: no update changes with the input."""
        return all(layer.supports_lora_conversion(adapter_name) for _, layer in lora_layers(self.model))

    def subtract_mutated_init(
        self, output_state_dict: Mapping[str, Tensor], adapter_name: str, kwargs: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """The factors of one adapter minus those of another, as factors of the sum of both ranks.

        s (B A - B0 A0) is s [B, -B0] [A; A0]: of twice the rank, at twice the alpha (rsLoRA: times the root of 2).
        What :meth:`lorafa.PeftModel.save_pretrained` writes of PiSSA, OLoRA, CorDA and LoRA-GA is that difference
        already, so a script has no need of it.

        Args:
            output_state_dict: tensors by the names that ``get_peft_model_state_dict`` gives; those of factors are read.
            adapter_name: the adapter of this model that is subtracted, A0 and B0.
            kwargs: PEFT's; not read.

        Raises:
            AdapterError: there is no such adapter, it is not on a layer of the first, or is one of stacked experts.
        """
        require_adapters(self.model, [adapter_name])
        layers = {path: layer for path, layer in lora_layers(self.model) if adapter_name in layer.adapters}
        made = {}
        for key, tensor in output_state_dict.items():
            mark = next((mark for mark in (_A, _B) if mark in key), None)
            if mark is None:
                continue
            path = key.partition(mark)[0].removeprefix(PREFIX)
            layer = layers.get(path)
            if layer is None or layer.changes_weight:
                why = f"adapter {adapter_name!r} is not on it" if layer is None else "it adapts a stack, or attention"
                raise AdapterError(
                    f"{path}: {why}, so its start cannot be subtracted by joining factors. Save the adapter by "
                    "save_pretrained, which writes what it adds to the base."
                )
            adapter = layer.adapters[adapter_name]
            A0, B0 = stacked_start(layer, adapter_name) if adapter.start is not None else (adapter.A, adapter.B)
            other = layer.stored_A(A0) if mark == _A else -layer.stored_B(B0)
            made[key] = torch.cat([tensor, other.detach().to(tensor)], dim=0 if mark == _A else 1)
        return made

    def _get_kasa_loss(self, adapter_names: str | list[str] | None = None) -> Tensor | float:
        """What KaSA adds to the loss, with the weights of its config; 0.0 where no adapter is one."""
        found = penalty_of(self.model, adapter_names, "kasa")
        return 0.0 if found is None else found

    def _get_monteclora_loss(self, adapter_names: str | list[str] | None = None) -> Tensor | float:
        """What MonteCLoRA adds to the loss, the mean over layers; 0.0 where no adapter is one."""
        found = penalty_of(self.model, adapter_names, "monteclora")
        return 0.0 if found is None else found
