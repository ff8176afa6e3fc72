"""Start an adapter from data: collect what its start reads, over a dataloader or a training step, and put it on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from lorafa.backends.offload import device_of
from lorafa.calibration.base import CalibrationOptions
from lorafa.calibration.batches import digest_of, moved, of_data, of_function, require_batches, shown
from lorafa.calibration.loss import Loss, causal_loss, default_loss, require_label, scalar
from lorafa.calibration.processes import gathered, together
from lorafa.checks import check_choice, names
from lorafa.config import LoraConfig
from lorafa.errors import AdapterError, CalibrationError, ConfigError, warn
from lorafa.modes import evaluating
from lorafa.peft_model import PeftModel, get_peft_model
from lorafa.ranks import RHO, RankRule, choose_ranks, require_rule, with_ranks
from lorafa.statistics import Statistics, require_config, require_gradients, require_statistics, statistics_of
from lorafa.surgery.build import Options
from lorafa.surgery.plan import plan
from lorafa.surgery.walk import require_module

Data = Iterable[Any] | Callable[[], Any]
GAMMAS = (64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0)
"""What ``stable_gamma="auto"`` tries."""


def collect_statistics(
    model: nn.Module,
    config: LoraConfig,
    data: Data,
    *,
    loss: Loss | None = None,
    weighting: str = "batches",
    passes: int = 1,
    dense: bool | None = None,
    halves: bool = False,
    also: Sequence[str] = (),
    cache: str | Path | None = None,
    progress: bool = False,
) -> Statistics:
    """What the start of ``config`` reads of its target layers, collected on the base model alone.

    No weight gradient is computed and none of the model's own state changes; dropout is off, gradient checkpointing
    stays on. Under torch.distributed every process gives its own share of the data, and all get the same result.

    Args:
        model: the base model, or one with adapters, which are off meanwhile.
        config: names targets, ranks and the start.
        data: batches that can be gone over repeatedly (a DataLoader, a list), each a mapping of the model's keyword
            arguments, a tuple or list of its positional ones, or its one argument; or a function without arguments
            that runs forward and backward over all of them itself, as PEFT's ``train_step``.
        loss: runs the model over a batch: ``loss(model, batch)``, a scalar, whose gradients are taken where any are
            read; default the ``loss`` of the model's output, which a causal model of transformers need not compute from
            all its logits.
        weighting: "batches" averages the gradients of the batches' losses; "tokens" that of the mean over all
            labelled tokens.
        passes: over the data for gradients: 1, 2, or 4 for a power iteration (with 1 97 % of the energy of the best
            directions, with 4 99.9 %, docs/LOG.md).
        dense: add up whole gradients (True), only sketches (False), or whichever is less work (None).
        halves: keep two half samples of gradients apart, for ranks from data: every other batch, of two or more, which
            with several passes come in the same order each time.
        also: further statistics by name: "gradient", "principal" (for ranks by explained variance), "second_moment",
            "moment_sketch" (the same of thin memory), "corda_moment", "whitened_gradient".
        cache: file to take the result from if it was collected like this before, and to write it to otherwise; by
            default the one CorDA's config names. Of ``loss`` and of a function as ``data`` it knows module, name and
            code, but not what they read from elsewhere, nor which data a function runs over: delete the file when
            that changes.
        progress: show a bar, where rich is installed.

    Returns:
        By the name of each layer (out, in) a table of tensors, by the name of each statistic: "gradient.U" (out, k),
        ".S" (k,), ".Vh" (k, in), k = 4 r or 2 r + 8 leading triplets of the gradient; ".norm2" (), its squared norm as
        estimated, ".error2" (), the squared norm of what the sketch misses; ".dense" (out, in) where it is whole.
        "second_moment.C", "corda_moment.C" (in, in). "principal.components" (k, in), ".singular_values" (k,).

    Raises:
        CalibrationError: the data is empty or cannot be gone over again, no gradient arrives, or a target is no linear
            layer.
        ConfigError: ``weighting``, ``passes``, ``dense`` or ``halves`` where no gradients are read.
        TargetError, ConfigError, NotAvailableError: as :func:`lorafa.get_peft_model`.
        CheckpointError: ``cache`` cannot be read or written.
    """
    require_module(model)
    require_config(config)
    check_choice("weighting", weighting, ("batches", "tokens"))
    if callable(data) and weighting == "tokens":
        raise ConfigError(
            "weighting='tokens' counts the labels of batches, and a function as data shows none: every call of the "
            "model counts as one batch. Drop weighting='tokens', or pass the batches."
        )
    if callable(data) and loss is not None:
        raise ConfigError(
            "loss= is of batches, and a function as data runs forward and backward by itself. Drop loss=, or pass the "
            "batches."
        )
    if weighting != "batches":
        require_gradients(config, names("also", also), {"weighting": weighting})
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    cache = file_named_by(config) if cache is None else cache
    options = CalibrationOptions(passes=passes, dense=dense, halves=halves)
    batches = of_function(data) if callable(data) else of_data(inner, data, loss=loss, weighting=weighting)
    if cache is not None:
        batches = replace(batches, digest=digest_of(data if callable(data) else iter(data), loss, weighting))
    with shown(batches, progress) as counted:
        return statistics_of(inner, config, counted, options=options, also=also, cache=cache)


def file_named_by(config: LoraConfig) -> str | None:
    """Where the config says its statistics are kept: ``covariance_file`` or else ``cache_file`` of CorDA's."""
    settings = config.start_settings()
    return getattr(settings, "covariance_file", None) or getattr(settings, "cache_file", None)


def initialize(
    model: nn.Module,
    config: LoraConfig,
    data: Data,
    adapter_name: str = "default",
    *,
    ranks: RankRule | None = None,
    heldout: Sequence[Any] | None = None,
    loss: Loss | None = None,
    autocast_adapter_dtype: bool = True,
    **collecting: Any,
) -> PeftModel:
    """``get_peft_model`` with a start from data: collect the statistics, then put the adapter on.

    Args:
        model, config, adapter_name, autocast_adapter_dtype: as for :func:`lorafa.get_peft_model`.
        data, loss: as for :func:`collect_statistics`; ``loss`` is that of the held-out rows, too.
        ranks: choose each layer's rank by the data; None keeps the config's, but for EVA with ``rho`` > 1 and GoRA,
            which have rules of their own.
        heldout: batches for ``stable_gamma="auto"``, two to eight rows, as a list; not those of ``data``. In several
            processes each has its own share.
        collecting: as for :func:`collect_statistics`.

    Raises:
        As :func:`collect_statistics`, :func:`lorafa.choose_ranks` and :func:`lorafa.get_peft_model`; the model is
        unchanged then.
    """
    if isinstance(model, PeftModel):
        raise AdapterError(
            "The model is a PeftModel already. Call collect_statistics on it, then its add_adapter with stats=."
        )
    require_config(config)
    _require_heldout(config, heldout)
    if ranks is not None:
        collecting = _united(config, ranks, collecting)
    _require_room(model, config, adapter_name)
    stats = collect_statistics(model, config, data, loss=loss, **collecting)
    return start_from(
        model, config, stats, adapter_name, ranks=ranks, heldout=heldout, loss=None if heldout is None else loss,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )  # fmt: skip


def _require_room(model: nn.Module, config: LoraConfig, adapter_name: str) -> None:
    """Raise for an adapter that could not be put on whatever the data says, before any is read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come with the adapter that is kept
        plan(model, config, adapter_name, Options(low_cpu_mem_usage=True))


def start_from(
    model: nn.Module,
    config: LoraConfig,
    stats: Statistics,
    adapter_name: str = "default",
    *,
    ranks: RankRule | None = None,
    heldout: Sequence[Any] | None = None,
    loss: Loss | None = None,
    autocast_adapter_dtype: bool = True,
) -> PeftModel:
    """The second half of :func:`initialize`, for statistics that are there already; arguments are as there.

    Unlike ``get_peft_model(..., stats=stats)`` it chooses ranks, where ``ranks``, EVA or GoRA ask for it: a layer to
    which EVA gives none is left without adapter.

    Raises:
        CalibrationError: the statistics are of another model, of other settings, or not what the start or rule reads.
        ConfigError: ``loss`` or ``heldout`` where they are not read, or missing ``heldout``.
        As :func:`lorafa.choose_ranks` and :func:`lorafa.get_peft_model`; the model is unchanged then.
    """
    require_config(config)
    require_statistics(stats)
    if loss is not None and heldout is None:
        raise ConfigError("loss= is that of held-out rows here, and there are none. Drop loss=, or pass heldout=.")
    config = _with_start(model, config, stats, ranks=ranks, heldout=heldout, loss=loss)
    read = None if ranks is not None and not config.start.initializer.needs else stats  # else for the ranks alone
    return get_peft_model(model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, stats=read)


def _require_heldout(config: LoraConfig, heldout: Any) -> None:
    """Raises ConfigError or CalibrationError unless held-out batches are there where they are read, and only there."""
    gamma = getattr(config.init_config, "stable_gamma", None)
    if gamma == "auto" and heldout is None:
        raise ConfigError(
            "stable_gamma='auto' compares sizes of the step by their loss on held-out rows. Pass heldout=, two to "
            "eight rows the data does not have, or set a number."
        )
    if gamma != "auto" and heldout is not None:
        raise ConfigError(
            f"heldout= is read for stable_gamma='auto' only, and init_config has {gamma!r}. Drop heldout=, or set "
            "init_config={'stable_gamma': 'auto'}."
        )
    if heldout is not None:
        require_batches("heldout", heldout)


def _united(config: LoraConfig, rule: RankRule, collecting: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`collect_statistics` is told by the caller, and for the rule.

    Raises:
        ConfigError: the caller excludes what the rule compares.
    """
    read: dict[str, Any] = require_rule(rule).reads()
    if rule.rule == "cross_validation" and not collecting.get("halves", True):
        raise ConfigError(
            "RankRule('cross_validation') compares two half samples of the gradients, and halves=False keeps none. "
            "Drop halves=False, or choose another rule."
        )
    if rule.rule == "importance" and collecting.get("dense") is False:
        raise ConfigError(
            "RankRule('importance') reads single entries of the gradients, and dense=False keeps sketches of them "
            "only. Drop dense=False, or choose another rule."
        )
    rho = getattr(config.start_settings(), "rho", RHO)
    if rule.rule == "explained_variance" and (rule.rho or RHO) > rho:
        raise ConfigError(
            f"RankRule('explained_variance') with rho={rule.rho or RHO:g} chooses among more directions than are "
            f"collected, those of rho={rho:g}: of EvaConfig with EVA, {RHO:g} otherwise. Set the same rho in both."
        )
    also = [*names("also", collecting.get("also", ())), *read.pop("also", ())]
    return read | dict(collecting) | {"also": also}


def _with_start(
    model: nn.Module,
    config: LoraConfig,
    stats: Statistics,
    *,
    ranks: RankRule | None = None,
    heldout: Sequence[Any] | None = None,
    loss: Loss | None = None,
) -> LoraConfig:
    """The config with everything decided that its start leaves to the data: ranks, and ``stable_gamma="auto"``.

    Every layer keeps its scaling when ranks change, but with ``adjust_scaling_factors=False`` of EVA, and where GoRA
    with ``use_rslora`` shares ranks out by its own rule: its scaling is alpha / sqrt(r) of the layer's new rank.
    """
    _require_heldout(config, heldout)
    rule = _own_rule(config) if ranks is None else ranks
    if rule is not None:
        of_new_rank = ranks is None and config.use_rslora and config.start.initializer.own_scaling
        keep = getattr(config.start_settings(), "adjust_scaling_factors", True) and not of_new_rank
        config = with_ranks(model, config, choose_ranks(model, config, stats, rule), keep_scaling=keep)
    return config if heldout is None else best_gamma(model, config, stats, heldout, loss=loss)


def _own_rule(config: LoraConfig) -> RankRule | None:
    """What the start shares its ranks out by where the caller names no rule; None: the config's ranks stay."""
    own = config.start.initializer.own_ranks
    fields = None if own is None else own(config.start_settings(), config.r)
    return None if fields is None else RankRule(**fields)


def best_gamma(
    model: nn.Module, config: LoraConfig, stats: Statistics, heldout: Sequence[Any], *, loss: Loss | None = None
) -> LoraConfig:
    """The config with the ``stable_gamma`` of :data:`GAMMAS` whose start has the smallest loss on held-out batches.

    Every trial puts the adapter on and runs over the batches. Warns if the best is the largest tried, for
    then no step may be better than this one, or the smallest, for then a larger step may be.

    Raises:
        CalibrationError: ``heldout`` is no sequence of batches, or no trial has a finite loss.
    """
    require_batches("heldout", heldout)
    losses, flags = {}, [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for gamma in GAMMAS:
        trial = replace(config, init_config=replace(config.init_config, stable_gamma=gamma))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the layers that fall back come with the start that is kept
            adapted = get_peft_model(model, trial, stats=stats)
        try:
            losses[gamma] = _mean_loss(adapted, heldout, loss or default_loss(adapted))
        finally:
            adapted.unload()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
    finite = {gamma: value for gamma, value in losses.items() if math.isfinite(value)}
    if not finite:
        raise CalibrationError(
            f"The loss on the held-out rows is not finite for any gamma from {GAMMAS[0]:g} to {GAMMAS[-1]:g}. Check "
            "the rows, and that the model's own loss on them is finite."
        )
    best = min(finite, key=finite.__getitem__)
    if best == GAMMAS[0]:
        warn(
            f"stable_gamma='auto': the loss falls down to the smallest gamma tried, {best:g}: a larger step than any "
            f"may be better. Compare it with a smaller number, stable_gamma={best / 2:g}."
        )
    if best == GAMMAS[-1]:
        warn(
            f"stable_gamma='auto': the loss falls up to the largest gamma tried, {best:g}: a smaller step than any may "
            "be better, and the default start none at all."
        )
    return replace(config, init_config=replace(config.init_config, stable_gamma=best))


def _mean_loss(model: nn.Module, batches: Iterable[Any], loss: Loss) -> float:
    """Of the batches of all processes, in which it is the same number."""
    device, losses = device_of(model), []
    with together(), evaluating(model):
        for number, batch in enumerate(batches, 1):
            batch = moved(batch, device)
            if loss is causal_loss:
                require_label(model, batch, f"batch {number} of heldout")
            losses.append(float(scalar(loss(model, batch))))
    losses = list(chain.from_iterable(gathered(losses)))
    if not losses:
        raise CalibrationError("heldout is empty: there is no loss to compare. Pass two to eight rows.")
    return sum(losses) / len(losses)
