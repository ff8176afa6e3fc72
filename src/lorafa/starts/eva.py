"""PEFT's documented functions of EVA: an adapter that is on a model starts again at the directions of its inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lorafa.calibration.batches import of_data, require_batches, shown
from lorafa.calibration.loss import call
from lorafa.calibration.masks import counted
from lorafa.config import LoraConfig
from lorafa.errors import AdapterError, CalibrationError, ConfigError, NotAvailableError, shorten, warn
from lorafa.initializers.base import check_singular_vectors
from lorafa.initializers.eva import directions_as_A
from lorafa.peft_model import PeftModel
from lorafa.processes import alone, distributed, from_main
from lorafa.settings.methods import EvaConfig
from lorafa.starts.ranks import RankRule, ranked, shared_out
from lorafa.starts.statistics import statistics_of
from lorafa.storage.tensors import can_be_gathered
from lorafa.surgery.activate import require_adapters, require_unmerged, set_requires_grad
from lorafa.surgery.given import lora_config
from lorafa.surgery.resolve import resolve
from lorafa.surgery.walk import PREFIX

LayerInputs = Callable[[Tensor, Any, str], Tensor]


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> Tensor | None:
    """Which tokens of a batch count, (batch, tokens) bool: those attended to and, with ``use_label_mask``, labelled."""
    if not isinstance(model_input, Mapping):
        return None
    settings = peft_config.eva_config or EvaConfig()
    attended, labels = model_input.get("attention_mask"), model_input.get("labels")
    tokens = attended if attended is not None else labels
    if tokens is None:
        return None
    return counted(tokens.shape, attended, labels if settings.use_label_mask else None, settings.label_mask_value)


def prepare_layer_inputs_fn_language_modeling(
    layer_input: Tensor, model_input: Tensor | None, layer_name: str
) -> Tensor:
    """The tokens of a layer's input (batch, tokens, in) that count, (T, in)."""
    fits = model_input is not None and model_input.shape == layer_input.shape[:-1]
    return layer_input[model_input.to(layer_input.device)] if fits and model_input is not None else layer_input


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs | Mapping[str, LayerInputs] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """What EVA starts from: full name of a layer -> A, (r', in) with orthonormal rows.

    With ``whiten`` their lengths differ, and rows beyond the directions that the data has are zero.

    Ranks r' are shared out by explained variance up to ``rho`` times the layer's; a layer that gets none is left out.

    Args:
        model: a PeftModel, or with ``peft_config`` a base model.
        dataloader: batches; gone over again until the directions have settled (``tau``).
        forward_fn: ``forward_fn(model, batch)``; default ``model(**batch)``.
        prepare_model_inputs_fn: given a batch and the config, says what ``prepare_layer_inputs_fn`` gets as its second
            argument; the default says which tokens count.
        prepare_layer_inputs_fn: given a layer's input, that, and the layer's name, gives the rows (T, in) to look at;
            or such a function for each name; None takes all.
        adapter_name: of a PeftModel, whose config is taken.
        gather_distributed_inputs: the result is that of all processes' data. False takes that of the first alone, which
            the others get: adapters that started apart would be other adapters.
        show_progress_bar: where rich is installed.

    Raises:
        AdapterError: a base model without ``peft_config``, or an unknown adapter.
        ConfigError: the config's start is not "eva", ``prepare_layer_inputs_fn`` names a layer without the adapter, or
            with ``rho`` = 1 a rank is larger than min(out, in) of its layer.
        NotAvailableError: ``gather_distributed_inputs=False`` for a model that is spread over several processes.
        CalibrationError: the data is empty or cannot be gone over again, a target is no linear layer, or
            ``prepare_layer_inputs_fn`` returns no rows of what it is given, or the inputs of a layer are not finite.
    """
    if not gather_distributed_inputs and distributed():
        if any(map(can_be_gathered, model.parameters())):
            raise NotAvailableError(
                "gather_distributed_inputs=False goes by the data of one process, and this model is spread over "
                "several, which have to run it together. Leave it True; principal directions are brought together "
                "once, not the inputs of every batch."
            )
        return from_main(
            lambda: _of_this_process(
                model, dataloader, peft_config, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn,
                adapter_name, show_progress_bar=show_progress_bar,
            )
        )  # fmt: skip
    inner, config = _model_and_config(model, peft_config, adapter_name)
    require_batches("dataloader", dataloader)
    resolved = resolve(inner, config)
    settings, targets = config.eva_config or EvaConfig(), resolved.targets
    if settings.rho == 1:  # otherwise ranks are those the data explain
        for target in targets:
            check_singular_vectors(target.full_name, target.rank, target.backend.full_shape(target.base))
    ranks = {target.full_name: target.rank for target in targets}
    if isinstance(prepare_layer_inputs_fn, Mapping):
        _require_targets(
            "prepare_layer_inputs_fn", [key.removeprefix(PREFIX) for key in prepare_layer_inputs_fn], ranks
        )
    prepared: list[Any] = [None]

    def forward(model: nn.Module, batch: Any) -> Any:
        prepared[0] = None if prepare_model_inputs_fn is None else prepare_model_inputs_fn(batch, config)
        return call(model, batch) if forward_fn is None else forward_fn(model, batch)

    def rows(layer: str, x: Tensor) -> Tensor:
        choose = prepare_layer_inputs_fn
        if isinstance(choose, Mapping):
            choose = choose.get(layer, choose.get(PREFIX + layer))
        return x if choose is None else _rows_of(layer, x, choose(x, prepared[0], layer))

    batches = replace(of_data(inner, dataloader, forward=forward), rows=rows, reads_output=forward_fn is not None)
    with shown(batches, show_progress_bar) as counted:
        stats = statistics_of(resolved, counted)
    bad = [name for name, tensors in stats.items() if not tensors["principal.singular_values"].isfinite().all()]
    if bad:
        raise CalibrationError(
            f"The inputs of {shorten(bad, 3)} are not finite, so they have no directions. Check the data and the model."
        )
    if settings.rho > 1:
        ranks = shared_out(resolved, stats, RankRule("explained_variance", rho=settings.rho))
    return _state_dict(settings, ranks, stats)


def _of_this_process(*arguments: Any, **settings: Any) -> dict[str, Tensor]:
    """As :func:`get_eva_state_dict`, of the data of this process alone, on the CPU."""
    with alone():
        return {name: A.cpu() for name, A in get_eva_state_dict(*arguments, **settings).items()}


def _rows_of(layer: str, x: Tensor, chosen: Any) -> Tensor:
    """What ``prepare_layer_inputs_fn`` chose of an input."""
    if isinstance(chosen, Tensor) and chosen.dim() and chosen.shape[-1] == x.shape[-1]:
        return chosen
    given = f"a tensor of shape {tuple(chosen.shape)}" if isinstance(chosen, Tensor) else type(chosen).__name__
    raise CalibrationError(
        f"{layer}: prepare_layer_inputs_fn returned {given} for an input of shape {tuple(x.shape)}. Return some of its "
        f"rows, (T, {x.shape[-1]})."
    )


def _require_targets(what: str, layers: Iterable[str], targets: Collection[str]) -> None:
    unknown = [layer for layer in layers if layer not in targets]
    if unknown:
        raise ConfigError(
            f"{what} has {len(unknown)} layers the adapter is not on: {shorten(unknown, 3)}. Drop them; it is on "
            f"{shorten(targets, 3)}."
        )


def _model_and_config(
    model: nn.Module, peft_config: LoraConfig | None, adapter_name: str
) -> tuple[nn.Module, LoraConfig]:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(model, PeftModel):
        require_adapters(inner, [adapter_name])
        peft_config = model.peft_config[adapter_name] if peft_config is None else peft_config
    if peft_config is None:
        raise AdapterError("A base model has no config. Pass peft_config=LoraConfig(init_lora_weights='eva', ...).")
    peft_config = lora_config(peft_config)
    if peft_config.init_lora_weights != "eva":
        raise ConfigError(
            f"EVA reads the settings of init_lora_weights='eva', and the config has "
            f"{peft_config.init_lora_weights!r}. Make the adapter with init_lora_weights='eva'."
        )
    return inner, peft_config


def _state_dict(
    settings: EvaConfig, ranks: Mapping[str, int], stats: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    found = {}
    for name, rank in ranks.items():
        V, S = stats[name]["principal.components"][:rank], stats[name]["principal.singular_values"][:rank]
        if rank:
            found[name] = directions_as_A(V, S, settings)
    return found


def initialize_lora_eva_weights(
    model: PeftModel,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs | Mapping[str, LayerInputs] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Let an adapter start at the principal directions of its layers' inputs, with ranks by explained variance (EVA).

    The adapter is made anew, before training: its ranks change, layers of rank 0 lose it, and its config says so in
    ``target_modules``, ``rank_pattern`` and ``alpha_pattern``. Optimizers made before hold the old factors.

    Args:
        dataloader: not read with ``eva_state_dict``, which a warning says.
        eva_state_dict: from :func:`get_eva_state_dict`, whose other arguments these are.

    Raises:
        AdapterError: ``model`` is no PeftModel, an unknown or merged adapter, or neither data nor state dict.
        ConfigError: the config's start is not "eva", or the state dict does not fit the targets.
        LoraError: as :func:`get_eva_state_dict`. The model is unchanged then.
    """
    if not isinstance(model, PeftModel):
        raise AdapterError(
            f"initialize_lora_eva_weights takes a PeftModel, found {type(model).__name__}. Call get_peft_model first."
        )
    inner, config = _model_and_config(model, None, adapter_name)
    require_unmerged(inner, adapter_name, "starting it again")
    if eva_state_dict is not None and dataloader is not None:
        warn(
            "initialize_lora_eva_weights was given eva_state_dict= and dataloader=: the adapter starts from the state "
            "dict, and the data are not looked at. Leave one of them out."
        )
    if eva_state_dict is None:
        if dataloader is None:
            raise AdapterError("EVA needs data or a state dict. Pass dataloader= or eva_state_dict=.")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar,
        )  # fmt: skip
    _start_again(model, adapter_name, config, {k.removeprefix(PREFIX): v for k, v in eva_state_dict.items()})


def _start_again(model: PeftModel, name: str, config: LoraConfig, directions: Mapping[str, Tensor]) -> None:
    inner, tuner = model.get_base_model(), model.base_model
    resolved = resolve(inner, config)
    targets = {target.full_name: target.rank for target in resolved.targets}
    _require_targets("The state dict", directions, targets)
    if not directions:
        raise ConfigError("The state dict is empty: no layer would have an adapter. Pass what get_eva_state_dict gave.")
    for layer, A in directions.items():
        if A.dim() != 2 or not bool(A.isfinite().all()):
            raise ConfigError(
                f"{layer}: directions are a finite matrix (r, in), found one of shape {tuple(A.shape)}. Pass what "
                "get_eva_state_dict gave, or collect it again."
            )
    ranks = {layer: len(directions.get(layer, ())) for layer in targets}
    settings = config.eva_config or EvaConfig()
    chosen = ranked(resolved, ranks, keep_scaling=settings.adjust_scaling_factors)
    made = chosen.changed(eva_config=replace(settings, whiten=False))  # the directions are as they should be
    stats = {  # a direction of length 0 is none
        layer: {"principal.components": A, "principal.singular_values": A.norm(dim=1)}
        for layer, A in directions.items()
    }
    active = list(tuner.active_adapters)
    frozen = [one for one in active if not _trains(model, one)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the config means was said when the adapter was made
        warnings.filterwarnings("always", message=".*has nothing to start from")
        planned = tuner.plan_adapter(made, f"{name}_eva", stats=stats)
    planned = replace(planned, name=name, config=chosen.config)
    tuner.delete_adapter(name)
    tuner.apply_plan(planned)
    tuner.set_adapter(active if len(active) > 1 else active[0])
    if frozen:
        set_requires_grad(tuner, frozen, False)


def _trains(model: PeftModel, name: str) -> bool:
    layers = (layer for _, layer in model.base_model.lora_layers() if name in layer.adapters)
    return any(p.requires_grad for layer in layers for p in layer.stored_parameters(name).values())
