"""An adapter read from its files layer by layer, without any model: A and B as matrices, and what else is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorafa.config import LoraConfig, read_config
from lorafa.errors import BackendError, CheckpointError
from lorafa.io.adapter_files import StoredAdapter, read_adapter
from lorafa.io.factors import around, file_factors
from lorafa.io.find import find_adapter_files
from lorafa.io.own_entry import own_entry
from lorafa.settings.expressions import WHOLE, expressions
from lorafa.storage.tensors import read_header
from lorafa.surgery.available import require_available
from lorafa.surgery.patterns import numbers_of
from lorafa.variants import variant_types


@dataclass(frozen=True)
class LooseLayer:
    """One layer of an adapter: the update s B A, as any reader of LoRA has it."""

    path: str
    """The layer's, as it is in the keys."""
    outside: str | None
    """The layer that brings this one along (:func:`lorafa.io.factors.around`)."""
    A: Tensor
    """(r, in); of a convolution the kernels are flattened."""
    B: Tensor
    """(out, r), or (out, r / groups)."""
    bias: Tensor | None
    alpha: float
    scaling: float
    groups: int
    keys: tuple[str, str]
    """What A and B are called in the file, after the path."""
    tails: tuple[tuple[int, ...], tuple[int, ...]]
    """The shapes that a row of A and an entry of B are stored in: (in,) and (), or those of kernels."""

    @property
    def name(self) -> str:
        """The layer's name in a model that has no adapters yet."""
        return self.path if self.outside is None else f"{self.outside}.{self.path.rpartition('.')[2]}"

    @property
    def target(self) -> str | None:
        """The name a config has for it; None where another layer brings it along."""
        return self.path if self.outside is None else None

    @property
    def is_table(self) -> bool:
        """Whether it is on an embedding, where B has no bias."""
        return self.keys[0] != "lora_A.weight"

    @property
    def times(self) -> int:
        """How often a reader adds the update: PEFT adds that of an inner layer twice."""
        return 1 if self.outside is None else 2

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def stored(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of this layer, of any rank, in the shapes a file has."""
        tail_A, tail_B = self.tails
        return A.reshape(A.shape[0], *tail_A), B.reshape(*B.shape, *tail_B)


@dataclass(frozen=True)
class LooseAdapter:
    """An adapter whose every layer is a product of two factors."""

    path: Path
    config: LoraConfig
    """As it is in the file: plain LoRA, where the file has been made that."""
    layers: dict[str, LooseLayer]
    rest: dict[str, Tensor]
    """Tensors that belong to no layer: copies of modules, rows of embeddings, whole tables."""
    base: dict[str, Any]
    """Fingerprint of the base weights; empty for files of other libraries."""


def needs_base(source: str | Path) -> str | None:
    """Why an adapter says what it changes only together with its base; None where it does not need it.

    Raises:
        SourceError, ConfigError, NotAvailableError: it cannot be found, or its config cannot be used.
        BackendError: its update changes with the input.
        CheckpointError: its start has quantized the base.
    """
    files = find_adapter_files(source)
    if (config := files.peft_config()) is None:
        return "it is in the layout of another program, which is read with the names of the base's layers"
    side = own_entry(files.weights, read_header(files.weights))
    require_available(config)
    types = variant_types(config)
    if (routed := next((one for one in types if not one.uniform), None)) is not None:
        raise BackendError(
            f"{source}: the update of {routed.name} changes with the input, so there is no matrix that could be "
            "combined with others. Keep the adapter as it is."
        )
    if config.start.initializer.quantizer is not None or side.get("quantized"):
        raise CheckpointError(
            f"{source}: its start has quantized the base, and the update belongs to the codes: a combination, which is "
            "plain LoRA, would be loaded on the weights there were before. Merge it instead (merge_into_dense)."
        )
    if (formula := next((one for one in types if not one.plain), None)) is not None:
        return f"its formula, {formula.name}, is a change of the base weight"
    if config.start.initializer.moves_base:
        return (
            f"its start, init_lora_weights={config.init_lora_weights!r}, takes something out of the base that the file "
            "does not hold"
        )
    return "its file does not say which parameters it is on" if config.target_parameters else None


def read_loose(source: str | Path) -> LooseAdapter:
    """Read an adapter that needs no base (:func:`needs_base`).

    Raises:
        LoraError: as :func:`loose` and :func:`lorafa.io.adapter_files.read_adapter`.
    """
    return loose(read_adapter(source), read_config(find_adapter_files(source).require_config()))


def loose(stored: StoredAdapter, config: LoraConfig) -> LooseAdapter:
    """An adapter that needs no base, layer by layer.

    Args:
        config: the one in the file, which PEFT reads; ``stored`` has that of the adapter.

    Raises:
        CheckpointError: the file is damaged, or holds tensors that its config does not speak of.
    """
    found, layers = file_factors(stored, config), {}
    for path, pair in found.pairs.items():
        outside = around(path)
        rank, alpha = numbers_of(config, path if outside is None else outside)
        scaling = config.scaling(rank, alpha)
        formula = found.formula(path, rank, scaling)
        A, B, groups = found.dense(path, formula, pair.A.flatten(1), pair.B.flatten(1), rank)
        tails = ((A.shape[1],), ()) if pair.A.dim() == 2 else (tuple(pair.A.shape[1:]), tuple(pair.B.shape[2:]))
        layers[path] = LooseLayer(path, outside, A, B, pair.bias, alpha, scaling, groups, pair.keys, tails)
    return LooseAdapter(stored.path, config, layers, found.rest, stored.base)


def belongs_to_saved(key: str, config: LoraConfig) -> bool:
    """Whether a tensor belongs to a module, or to rows of a table, that the adapter has trained in full."""
    if key.endswith("trainable_tokens_delta"):
        return True
    parts = key.split(".")
    modules = [".".join(parts[:count]) for count in range(1, len(parts))]
    names = tuple(dict.fromkeys(config.modules_to_save or ()))
    ends = any(module.endswith(names) for module in modules)
    return ends or any(expressions("modules_to_save", names, WHOLE).first(module) is not None for module in modules)
