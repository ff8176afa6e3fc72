"""An adapter to export, out of its files alone, or out of the model it is on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lorafa.config import LoraConfig
from lorafa.errors import ConfigError
from lorafa.export.update import PlainAdapter, Update
from lorafa.io.adapter_files import read_adapter
from lorafa.io.base_prints import base_fingerprint
from lorafa.io.convert import beside, convert, pattern_names
from lorafa.io.loose import LooseLayer, loose
from lorafa.layers.base import LoraLayer
from lorafa.numerics.linalg import working_dtype
from lorafa.numerics.truncation import truncated_product
from lorafa.peft_model import PeftModel
from lorafa.surgery.plain import Lost, check_rank, exact_factors, require_matrices
from lorafa.surgery.plain_config import plain_config
from lorafa.variants import variant_types


def of_files(source: str | Path, rank: int | float | None = None) -> PlainAdapter:
    """The adapter of a folder or a Hub repository, without any model: where its file holds plain LoRA.

    Args:
        rank: give every layer this rank, or the least that keeps this share of its energy.

    Raises:
        ConfigError: the update of its formula or start is made with the base weights, which are not here (DoRA, files
            of other libraries whose start is still in the base), or changes with the input; or its start has quantized
            the base (LoftQ).
        LoraError: as :func:`lorafa.io.loose.loose` and :func:`lorafa.io.adapter_files.read_adapter`.
    """
    stored = read_adapter(source)
    config = LoraConfig.from_pretrained(source)  # as PEFT reads the tensors; what is stored has the adapter's own
    require_matrix_formula(stored.config)
    require_dense_base(stored.config)
    if reason := _needs_base(config):
        raise ConfigError(
            f"{source}: {reason}, and its weights are not here. Give the base model, so that the update can be "
            "computed: --base <folder or Hub id>."
        )
    found = loose(stored, config)
    updates = [_of_file(layer, found.layers) for layer in found.layers.values()]
    adapter = PlainAdapter(str(source), plain_config(config), tuple(updates), found.rest, found.base)
    return adapter if rank is None else at_rank(adapter, rank)


def require_matrix_formula(config: LoraConfig) -> None:
    """Raises ConfigError for a formula whose update changes with the input: no other program has it."""
    for variant in variant_types(config):
        if not variant.uniform:
            raise ConfigError(
                f"The update of {variant.name} changes with the input, so there is no matrix, and no LoRA of other "
                "programs, that does the same. Keep the adapter in lorafa."
            )


def require_dense_base(config: LoraConfig) -> None:
    """Raises ConfigError for an adapter on weights that its start has quantized: its updates are of those codes."""
    if config.start.initializer.quantizer is not None:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} has quantized the base, and the adapter belongs to those "
            "codes: on the weights they were made from, which other programs load, it would be off by what they lost. "
            "Write the whole model instead: --merged."
        )


def _needs_base(config: LoraConfig) -> str | None:
    """Why the tensors of a file are not those of plain LoRA on the pristine base; None where they are."""
    for variant in variant_types(config):
        if not variant.plain:
            return f"the update of {variant.name} is made with the base weights"
        if variant.peft_stores or not variant.factors_are_stored:
            return f"the file holds A and B in a form of {variant.name}'s own"
    if config.start.initializer.moves_base:
        return f"its start, init_lora_weights={config.init_lora_weights!r}, is taken out of the base weights"
    if config.target_parameters:
        return "which parameters target_parameters means is for the model to say"
    return None


def _of_file(layer: LooseLayer, everything: Mapping[str, LooseLayer]) -> Update:
    nested = layer.outside is not None or any(other.outside == layer.path for other in everything.values())
    what = "convolutions" if len(layer.tails[0]) > 1 else "modules of several weights" if nested else None
    return Update(
        layer.path, *layer.stored(layer.A, layer.B), layer.scaling, layer.rank, layer.keys, name=layer.target,
        bias=layer.bias, is_linear=what is None and not layer.is_table, is_table=layer.is_table,
        what=what or ("embedding tables" if layer.is_table else "linear layers"),
    )  # fmt: skip


def of_model(
    model: PeftModel, source: str | Path, name: str = "default", rank: int | float | None = None
) -> PlainAdapter:
    """An adapter of a model: every formula that is a matrix, every kind of layer.

    Args:
        source: where it came from, for messages.
        rank: as for :func:`of_files`; None takes the factors as they are, where the update is a product of some.

    Raises:
        BackendError: the update changes with the input.
        ConfigError: it is no product of A and B (DoRA) and no rank is given; the rank is none that the layers have; or
            its start has quantized the base (LoftQ).
    """
    inner, config = model.get_base_model(), model.peft_config[name]
    require_dense_base(config)
    layers = require_matrices(inner, name)
    names = pattern_names(inner)
    lost, factors = None, {}
    if rank is not None:
        made = convert(model, rank, name)
        lost = made.lost
        for path, layer in layers:
            key_A, key_B = (f"{path}.{key}" for key in layer.factor_names)
            factors[path] = made.tensors[key_A], made.tensors[key_B], 1.0
    else:
        require_product(layers, name)
        for path, layer in layers:
            A, B = exact_factors(layer, name)
            adapter = layer.adapters[name]
            factors[path] = layer.stored_A(A).detach(), layer.stored_B(B).detach(), float(adapter.scaling)
        for path, layer in layers:
            for child in layer.inner_layers:  # PEFT applies it twice, and it has the numbers of the layer around it
                A, B, own = factors[f"{path}.base_layer.{child}"]
                around = factors[path][2]
                factors[f"{path}.base_layer.{child}"] = A, own / (2 * around) * B, around
    updates = tuple(_of_layer(path, layer, name, names, factors[path]) for path, layer in layers)
    rest = _without_copies(inner, beside(inner, name, config), (path for path, _ in layers))
    return PlainAdapter(str(source), plain_config(config), updates, rest, base_fingerprint(inner, adapter=name), lost)


def require_product(layers: Iterable[tuple[str, LoraLayer]], name: str) -> None:
    """Raises ConfigError where the update of a layer is no product of A and B."""
    for path, layer in layers:
        variant = layer.adapters[name].variant
        if not variant.plain:
            raise ConfigError(
                f"The update of {variant.name} is of full rank: that of {path!r} is no product of A and B. Give a rank "
                "to have the nearest LoRA of it and be told what is lost (--rank 64, or --rank 0.99 for a share of the "
                "energy), or write the whole model with the update in its weights: --merged."
            )


def _of_layer(
    path: str,
    layer: LoraLayer,
    name: str,
    names: Mapping[int, str],
    factors: tuple[Tensor, Tensor, float],
) -> Update:
    (A, B, s), adapter = factors, layer.adapters[name]
    bias, scaled = adapter.bias, adapter.scaled_bias
    if bias is not None and scaled is not None:  # to the bit where the scaling stays
        bias = (bias if s == float(adapter.scaling) / adapter.times else scaled / s).detach()
    words = (
        "linear layers" if layer.is_linear else "embedding tables" if layer.is_table else f"layers of kind {layer.kind}"
    )
    rank = layer.matrix_A(A).shape[-2]
    return Update(
        path, A, B, s, rank, layer.factor_names, names.get(id(layer)), bias, layer.is_linear, layer.is_table, words
    )


def _without_copies(model: nn.Module, tensors: Mapping[str, Tensor], paths: Iterable[str]) -> dict[str, Tensor]:
    """Without the tables that are the base's own: PEFT writes a copy of each table that carries an adapter."""
    copies = {f"{path}.base_layer.weight" for path in paths}
    live = dict(model.named_parameters(remove_duplicate=False))
    return {
        key: tensor
        for key, tensor in tensors.items()
        if not (key in copies and key in live and torch.equal(live[key].detach().cpu(), tensor.cpu()))
    }


def at_rank(adapter: PlainAdapter, rank: int | float) -> PlainAdapter:
    """The adapter with the best factors of another rank, the scaling in B.

    Raises:
        ConfigError: ``rank`` is none, or none that a layer has; or a layer's factors are no matrices.
    """
    check_rank("rank", rank)
    updates, lost = [], {}
    for update in adapter.updates:
        if not update.is_matrix:
            raise ConfigError(
                f"{update.path!r} is one of the {update.what}, which are given another rank with the base model at "
                "hand only. Give it: --base <folder or Hub id>."
            )
        side = min(update.A.shape[1], update.B.shape[0])
        if isinstance(rank, int) and rank > side:
            raise ConfigError(
                f"rank {rank} is larger than {side}, the smaller side of the weight of {update.path!r}. Choose a lower "
                "one, or a share of the energy such as 0.99."
            )
        A, B = (factor.to(working_dtype(factor.dtype)) for factor in (update.A, update.B))
        made = truncated_product(A, update.scaling * B, rank)
        lost[update.path] = made.lost, made.total
        bias = None if update.bias is None else update.scaling * update.bias
        dtype = update.B.dtype
        updates.append(replace(update.with_factors(made.A.to(dtype), made.B.to(dtype), 1.0), bias=bias))
    return replace(adapter, updates=tuple(updates), lost=Lost(lost))
