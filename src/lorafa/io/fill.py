"""An adapter that is on the model already is given what a file holds: as a run that is resumed does it."""

from __future__ import annotations

from torch import nn

from lorafa.config import LoraConfig
from lorafa.errors import CheckpointError, ConfigError
from lorafa.io.adapter_files import StoredAdapter, check_fits_base, note_history
from lorafa.io.load import LoadOptions, adapter_dtype, fitting, put_in
from lorafa.io.peft_format import has_start
from lorafa.surgery.activate import require_unmerged
from lorafa.surgery.lora_model import LoraModel
from lorafa.surgery.renumber import plan_numbers
from lorafa.surgery.replicate import replication_of
from lorafa.surgery.walk import lora_layers, places


def fill(tuner: LoraModel, stored: StoredAdapter, name: str, given: LoadOptions) -> None:
    """Make an adapter that is there the one that was read: its values, and the numbers it counts by.

    What is trained of it, whether it counts, its dropout and its dtype stay.

    Raises:
        AdapterError: it is merged.
        ConfigError: a dtype is asked for that it does not have; or the config that was read means what no tensor shows
            otherwise than the adapter's own.
        CheckpointError: its tensors do not fit, or belong to another start; nothing was changed.
    """
    model, current = tuner.model, tuner.peft_config[name]
    require_unmerged(model, name, "loading other values into it")
    dtype, ignore_sizes = adapter_dtype(given), given.get("ignore_mismatched_sizes", False)
    has = next((layer.adapters[name].A.dtype for _, layer in lora_layers(model) if name in layer.adapters), dtype)
    if dtype not in (None, has):
        raise ConfigError(
            f"The model has an adapter {name!r} already, in {has}, and it keeps its dtype: {dtype} was asked for. "
            f"Drop the dtype, or delete_adapter({name!r}) first."
        )
    replication_of(model, stored.config)  # refuses layers that stand in another order
    if not given.get("ignore_base_mismatch"):
        check_fits_base(model, list(places(model)), stored, ignore_sizes=ignore_sizes)
    tensors = fitting(
        model, name, current, stored.tensors, with_start=stored.with_start, path=stored.path, ignore_sizes=ignore_sizes
    )
    _require_same_start(model, name, current, stored)
    numbers = plan_numbers(model, name, current, stored.config, ignore_sizes=ignore_sizes)
    put_in(model, name, current, tensors, with_start=stored.with_start)
    numbers.set()
    tuner.peft_config[name] = numbers.config
    for _, layer in lora_layers(model):
        if name in layer.adapters:
            layer.adapters[name].fallback = None
    note_history(model, name, stored)


def _require_same_start(model: nn.Module, name: str, current: LoraConfig, stored: StoredAdapter) -> None:
    """Raise CheckpointError where A and B of the file belong to another start than the adapter subtracts."""
    there, moves, path = has_start(model, name), stored.config.start.initializer.moves_base, stored.path
    own_name = "Load it under a name of its own. Nothing was loaded."
    if stored.with_start or not (there or moves):
        return
    asked = f"init_lora_weights={stored.config.init_lora_weights!r}"
    if not there:
        raise CheckpointError(
            f"{path} holds A and B, and not what {asked} took from the base they were trained on, and adapter {name!r} "
            f"subtracts nothing from its update. {own_name}"
        )
    if not moves:
        raise CheckpointError(
            f"Adapter {name!r} subtracts a frozen start (init_lora_weights={current.init_lora_weights!r}), and {path} "
            f"has none ({asked}): its A and B would count less what was taken from the base. {own_name}"
        )
    same = current.start == stored.config.start and current.start_settings() == stored.config.start_settings()
    if not same or stored.config.start.initializer.needs:
        raise CheckpointError(
            f"{path} does not hold what {asked} took from the base, and that adapter {name!r} subtracts the same is "
            f"not known. {own_name}"
        )
