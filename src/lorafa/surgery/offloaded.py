"""What hooks that bring weights in for each call do not allow to be changed around them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from lorafa.backends.offload import rests_elsewhere, rests_inside
from lorafa.config import LoraConfig
from lorafa.errors import ConfigError, TargetError
from lorafa.surgery.targets import Target
from lorafa.surgery.walk import Place, pristine_of


def require_reachable(
    everything: Iterable[Place], config: LoraConfig, targets: Iterable[Target], others: Iterable[nn.Module]
) -> None:
    """Raise for what would fail or be lost in the first call, where weights of the model rest elsewhere.

    Args:
        everything: every place of the model.
        others: the modules that are wrapped beside the targets.

    Raises:
        TargetError: the hook of a larger module brings in the weights of a module that is to be wrapped, by a name that
            it has no longer then.
        ConfigError: biases are to be trained that are copies, brought in for one call.
    """
    everything = [replace(place, module=pristine_of(place.module)) for place in everything]
    if not any(rests_elsewhere(place.module) for place in everything):
        return
    wrapped = {id(module) for module in (*(target.base for target in targets), *others)}
    around = [(place.name, place.module) for place in everything if rests_inside(place.module)]
    for place in everything:
        owner = next((name for name, module in around if place.name.startswith(f"{name}.")), None)
        if id(place.module) in wrapped and owner is not None:
            raise TargetError(
                f"{place.name!r} is inside {owner!r}, whose hook of accelerate brings in the weights of all that is in "
                "it, by names which wrapping would change. Leave it out with exclude_modules, or offload without "
                "preload_module_classes."
            )
    for place in everything if config.bias != "none" else ():
        trained = config.bias == "all" or id(place.module) in wrapped
        bias = place.module._parameters.get("bias")
        if trained and rests_elsewhere(place.module) and bias is not None and bias.is_meta:
            raise ConfigError(
                f"bias={config.bias!r} trains the bias of {place.name!r}, but that rests elsewhere and hooks of "
                "accelerate bring in a copy for each call, so its gradient would be lost. Set bias='none', or keep the "
                "module in memory (device_map)."
            )
