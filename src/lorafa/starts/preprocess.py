"""PEFT's documented functions that look at data before an adapter is made: they leave statistics with the model.

The next ``get_peft_model`` or ``add_adapter`` on that model whose start reads statistics takes them;
:func:`lorafa.initialize` and ``get_peft_model(..., stats=)`` do the same without leaving anything anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from lorafa.calibration import STATISTICS
from lorafa.calibration.batches import of_function
from lorafa.config import LoraConfig
from lorafa.errors import ConfigError, NotAvailableError
from lorafa.starts.initialize import collect_statistics, file_named_by
from lorafa.starts.statistics import Statistics, statistics_of
from lorafa.surgery import given
from lorafa.surgery.resolve import resolve
from lorafa.surgery.stats import leave_for


def preprocess_loraga(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], Any], cache_file: str | Path | None = None
) -> None:
    """Estimate the gradients LoRA-GA starts from (arXiv:2407.05000), before ``get_peft_model(model, lora_config)``.

    Args:
        train_step: runs forward and backward over some batches; the gradients are averaged over the model's calls.
        cache_file: statistics are taken from it if it holds those of this model and config, otherwise written to it.

    Raises:
        ConfigError: the config's start reads no gradients.
        LoraError: as :func:`lorafa.collect_statistics`; nothing is left with the model then.
    """
    leave_for(model, estimate_gradients(model, lora_config, train_step, cache_file))


def estimate_gradients(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], Any], cache_file: str | Path | None = None
) -> Statistics:
    """The gradients of the targets' weights as triplets; arguments and errors as :func:`preprocess_loraga`.

    PEFT leaves whole gradients on the modules; here they are returned, sketched where that is smaller.
    """
    lora_config = given.lora_config(lora_config)
    reads = any(STATISTICS.get(name).reads_gradient for name in lora_config.start.initializer.needs)
    _require(reads, lora_config, "reads gradients", "lora_ga")
    return collect_statistics(model, lora_config, train_step, cache=cache_file)


def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Collect the covariances CorDA starts from (arXiv:2406.05223), before ``get_peft_model(model, lora_config)``.

    Args:
        run_model: runs the model over some batches. May be None where ``corda_config.covariance_file`` (or
            ``cache_file``) holds those of this model already.
        hooked_model: not available: ``model`` is the one that runs.

    Raises:
        ConfigError: the config's start is not CorDA, or there is nothing to run and no file.
        NotAvailableError: another ``hooked_model``.
        LoraError: as :func:`lorafa.collect_statistics`; nothing is left with the model then.
    """
    lora_config = given.lora_config(lora_config)
    _require(lora_config.start.name == "corda", lora_config, "is CorDA", "corda")
    if hooked_model is not None and hooked_model is not model:
        raise NotAvailableError(
            "hooked_model: statistics are collected on the model that gets the adapter. Pass run_model that runs it."
        )
    if run_model is None:
        file = file_named_by(lora_config)
        stats = statistics_of(resolve(model, lora_config), of_function(_nothing_to_run(file)), cache=file)
    else:
        stats = collect_statistics(model, lora_config, run_model)
    leave_for(model, stats)


def _nothing_to_run(file: str | None) -> Callable[[], Any]:
    def run() -> None:
        found = "none is named" if file is None else f"{file!r} does not hold them"
        raise ConfigError(
            f"CorDA needs covariances of the inputs, from run_model or from a file, and {found}. Pass run_model=, a "
            "function that runs the model over some batches."
        )

    return run


def _require(fits: bool, config: LoraConfig, what: str, instead: str) -> None:
    if not fits:
        raise ConfigError(
            f"This looks at data for a start that {what}, and init_lora_weights is {config.init_lora_weights!r}. Set "
            f"init_lora_weights={instead!r}."
        )
