"""An adapter read from its files layer by layer, without any model: A and B as matrices, and what else is there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorafa.adapter import LooseTensors, Variant
from lorafa.config import LoraConfig, read_config
from lorafa.errors import BackendError, CheckpointError, shorten
from lorafa.io.find import find_adapter_files
from lorafa.io.peft_format import without_prefix
from lorafa.spec import LayerSpec
from lorafa.storage.fingerprint import from_metadata
from lorafa.storage.tensors import read_header, read_tensors
from lorafa.surgery.available import require_available
from lorafa.surgery.targets import key_of
from lorafa.variants import VARIANTS, formula_of, variant_types

_A = re.compile(r"(.+)\.(lora_A\.weight|lora_embedding_A)")
_STORED = "lora_unfolded"
"""Under which our files hold factors as a formula stores them, beside the dense ones."""
_INSIDE = ".base_layer."
"""In the path of a layer that gets its adapters with the one around it: ``out_proj`` of nn.MultiheadAttention."""


@dataclass(frozen=True)
class LooseLayer:
    """One layer of an adapter: the update s B A, as any reader of LoRA has it."""

    path: str
    """The layer's, as it is in the keys."""
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
        return self.path.replace(_INSIDE, ".")

    @property
    def target(self) -> str | None:
        """The name a config has for it; None where another layer brings it along."""
        return None if _INSIDE in self.path else self.path

    @property
    def is_table(self) -> bool:
        """Whether it is on an embedding, where B has no bias."""
        return self.keys[0] != "lora_A.weight"

    @property
    def times(self) -> int:
        """How often a reader adds the update: PEFT adds that of an inner layer twice."""
        return 2 if _INSIDE in self.path else 1


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
    config, side = read_config(files.require_config()), from_metadata(read_header(files.weights))
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
        SourceError: folder, repository or file missing, or the Hub cannot be reached.
        CheckpointError: the file is damaged, holds values that are not finite, or tensors that its config does not
            speak of.
        ConfigError, NotAvailableError: the config is not one lorafa can carry out.
    """
    files = find_adapter_files(source)
    config, side = read_config(files.require_config()), from_metadata(read_header(files.weights))
    tensors = without_prefix(read_tensors(files.weights)[0])
    layers = {layer.path: layer for layer in _layers(files.weights, config, tensors, ours=bool(side))}
    if not layers:
        raise CheckpointError(f"{files.weights} holds no factors of a LoRA adapter. Is it the right file?")
    unknown = [key for key in tensors if "lora_" in key]
    if unknown:
        raise CheckpointError(
            f"{files.weights} holds {len(unknown)} tensors that its config does not speak of: {shorten(unknown, 3)}. "
            "Its update is not known. Fetch the adapter again."
        )
    return LooseAdapter(files.weights, config, layers, tensors, side.get("base", {}))


def _layers(file: Path, config: LoraConfig, tensors: dict[str, Tensor], *, ours: bool) -> Iterator[LooseLayer]:
    """The layers of a file; what they hold is taken out of ``tensors``."""
    types = variant_types(config)
    for key in [key for key in tensors if _A.fullmatch(key)]:
        match = _A.fullmatch(key)
        assert match is not None
        path, key_A = match[1], match[2]
        key_B = key_A.replace("_A", "_B")
        if f"{path}.{key_B}" not in tensors:
            raise CheckpointError(f"{file} has {key} and no {path}.{key_B}. It is damaged: fetch it again.")
        A, B = tensors.pop(key), tensors.pop(f"{path}.{key_B}")
        if min(A.dim(), B.dim()) < 2 or A.dim() != B.dim():
            raise CheckpointError(
                f"{file}: A and B of {path} are {tuple(A.shape)} and {tuple(B.shape)}, which are no two matrices or "
                "kernels. It is damaged: fetch it again."
            )
        bias = tensors.pop(f"{path}.lora_B.bias", None)
        rank, alpha = _numbers(config, path.partition(_INSIDE)[0])
        scaling = config.scaling(rank, alpha)
        formula = formula_of(types, config, LayerSpec(path, "linear", rank, scaling, config.seed))
        extras = _extras(file, path, formula, tensors)
        tails = (tuple(A.shape[1:]), tuple(B.shape[2:]))
        dense_A, dense_B = formula.factors(LooseTensors(A.flatten(1), B.flatten(1), extras))
        groups = rank // dense_B.shape[1]
        if dense_A.shape[0] != rank or groups * dense_B.shape[1] != rank or (groups > 1 and A.dim() < 3):
            raise CheckpointError(
                f"{file}: A and B of {path} are {tuple(A.shape)} and {tuple(B.shape)}, and the config says rank "
                f"{rank}. Config and tensors are not of one adapter: fetch both again."
            )
        if A.dim() == 2:
            tails = (tuple(dense_A.shape[1:]), ())
        if ours:
            _drop_stored_otherwise(path, tensors)
        yield LooseLayer(path, dense_A, dense_B, bias, alpha, scaling, groups, (key_A, key_B), tails)


def _numbers(config: LoraConfig, name: str) -> tuple[int, float]:
    """Rank and alpha of a layer."""
    rank, alpha = key_of(config.rank_pattern, name), key_of(config.alpha_pattern, name)
    return (
        config.r if rank is None else config.rank_pattern[rank],
        config.lora_alpha if alpha is None else config.alpha_pattern[alpha],
    )


def _extras(file: Path, path: str, formula: Variant, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a formula beyond A and B."""
    keys = {kind: f"{path}.{extra.in_files}" for kind, extra in formula.extras.items() if extra.saved}
    missing = [key for key in keys.values() if key not in tensors]
    if missing:
        raise CheckpointError(
            f"{file} lacks {shorten(missing, 3)}, which {formula.name} computes with. Fetch it again."
        )
    return {kind: tensors.pop(key) for kind, key in keys.items()}


def _drop_stored_otherwise(path: str, tensors: dict[str, Tensor]) -> None:
    """Take out what our files hold beside the dense A and B: the form that a formula stores them in."""
    extras = {extra.in_files for name in VARIANTS.names() for extra in VARIANTS.get(name).extras.values()}
    beside = [f"{path}.{name}" for name in extras]
    for key in [key for key in tensors if key in beside or key.startswith(f"{path}.{_STORED}.")]:
        del tensors[key]


def belongs_to_saved(key: str, config: LoraConfig) -> bool:
    """Whether a tensor belongs to a module, or to rows of a table, that the adapter has trained in full."""
    if key.endswith("trainable_tokens_delta"):
        return True
    parts = key.split(".")
    modules = [".".join(parts[:count]) for count in range(1, len(parts))]
    names: Mapping[str, None] = dict.fromkeys(config.modules_to_save or ())
    return any(module.endswith(name) or re.fullmatch(name, module) for module in modules for name in names)
