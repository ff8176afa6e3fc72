"""A and B of each layer out of the tensors of a file, without any model: in pairs, checked, and as dense matrices."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lorafa.adapter import LooseTensors, Variant
from lorafa.config import LoraConfig
from lorafa.errors import CheckpointError, first_line, shorten
from lorafa.io.adapter_files import StoredAdapter
from lorafa.io.dense_factors import STORED_A, STORED_B, unfolds
from lorafa.io.layouts.base import BIAS, OWN_LAYER, TABLE_A, TABLE_B, A, B, taken_apart
from lorafa.io.peft_format import START_A, START_B
from lorafa.layers import LAYERS
from lorafa.spec import LayerSpec
from lorafa.variants import VARIANTS, formula_of, variant_types

_KEYS = ((A, B), (TABLE_A, TABLE_B))


@dataclass(frozen=True)
class Pair:
    """The tensors of one layer as a file has them."""

    keys: tuple[str, str]
    """What A and B are called below the path of the layer."""
    tensors: dict[str, Tensor]
    """All of the layer's, by their names below its path."""

    @property
    def A(self) -> Tensor:
        return self.tensors[self.keys[0]]

    @property
    def B(self) -> Tensor:
        return self.tensors[self.keys[1]]

    @property
    def bias(self) -> Tensor | None:
        return self.tensors.get(BIAS)


@dataclass(frozen=True)
class FileFactors:
    """The tensors of an adapter file, layer by layer, and the formulas that its config asks for."""

    file: Path
    config: LoraConfig
    types: tuple[type[Variant], ...]
    pairs: dict[str, Pair]
    """By the path of the layer, in the order of the file."""
    rest: dict[str, Tensor]
    """What belongs to no layer: copies of modules, rows of tables, whole tables, biases of the base."""
    unfolded: bool
    """Whether factors that a formula stores in a form of its own are in the file as dense ones."""

    def formula(self, name: str, rank: int, scaling: float) -> Variant:
        """The formula on one layer."""
        return formula_of(self.types, self.config, LayerSpec(name, "linear", rank, scaling, self.config.seed))

    def dense(self, path: str, formula: Variant, A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, int]:
        """Dense factors A (..., r, in) and B (..., out, r / groups) of a layer, and groups: 1 but for convolutions.

        Args:
            A, B: those of the pair in the same shapes, kernels flattened and stacks of experts apart.
            rank: that the file should hold for the layer.

        Raises:
            CheckpointError: a tensor is missing that the formula computes with, or shapes do not fit.
        """
        pair = self.pairs[path]
        if not (formula.has_dense_files and (self.unfolded or not formula.peft_stores)):
            A, B = self._by_formula(path, formula, A, B)
        groups = rank // B.shape[-1]
        fits = pair.A.dim() == pair.B.dim() and A.dim() == B.dim() and (groups == 1 or pair.A.dim() > 2)
        if not fits or A.shape[-2] != rank or groups * B.shape[-1] != rank:
            raise CheckpointError(
                f"{self.file}: A and B of {path} are {tuple(pair.A.shape)} and {tuple(pair.B.shape)}, and the config "
                f"says rank {rank}. Config and tensors are not of one adapter: fetch or save both again."
            )
        return A, B, groups

    def _by_formula(self, path: str, formula: Variant, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The dense factors of stored ones and of what the formula has beside them."""
        keys = {kind: extra.in_files for kind, extra in formula.extras.items() if extra.saved}
        tensors = self.pairs[path].tensors
        if missing := [kind for kind, key in keys.items() if key not in tensors]:
            raise CheckpointError(
                f"{self.file} lacks the {shorten(map(repr, missing), 3)} of {path!r}, which {formula.name} needs. The "
                "file is incomplete: fetch or save it again."
            )
        try:
            return formula.factors(LooseTensors(A, B, {kind: tensors[key] for kind, key in keys.items()}))
        except RuntimeError as error:
            raise CheckpointError(
                f"{self.file}: the tensors of {path!r} are not those of {formula.name}: {first_line(error)}. They do "
                "not belong together: fetch or save the file again."
            ) from error


def file_factors(stored: StoredAdapter, config: LoraConfig) -> FileFactors:
    """Take the tensors of an adapter file apart.

    Args:
        config: the one of the file, for which the factors are as any reader of LoRA has them; or that of the adapter.

    Raises:
        CheckpointError: there are no factors; a layer has one of A and B alone, or they are no matrices of numbers; or
            a tensor belongs to no formula that the config asks for.
    """
    file, (layers, rest) = stored.path, taken_apart(stored.tensors)
    types = variant_types(config)
    pairs = {path: Pair(keys, own) for path, own in layers.items() for keys in _KEYS if not own.keys().isdisjoint(keys)}
    if not pairs:
        raise CheckpointError(
            f"{file} holds no factors of a LoRA adapter; its keys are: {shorten(stored.tensors, 3) or '(none)'}. Is "
            "it an adapter of another method, or written by another library? Name the folder of a LoRA adapter."
        )
    if halves := [path for path, pair in pairs.items() if not pair.tensors.keys() >= set(pair.keys)]:
        raise CheckpointError(
            f"{file} has A or B alone of {len(halves)} layers: {shorten(halves, 3)}. The file is incomplete: fetch or "
            "save it again."
        )
    if odd := [path for path, pair in pairs.items() if not (_is_factor(pair.A) and _is_factor(pair.B))]:
        raise CheckpointError(
            f"{file}: the factors of {len(odd)} layers are no matrices of numbers: {shorten(odd, 3)}. Fetch or save "
            "the file again."
        )
    beside = _beside(types, ours=bool(stored.base))
    known = {path: beside.union(pair.keys, (BIAS,) if pair.keys == (A, B) else ()) for path, pair in pairs.items()}
    if unknown := [f"{path}.{key}" for path, own in layers.items() for key in own if key not in known.get(path, ())]:
        raise CheckpointError(
            f"{file} holds {len(unknown)} tensors that its config does not speak of: {shorten(unknown, 3)}. Its update "
            "is not known. Fetch the adapter again."
        )
    return FileFactors(file, config, types, pairs, rest, unfolds(stored.tensors, stored.with_start))


def around(path: str) -> str | None:
    """The layer that brings one along which is inside of it, as nn.MultiheadAttention does its ``out_proj``; else None.

    PEFT multiplies the update of a file in twice there.
    """
    outside, found, child = path.rpartition(f"{OWN_LAYER}.")
    return outside if found and any(child in LAYERS.get(kind).inner_layers for kind in LAYERS.names()) else None


def _is_factor(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() >= 2 and 0 not in tensor.shape


def _beside(types: Collection[type[Variant]], *, ours: bool) -> frozenset[str]:
    """What a layer may have in a file beside its factors, by the names there.

    Args:
        ours: the file is of this library, which keeps the stored form of factors, and starts, beside dense factors.
    """
    known = [VARIANTS.get(name) for name in VARIANTS.names()] if ours else types
    names = {extra.in_files for one in known for extra in one.extras.values() if extra.saved}
    starts = set() if all(one.plain for one in types) else {START_A, START_B}  # a plain one's is in its factors
    return frozenset(names | ({STORED_A, STORED_B} | starts if ours else set()))
