"""A config meets a model, once: what it leaves open is settled, its layers are found, and later stages trust both."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from lorafa.config import LoraConfig
from lorafa.errors import warn
from lorafa.initializers import Start
from lorafa.surgery.auxiliary import name_saved, name_tied_ends
from lorafa.surgery.available import require_available
from lorafa.surgery.given import lora_config
from lorafa.surgery.replicate import Replication, planned_places, replication_of, settled_ranges
from lorafa.surgery.targets import Target, find_targets, spelled_targets
from lorafa.surgery.walk import Place, hosts, name_of, require_module, user_model


@dataclass(frozen=True)
class Resolved:
    """A config that has met a model. It holds as long as no adapter is put on the model or taken off it.

    What is settled is set in ``config`` as a new value, so that nothing of it is in ``given`` or at the caller's.
    """

    model: nn.Module
    given: LoraConfig
    """The config as it was handed in: a checked copy."""
    config: LoraConfig
    """The same, with what depends on the model settled; a plan is made of it, and files hold it."""
    everything: list[Place]
    """Every place of the model, the model itself first."""
    targets: list[Target]
    carried: tuple[object, ...] = ()
    """What adapters the model carried at that time."""
    lenient: bool = False
    """The config comes with a file: a pattern that matches nothing was worth a warning, and no error."""
    replication: Replication | None = None
    """The stack of layers that is to be put into the model before the adapter; None: its own stays."""

    @cached_property
    def start(self) -> Start:
        return self.config.start

    @cached_property
    def settings(self) -> Any:
        """The settings of the start, as its initializer reads them."""
        return self.config.start_settings()

    def holds(self) -> bool:
        """Whether the model carries the adapters that it carried when the config met it, on the same layers."""
        return self.carried == _carried(self.model)

    @property
    def named(self) -> list[Place]:
        """Every place but the model itself."""
        return self.everything[1:]

    def called_by_model(self) -> Resolved:
        """The same with the name of the base model, where that has one."""
        name = name_of(self.model)
        return self if name is None else self.changed(base_model_name_or_path=name)

    def changed(self, targets: list[Target] | None = None, **fields: Any) -> Resolved:
        """The same with other values of fields, which are valid and leave the targets where they are.

        Args:
            targets: the same ones, with the ranks and alphas that the fields say.
        """
        given, config = _copy(self.given, fields), _copy(self.config, fields)
        return replace(self, given=given, config=config, targets=self.targets if targets is None else targets)


def _copy(config: LoraConfig, fields: dict[str, Any]) -> LoraConfig:
    made = copy.copy(config)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def resolve(
    model: nn.Module,
    config: LoraConfig,
    *,
    lenient: bool = False,
    checked: bool = False,
    replication: Replication | None = None,
    everything: list[Place] | None = None,
) -> Resolved:
    """Settle what ``config`` leaves to the model, and find the layers it means. Nothing is changed.

    Args:
        model: the user's model, with or without adapters.
        lenient: warn of patterns that match nothing instead of raising; for a config that comes with a file, whose
            tensors are checked one by one anyway.
        checked: the config was made in the call that is going on, and found available; nobody else holds it.
        replication: what :func:`replication_of` says of the two, where the caller knows it.
        everything: every place of the model as it will be, where the caller knows them.

    Raises:
        ConfigError: a value is not allowed, two contradict each other, or one does not go with the model.
        NotAvailableError: the config asks for a feature this version does not have.
        TargetError: a pattern matches nothing, or something that cannot carry an adapter.
    """
    given = config if checked else replace(config)
    if not checked:
        require_available(given)
    if everything is None:
        replication = replication_of(require_module(model), given)
        everything = planned_places(model, replication)
    named, draft = everything[1:], copy.copy(given)
    draft.layer_replication = settled_ranges(model, given)
    name_saved(draft, named, lenient=lenient)
    targets = find_targets(model, draft, named, lenient=lenient)
    if draft.ensure_weight_tying and name_tied_ends(model, draft, named, targets):
        targets = find_targets(model, draft, named, lenient=lenient)
    _settle_layout(draft, targets)
    draft.target_modules = spelled_targets(model, draft, named, targets)
    return Resolved(model, given, draft, everything, targets, _carried(model), lenient, replication)


def _carried(model: nn.Module) -> tuple[object, ...]:
    return tuple((id(host), *host.held()) for _, host in hosts(model))


def met(model: nn.Module, config: LoraConfig | Resolved) -> Resolved:
    """A config that has met the model already, if the model still carries the same adapters, or meets it now.

    Args:
        model: the user's model, or a PeftModel around it.

    Raises:
        LoraError: as :func:`resolve`.
    """
    inner = user_model(require_module(model))
    if isinstance(config, Resolved) and config.model is inner and config.holds():
        return config
    return resolve(inner, config.given if isinstance(config, Resolved) else lora_config(config))


def _settle_layout(draft: LoraConfig, targets: list[Target]) -> None:
    """Set ``fan_in_fan_out`` as the layers are; here it changes nothing, in files PEFT reads it."""
    stored = {target.backend.fan_in_fan_out: target for target in targets}
    if not draft.fan_in_fan_out or False not in stored:
        return
    layer = stored[False]
    warn(
        f"fan_in_fan_out=True means weights stored as (in, out), but that of {layer.full_name!r}, a "
        f"{type(layer.base).__name__}, is (out, in): it is False there. Drop it; a layer's type says how it stores."
    )
    draft.fan_in_fan_out = True in stored
