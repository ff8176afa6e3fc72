"""The update of each layer of an adapter, as its file has it: no model is needed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lorafa.adapter import Variant, update_factors
from lorafa.config import LoraConfig
from lorafa.errors import CheckpointError, shorten
from lorafa.io.adapter_files import StoredAdapter
from lorafa.io.factors import FileFactors, Pair, around, file_factors
from lorafa.io.layouts.base import OWN_LAYER, block_diagonal, taken_apart
from lorafa.io.layouts.written import stack_of
from lorafa.io.peft_format import START_A, START_B
from lorafa.layers.base import LoraLayer
from lorafa.layers.slots import used_factors
from lorafa.models.checkpoint_names import natural_order
from lorafa.surgery.patterns import numbers_of
from lorafa.surgery.walk import joined, lora_layers, uncompiled_name


@dataclass(frozen=True)
class LayerUpdate:
    """s B A of one layer, and what else there is to know of it."""

    name: str
    """The layer's dotted name in the model, or that of the parameter."""
    A: Tensor
    """(r, in), or (E, r, in) for a stack of experts; kernels are flattened."""
    B: Tensor
    """(out, r) or (E, out, r)."""
    scaling: float
    rank: int
    """The rank that the config gives the layer."""
    alpha: float
    formula: str
    """What the update is made by: "lora", "dora over kasa" ..."""
    complete: bool = True
    """Whether the update is s B A; not where its formula makes something else of that and of the base weight."""
    everywhere: bool = True
    """Whether it is added to every token alike."""

    @property
    def kind(self) -> str:
        """The last part of the name, which the layers of all blocks have in common: q_proj."""
        return self.name.rpartition(".")[2]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the update: (out, in) or (E, out, in)."""
        return (*self.B.shape[:-1], self.A.shape[-1])

    @property
    def numbers(self) -> int:
        """How many numbers its dense factors have."""
        return self.A.numel() + self.B.numel()


def updates_of(stored: StoredAdapter) -> list[LayerUpdate]:
    """The updates an adapter file holds, in the order of their names, with numbers read as numbers.

    Raises:
        CheckpointError: a layer has one factor only, or factors that do not go with each other or with the config.
    """
    found = file_factors(stored, stored.config)
    return [_update(path, found, stored) for path in sorted(found.pairs, key=natural_order)]


def updates_in(model: nn.Module, name: str) -> list[tuple[LayerUpdate, LoraLayer]]:
    """The same of adapter ``name`` of a model, each with its layer."""
    made = []
    for path, layer in lora_layers(model):
        if not layer.has_update(name):
            continue
        adapter, place = layer.adapters[name], uncompiled_name(path)
        if layer.parameter_name is not None:
            place = joined(_module_of(place), layer.parameter_name)
        A, B = _with_zeros(*(factor.detach() for factor in used_factors(layer, name)))
        made.append((
            LayerUpdate(
                place, A, B, float(adapter.scaling), adapter.rank, adapter.alpha, adapter.variant.name,
                _is_product(adapter.variant), adapter.variant.uniform,
            ),
            layer,
        ))  # fmt: skip
    return sorted(made, key=lambda found: natural_order(found[0].name))


def beside(stored: StoredAdapter) -> dict[str, int]:
    """What else the file holds, by the key of its tensor, with its size: copied modules, rows, tables, biases."""
    return {key: tensor.numel() for key, tensor in taken_apart(stored.tensors)[1].items()}


def _update(path: str, found: FileFactors, stored: StoredAdapter) -> LayerUpdate:
    config, pair, outside = stored.config, found.pairs[path], around(path)
    name, rank, is_parameter = _named(path, pair, stored)
    alpha = numbers_of(config, name if outside is None else outside)[1]
    scaling = (1 if outside is None else 2) * config.scaling(rank, alpha)  # PEFT multiplies an inner layer in twice
    variant = found.formula(name, rank, scaling)
    in_file = 2 * rank if stored.with_start and variant.stacks_start else rank

    def matrices(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return _stack(A, B, in_file) if is_parameter else (A.flatten(1), B.flatten(1))

    A, B, _ = found.dense(path, variant, *matrices(pair.A, pair.B), in_file)
    starts = [pair.tensors[key] for key in (START_A, START_B) if key in pair.tensors]
    alike = [(s.shape, s.dtype) for s in starts] == [(f.shape, f.dtype) for f in (pair.A, pair.B)]
    start = matrices(*starts) if alike else None
    if starts and start is None:
        raise CheckpointError(
            f"{stored.path}: {START_A} and {START_B} of {name!r} are not of the shapes and dtypes of A and B. The file "
            "is damaged: fetch or save it again."
        )
    A, B = update_factors(*_with_zeros(A, B), None if start is None else _with_zeros(*start))
    product, uniform = _is_product(variant), variant.uniform
    return LayerUpdate(name, A, B, scaling, rank, alpha, variant.name, product, uniform)


def _is_product(variant: Variant) -> bool:
    """Whether the update, where it counts, is s B A."""
    return all(one.plain for one in variant.chain() if one.stage != "gate")


def _named(path: str, pair: Pair, stored: StoredAdapter) -> tuple[str, int, bool]:
    """The name of the layer or parameter a path is of, the rank the config gives it, and whether it is a parameter.

    Raises:
        CheckpointError: parameters of one module have ranks of their own, and the file does not say which it is.
    """
    config, module, outside = stored.config, _module_of(path), around(path)
    parameters = _parameters_of(module, config)
    if not parameters:
        return path, numbers_of(config, path if outside is None else outside)[0], False
    names = [joined(module, parameter) for parameter in parameters]
    ranks = {numbers_of(config, name)[0] for name in names}
    fitting = [rank for rank in ranks if pair.A.shape[0] % rank == 0 and pair.A.shape[0] == pair.B.shape[1]]
    if len(ranks) > 1 and len(fitting) > 1:
        raise CheckpointError(
            f"{stored.path}: {path!r} has the factors of one of {shorten(parameters, 4)}, whose ranks differ, and a "
            "file does not say of which. Give the base model: --base <model>."
        )
    return names[0] if len(names) == 1 else path, (fitting or sorted(ranks))[0], True


def _module_of(path: str) -> str:
    """The module whose parameters nested layers adapt."""
    while path.endswith(OWN_LAYER) or path == OWN_LAYER[1:]:
        path = path.removesuffix(OWN_LAYER[1:]).removesuffix(".")
    return path


def _parameters_of(module: str, config: LoraConfig) -> list[str]:
    """The parameters of a module that ``target_parameters`` names, by their last names."""
    named = (entry.rpartition(".") for entry in config.target_parameters or ())
    return sorted({last for inside, _, last in named if not inside or f".{module}".endswith(f".{inside}")})


def _with_zeros(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """B (out, r) of a convolution with groups, which stores (out, r / groups): the columns of an output's own group."""
    groups = A.shape[-2] // B.shape[-1]
    if groups > 1 and A.shape[-2] == groups * B.shape[-1]:
        B = block_diagonal(B.chunk(groups))
    return A, B


def _stack(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (E, r, in) and B (E, out, r) of the layout of a file, (E r, in) and (out, r E), or both as they are."""
    experts = A.shape[0] // rank if A.shape[0] == B.shape[1] and A.shape[0] % rank == 0 else 1
    if experts == 1:
        return A, B
    return stack_of(A, B, experts)
