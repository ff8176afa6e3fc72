"""What a file of an adapter holds, layer by layer, whichever program wrote it; the two kinds of things that read it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorafa.adapter import scaling
from lorafa.config import LoraConfig
from lorafa.errors import CheckpointError, shorten
from lorafa.io.layouts.names import BaseNames
from lorafa.settings.expressions import fits
from lorafa.surgery.walk import dotted_ends

A, B, BIAS, NORMS = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"
TABLE_A, TABLE_B = "lora_embedding_A", "lora_embedding_B"
ROWS = frozenset({A, B, BIAS, NORMS})
"""Tensors of a linear layer of which each row, or each number, belongs to one output; but for A, which all share."""
_OF_ADAPTER = re.compile(r"^(.*)\.(lora_\w+(?:\.(?!lora_)\w+)*)$")
OWN_LAYER = ".base_layer"
"""What a wrapper calls the layer inside it; in names of files where one layer carries several adapters."""


@dataclass(frozen=True)
class Raw:
    """A file as it was read; nothing of it was looked at but the names of its tensors."""

    path: Path
    values: Mapping[str, Any]
    """What its ``adapter_config.json`` says; empty where there is none."""
    given: LoraConfig | None
    """The config that the caller wants used instead."""
    tensors: dict[str, Tensor]
    """By the names of :func:`lorafa.io.key_names.plain_names`."""
    header: Mapping[str, str]
    """The texts in the header of the file."""


@dataclass(frozen=True)
class Factors:
    """The tensors of one layer by PEFT's names for them, "lora_A.weight" (r, in) for example, with their numbers."""

    tensors: dict[str, Tensor]
    rank: int
    alpha: float


@dataclass(frozen=True)
class Contents:
    """An adapter taken apart."""

    path: Path
    config: LoraConfig
    """What holds for all layers; where its patterns and targets mean other layers, ``factors`` is right."""
    factors: dict[str, Factors]
    """By the name of the layer. A bare parameter has its full name once it was found in the model; as a file has it,
    it is the name of its module, ``.base_layer`` behind it for each parameter after it that has an adapter too."""
    others: dict[str, Tensor]
    """What is whole: copies of modules, tables, rows, biases of the base."""
    rearranged: bool = False
    """Whether layers were cut or put together, so that nothing made before from a layer's weight can be made again."""

    def scaling(self, factors: Factors) -> float:
        """Factor on B A of a layer."""
        return scaling(factors.rank, factors.alpha, self.config.use_rslora)

    def alpha(self, wanted: float, rank: int) -> float:
        """The alpha that gives a layer of ``rank`` the scaling ``wanted``."""
        return tidy(wanted / scaling(rank, 1, self.config.use_rslora))

    def B_at(self, wanted: float, factors: Factors) -> Tensor:
        """B (out, r) of a layer for the scaling ``wanted``; what that differs by from the layer's own is in it."""
        ratio = self.scaling(factors) / wanted
        return factors.tensors[B] if ratio == 1 else factors.tensors[B] * ratio

    def require_meant(self, name: str) -> None:
        """Raises CheckpointError where the config has a layer as a target of which the file holds nothing."""
        config = self.config
        if config.layers_to_transform not in (None, []) or name in self.factors:
            return
        if means(config.target_modules, name) and not means(config.exclude_modules, name):
            raise CheckpointError(
                f"{self.path} has no tensors of {name}, which target_modules of its config names. Fetch the file "
                "again. Nothing was loaded."
            )

    def replaced(self, gone: Collection[str], made: Mapping[str, Factors]) -> Contents:
        """With layers of another cut in the place of some."""
        kept = {name: factors for name, factors in self.factors.items() if name not in gone}
        return replace(self, factors=kept | dict(made), rearranged=True)


def means(wanted: Collection[str] | str | None, name: str) -> bool:
    """Whether a regular expression, or names and dotted ends, mean a layer."""
    if isinstance(wanted, str):
        return fits("target_modules", wanted, name)
    return any(end in (wanted or ()) for end in dotted_ends(name))


class Layout(ABC):
    """How a program writes the tensors of an adapter and what goes with them."""

    written_by: ClassVar[str]
    """The programs, for messages."""
    weights: ClassVar[tuple[str, ...]] = ()
    """What it calls its file, where that is not what PEFT calls it."""
    native: ClassVar[bool] = False
    """Whether it is PEFT's own: such a file is passed on as it is where its layers are those of the model."""

    @abstractmethod
    def detect(self, raw: Raw) -> str | None:
        """The name of a tensor, or a key of the config, that only this layout has; None where there is none."""

    @abstractmethod
    def read(self, raw: Raw, base: BaseNames) -> Contents:
        """The adapter that the file holds.

        Raises:
            CheckpointError, ConfigError: it holds what no LoRA adapter of PEFT can, or is not complete.
        """


class Arrangement(ABC):
    """How the layers of a file lie in those of the model, where they are not the same layers."""

    what: ClassVar[str]
    """What it takes for what, for messages."""

    @abstractmethod
    def claims(self, contents: Contents, base: BaseNames) -> set[str]:
        """The names in ``contents``, all of which the model lacks, that it knows how to place."""

    @abstractmethod
    def convert(self, contents: Contents, base: BaseNames) -> Contents:
        """The same update on the layers of the model.

        Raises:
            CheckpointError: the update of some layer cannot be written so without a change.
        """


def taken_apart(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Layer -> its tensors by PEFT's names, and what is no tensor of an adapter, of a file by PEFT's names."""
    layers: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _OF_ADAPTER.match(key)
        if match:
            layers.setdefault(match[1], {})[match[2]] = tensor
        else:
            others[key] = tensor
    return layers, others


def require_only(path: Path, name: str, factors: Factors, known: Collection[str], doing: str) -> None:
    """Raises CheckpointError where a layer has tensors of which nobody knows what ``doing`` would make."""
    if unknown := sorted(factors.tensors.keys() - set(known)):
        raise CheckpointError(
            f"{path}: {name} has {shorten(unknown, 3)} beside A and B, and {doing} would change what they mean. Merge "
            "the adapter into the model it was made for, or convert it there by convert_to_lora. Nothing was loaded."
        )
    if missing := sorted({A, B} - factors.tensors.keys()):
        raise CheckpointError(f"{path}: {name} has no {' and no '.join(missing)}. Nothing was loaded.")
    a, b = factors.tensors[A], factors.tensors[B]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"{path}: {name} has A {tuple(a.shape)} and B {tuple(b.shape)}, which are no (r, in) and (out, r), so "
            f"{doing} is not known. Nothing was loaded."
        )


def block_diagonal(parts: Collection[Tensor]) -> Tensor:
    """(sum of rows, sum of columns) with each part on the diagonal and zeros beside it."""
    made: Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]
    return made


def tidy(value: float) -> float:
    """A number that is whole up to rounding as the whole number."""
    return round(value) if round(value) > 0 and abs(value - round(value)) <= 1e-12 * abs(value) else value


def most_common(values: Collection[Any]) -> Any:
    """The value that occurs most often, the first of equals."""
    listed = list(values)
    return max(dict.fromkeys(listed), key=listed.count)
