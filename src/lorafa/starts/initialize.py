"""Start an adapter from data: collect what its start reads, over a dataloader or a training step, and put it on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lorafa.calibration.base import CalibrationOptions
from lorafa.calibration.batches import Batches, digest_of, of_data, of_function, require_batches, shown
from lorafa.calibration.loss import Loss
from lorafa.config import LoraConfig
from lorafa.errors import AdapterError, ConfigError, warn
from lorafa.peft_model import PeftModel, adapted, check_can_wrap
from lorafa.settings.checks import check_choice, names
from lorafa.starts.gamma import best_gamma
from lorafa.starts.joint import JointStart, JointStatistics, joint_loss_of, joint_statistics_of
from lorafa.starts.ranks import RankRule, check_readable, ranked, require_rule, shared_out
from lorafa.starts.statistics import Statistics, require_gradients, statistics_of
from lorafa.surgery.build import Options
from lorafa.surgery.given import lora_config
from lorafa.surgery.plan import plan
from lorafa.surgery.resolve import Resolved, met, resolve
from lorafa.surgery.walk import require_module

if TYPE_CHECKING:
    from lorafa.alignment.alignment import Alignment

Data = Iterable[Any] | Callable[[], Any]


def collect_statistics(
    model: nn.Module,
    config: LoraConfig | Resolved,
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
            "exact_moment" (the same in float64), "moment_sketch" (of thin memory), "corda_moment", "whitened_gradient".
        cache: file to take the result from if it was collected like this before, and to write it to otherwise; by
            default the one CorDA's config names. Of ``loss`` and of a function as ``data`` it knows module, name and
            code, but not what they read from elsewhere, nor which data a function runs over: delete the file when
            that changes.
        progress: show a bar, where rich is installed.

    Returns:
        By the name of each layer (out, in) a table of tensors, by the name of each statistic: "gradient.U" (out, k),
        ".S" (k,), ".Vh" (k, in), k = 4 r or 2 r + 8 leading triplets of the gradient; ".norm2" (), its squared norm as
        estimated, ".error2" (), the squared norm of what the sketch misses; ".dense" (out, in) where it is whole.
        "second_moment.C", "exact_moment.C", "corda_moment.C" (in, in). "principal.components" (k, in),
        ".singular_values" (k,).

    Raises:
        CalibrationError: the data is empty or cannot be gone over again, no gradient arrives, or a target is no linear
            layer.
        ConfigError: ``weighting``, ``passes``, ``dense`` or ``halves`` where no gradients are read.
        TargetError, ConfigError, NotAvailableError: as :func:`lorafa.get_peft_model`.
        CheckpointError: ``cache`` cannot be read or written.
    """
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
    resolved = met(model, config)
    if weighting != "batches":
        require_gradients(resolved.config, names("also", also), {"weighting": weighting})
    inner = resolved.model
    cache = file_named_by(resolved.config) if cache is None else cache
    options = CalibrationOptions(passes=passes, dense=dense, halves=halves)
    batches = of_function(data) if callable(data) else of_data(inner, data, loss=loss, weighting=weighting)
    if cache is not None:
        batches = replace(batches, digest=digest_of(data if callable(data) else iter(data), loss, weighting))
    with shown(batches, progress) as counted:
        return statistics_of(resolved, counted, options=options, also=also, cache=cache)


def collect_joint_statistics(
    model: nn.Module,
    config: LoraConfig | Resolved,
    data: Iterable[Any],
    align: JointStart | Alignment,
    *,
    loss: Loss | None = None,
    weighting: str = "batches",
    passes: int = 1,
    dense: bool | None = None,
    halves: bool = False,
    also: Sequence[str] = (),
    cache: str | Path | None = None,
    progress: bool = False,
) -> JointStatistics:
    """What the start of ``config`` reads, of the task's loss and of the discrepancy to a teacher, in one pass each.

    The result forms the gradient of task + lambda teacher for any lambda without the data:
    ``start_from(model, config, joint.at(2.0))``; ``joint.at()`` balances the two.

    Args:
        align: the teacher and the divergence from it, or an :class:`lorafa.alignment.Alignment` of the model.
        data: batches as mappings with labels, which come in the same order in both passes.
        loss: the task's, as for :func:`collect_statistics`, as are the others.

    Raises:
        ConfigError: neither start nor rule reads a gradient; ``passes`` above 1, a function as ``data``, or ``cache``,
            which do not go with two losses; or the teacher does not go with the model.
        DivergedError: the teacher gives inf or nan.
        LoraError: as :func:`collect_statistics`.
    """
    check_choice("weighting", weighting, ("batches", "tokens"))
    if callable(data):
        raise ConfigError(
            "A function as data runs over the task's loss by itself, and the teacher's would not be read. Pass the "
            "batches, or drop align=."
        )
    if cache is not None:
        raise ConfigError(
            "cache= keeps the statistics of one loss, and align= collects those of two. Drop cache=; what "
            "collect_joint_statistics returns keeps both, and each can be saved."
        )
    asked, resolved = JointStart.of(align), met(model, config)
    options = CalibrationOptions(passes=passes, dense=dense, halves=halves)

    def over(own: Loss | None) -> Batches:
        return of_data(resolved.model, data, loss=loss if own is None else own, weighting=weighting)

    return joint_statistics_of(resolved, over, asked, options=options, also=names("also", also), progress=progress)


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
    align: JointStart | Alignment | None = None,
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
        align: start from the gradient of the joint objective of task and teacher, as for
            :func:`collect_joint_statistics`; held-out rows are compared by that objective, too. A warning says where
            the start is the task's alone.
        collecting: as for :func:`collect_statistics`.

    Raises:
        LoraError: as :func:`collect_statistics`, :func:`collect_joint_statistics`, :func:`lorafa.choose_ranks` and
            :func:`lorafa.get_peft_model`; the model is unchanged then.
    """
    if isinstance(model, PeftModel):
        raise AdapterError(
            "The model is a PeftModel already. Call collect_statistics on it, then its add_adapter with stats=."
        )
    check_can_wrap(require_module(model), "add_adapter")
    resolved = resolve(model, lora_config(config))
    _require_heldout(resolved.config, heldout)
    if ranks is not None:
        collecting = _united(resolved.config, ranks, collecting)
    _require_room(resolved, adapter_name)
    if align is None:
        stats = collect_statistics(model, resolved, data, loss=loss, **collecting)
    else:
        stats, loss = _joint(model, resolved, data, JointStart.of(align), loss, collecting)
    options = Options(autocast_adapter_dtype)
    return _started(
        resolved, stats, adapter_name, options, ranks=ranks, heldout=heldout, loss=None if heldout is None else loss
    )


def _joint(
    model: nn.Module, resolved: Resolved, data: Any, asked: JointStart, loss: Loss | None, collecting: dict[str, Any]
) -> tuple[Statistics, Loss | None]:
    """The statistics of the joint objective, and that as a loss of held-out rows."""
    stats = collect_joint_statistics(model, resolved, data, asked, loss=loss, **collecting).at()
    joint = stats.about["joint"]
    if "why" in joint:
        warn(f"The start is the task's alone: {joint['why']}.")
    return stats, joint_loss_of(asked, stats, loss)


def _require_room(resolved: Resolved, adapter_name: str) -> None:
    """Raise for an adapter that could not be put on whatever the data says, before any is read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come with the adapter that is kept
        plan(resolved, adapter_name, Options(low_cpu_mem_usage=True))


def start_from(
    model: nn.Module,
    config: LoraConfig | Resolved,
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
        LoraError: as :func:`lorafa.choose_ranks` and :func:`lorafa.get_peft_model`; the model is unchanged then.
    """
    if loss is not None and heldout is None:
        raise ConfigError("loss= is that of held-out rows here, and there are none. Drop loss=, or pass heldout=.")
    check_can_wrap(require_module(model), "add_adapter")
    resolved = met(model, config)
    check_readable(resolved, stats, None if ranks is None else require_rule(ranks))
    options = Options(autocast_adapter_dtype)
    return _started(resolved, stats, adapter_name, options, ranks=ranks, heldout=heldout, loss=loss)


def _started(
    resolved: Resolved,
    stats: Statistics,
    adapter_name: str,
    options: Options,
    *,
    ranks: RankRule | None,
    heldout: Sequence[Any] | None,
    loss: Loss | None,
) -> PeftModel:
    """The adapted model, by statistics that were collected for this or checked."""
    resolved = _with_start(met(resolved.model, resolved), stats, ranks=ranks, heldout=heldout, loss=loss)
    read = ranks is None or resolved.start.initializer.needs  # else they were for the ranks alone
    return adapted(resolved, adapter_name, options, dict(stats) if read else None)


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
    if rule.entry.check is not None:
        rule.entry.check(rule.settings, collecting, config.start_settings())
    also = [*names("also", collecting.get("also", ())), *read.pop("also", ())]
    return read | dict(collecting) | {"also": also}


def _with_start(
    resolved: Resolved,
    stats: Statistics,
    *,
    ranks: RankRule | None,
    heldout: Sequence[Any] | None,
    loss: Loss | None,
) -> Resolved:
    """The config with everything decided that its start leaves to the data: ranks, and ``stable_gamma="auto"``.

    Every layer keeps its scaling when ranks change, but with ``adjust_scaling_factors=False`` of EVA, and where GoRA
    with ``use_rslora`` shares ranks out by its own rule: its scaling is alpha / sqrt(r) of the layer's new rank.
    """
    _require_heldout(resolved.config, heldout)
    rule = _own_rule(resolved) if ranks is None else ranks
    if rule is not None:
        of_new_rank = ranks is None and resolved.config.use_rslora and resolved.start.initializer.own_scaling
        keep = getattr(resolved.settings, "adjust_scaling_factors", True) and not of_new_rank
        resolved = ranked(resolved, shared_out(resolved, stats, rule), keep_scaling=keep)
    return resolved if heldout is None else best_gamma(resolved, stats, heldout, loss=loss)


def _own_rule(resolved: Resolved) -> RankRule | None:
    """What the start shares its ranks out by where the caller names no rule; None: the config's ranks stay."""
    own = resolved.start.initializer.own_ranks
    fields = None if own is None else own(resolved.settings, resolved.config.r)
    return None if fields is None else RankRule(**fields)
