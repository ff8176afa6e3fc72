"""Start an adapter from data: collect what its start reads, over a dataloader or a training step, and put it on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.calibration.base import CalibrationOptions
from lorafa.calibration.collect import IGNORED, Batches
from lorafa.checks import check_choice
from lorafa.config import LoraConfig
from lorafa.errors import AdapterError, CalibrationError, ConfigError
from lorafa.peft_model import PeftModel, get_peft_model
from lorafa.ranks import RankRule, choose_ranks, with_ranks
from lorafa.statistics import Statistics, digest_of, statistics_of

Loss = Callable[[nn.Module, Any], Tensor]
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
            arguments, or its one positional argument; or a function without arguments that runs forward and backward
            over all of them itself, as PEFT's ``train_step``.
        loss: ``loss(model, batch)``, a scalar; default the ``loss`` of the model's output.
        weighting: "batches" averages the gradients of the batches' losses; "tokens" that of the mean over all
            labelled tokens.
        passes: over the data for gradients: 1, 2, or 4 for a power iteration (97 %, 98 % and 99.9 % of the energy of
            the best directions, docs/starts.md).
        dense: add up whole gradients (True), only sketches (False), or whichever is smaller (None).
        halves: keep two half samples of gradients apart, for ranks from data.
        also: further statistics by name, "gradient" or "second_moment".
        cache: file to take the result from if it was collected like this before, and to write it to otherwise. What a
            function runs over is not known: delete the file when its data change.
        progress: show a bar, where rich is installed.

    Raises:
        CalibrationError: the data is empty, no gradient arrives, or a target is no linear layer.
        TargetError, ConfigError, NotAvailableError: as :func:`lorafa.get_peft_model`.
        CheckpointError: ``cache`` cannot be read or written.
    """
    check_choice("weighting", weighting, ("batches", "tokens"))
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    seed = 0 if config.init_seed is None else config.init_seed
    options = CalibrationOptions(seed=seed, passes=passes, dense=dense, halves=halves)
    if callable(data):
        batches, digest = _of_function(data), None
    else:
        if isinstance(data, Iterator):
            raise CalibrationError(
                f"The data is an iterator ({type(data).__name__}), which can be gone over only once. Pass something "
                "that can be gone over again: a DataLoader, or list(data)."
            )
        batches = _of_batches(inner, data, loss or _own_loss, weighting)
        digest = digest_of(data) if cache is not None else None
    with progress_over(progress) as watched:
        return statistics_of(
            inner, config, watched(batches), options=options, also=also, data=f"{digest} {weighting}", cache=cache,
            reads_output=callable(data),
        )  # fmt: skip


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
        ranks: choose each layer's rank by the data; None keeps the config's, but for EVA with ``rho`` > 1, which has a
            rule of its own.
        heldout: batches for ``stable_gamma="auto"``, two to eight rows; not those of ``data``.
        collecting: as for :func:`collect_statistics`.

    Raises:
        As :func:`collect_statistics`, :func:`lorafa.choose_ranks` and :func:`lorafa.get_peft_model`; the model is
        unchanged then.
    """
    if isinstance(model, PeftModel):
        raise AdapterError(
            "The model is a PeftModel already. Call collect_statistics on it, then its add_adapter with stats=."
        )
    if ranks is not None:
        collecting = ranks.reads() | collecting
    stats = collect_statistics(model, config, data, loss=loss, **collecting)
    return start_from(
        model, config, stats, adapter_name, ranks=ranks, heldout=heldout, loss=loss,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )  # fmt: skip


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
    """The second half of :func:`initialize`, for statistics that are there already."""
    config = with_start(model, config, stats, ranks=ranks, heldout=heldout, loss=loss)
    read = stats if config.start.initializer.needs else None  # else they were for the ranks alone
    return get_peft_model(model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, stats=read)


def with_start(
    model: nn.Module,
    config: LoraConfig,
    stats: Statistics,
    *,
    ranks: RankRule | None = None,
    heldout: Sequence[Any] | None = None,
    loss: Loss | None = None,
) -> LoraConfig:
    """The config with everything decided that its start leaves to the data: ranks, and ``stable_gamma="auto"``."""
    ranks = _own_rule(config) if ranks is None else ranks
    if ranks is not None:
        eva = config.eva_config if config.init_lora_weights == "eva" else None
        keep = eva is None or eva.adjust_scaling_factors
        config = with_ranks(model, config, choose_ranks(model, config, stats, ranks), keep_scaling=keep)
    if getattr(config.init_config, "stable_gamma", None) != "auto":
        return config
    if heldout is None:
        raise ConfigError(
            "stable_gamma='auto' compares sizes of the step by their loss on held-out rows. Pass heldout=, two to "
            "eight rows the data does not have, or set a number."
        )
    return best_gamma(model, config, stats, heldout, loss=loss)


def _own_rule(config: LoraConfig) -> RankRule | None:
    """EVA shares its ranks out unless ``rho`` is 1."""
    eva = config.eva_config if config.init_lora_weights == "eva" else None
    return RankRule("explained_variance", r_min=0, rho=eva.rho) if eva is not None and eva.rho > 1 else None


def best_gamma(
    model: nn.Module, config: LoraConfig, stats: Statistics, heldout: Sequence[Any], *, loss: Loss | None = None
) -> LoraConfig:
    """The config with the ``stable_gamma`` of :data:`GAMMAS` whose start has the smallest loss on held-out batches.

    The factors are only rescaled between trials: a few forward passes. Warns if the best is the largest tried, for
    then no step may be better than this one.

    Raises:
        CalibrationError: no trial has a finite loss.
    """
    losses, flags = {}, [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for gamma in GAMMAS:
        trial = replace(config, init_config=replace(config.init_config, stable_gamma=gamma))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the layers that fall back come with the start that is kept
            adapted = get_peft_model(model, trial, stats=stats)
        try:
            losses[gamma] = _mean_loss(adapted, heldout, loss or _own_loss)
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
    if best == GAMMAS[-1]:
        warnings.warn(
            f"stable_gamma='auto': the loss falls up to the largest gamma tried, {best:g}: a smaller step than any may "
            "be better, and the default start none at all.",
            stacklevel=3,
        )
    return replace(config, init_config=replace(config.init_config, stable_gamma=best))


@torch.no_grad()
def _mean_loss(model: nn.Module, batches: Iterable[Any], loss: Loss) -> float:
    modes = [(module, module.training) for module in model.modules()]
    device = _device(model)
    try:
        model.eval()
        losses = [float(loss(model, moved(batch, device))) for batch in batches]
    finally:
        for module, mode in modes:
            module.training = mode
    if not losses:
        raise CalibrationError("heldout is empty: there is no loss to compare. Pass two to eight rows.")
    return sum(losses) / len(losses)


def _of_function(train_step: Callable[[], Any]) -> Batches:
    def run(gradients: bool) -> Iterator[float | None]:
        train_step()
        yield None

    return run


def _of_batches(model: nn.Module, data: Iterable[Any], loss: Loss, weighting: str) -> Batches:
    device = _device(model)

    def run(gradients: bool) -> Iterator[float | None]:
        for batch in data:
            batch = moved(batch, device)
            if not gradients:
                with torch.no_grad():
                    call(model, batch)
                yield 1.0
                continue
            weight = 1.0 if weighting == "batches" else _labelled(batch)
            with torch.enable_grad():
                value = loss(model, batch) * weight
                if value.requires_grad:  # not where the batch reaches no target
                    value.backward()  # type: ignore[no-untyped-call]
            yield weight

    return run


def call(model: nn.Module, batch: Any) -> Any:
    """``model(**batch)`` for a mapping, ``model(*batch)`` for a tuple or list, else ``model(batch)``."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    output = call(model, batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise CalibrationError(
            f"The model's output ({type(output).__name__}) has no loss. Put labels into the batches, or pass "
            "loss=, a function of model and batch."
        )
    return loss  # type: ignore[no-any-return]


def _labelled(batch: Any) -> float:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        raise CalibrationError("weighting='tokens' counts the labels of a batch, and there are none. Put them in.")
    return float((labels[..., 1:] != IGNORED).sum())


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device, however they are nested."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(moved(value, device) for value in batch)
    return batch


@contextmanager
def progress_over(show: bool) -> Iterator[Callable[[Batches], Batches]]:
    """Gives a function that counts the batches of a pass on a progress bar."""
    if not show:
        yield lambda batches: batches
        return
    try:
        from rich.progress import Progress
    except ImportError:
        yield lambda batches: batches
        return
    with Progress(transient=True) as progress:
        task = progress.add_task("Collecting statistics", total=None)

        def watched(batches: Batches) -> Batches:
            def run(gradients: bool) -> Iterator[float | None]:
                for weight in batches(gradients):
                    progress.advance(task)
                    yield weight

            return run

        yield watched
