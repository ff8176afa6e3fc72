"""The update of each layer of an adapter, as its file has it: no model is needed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafa.adapter import LooseTensors, Variant, update_factors
from lorafa.config import LoraConfig
from lorafa.errors import CheckpointError, first_line, shorten
from lorafa.io.adapter_files import StoredAdapter
from lorafa.io.peft_format import START_A, START_B
from lorafa.layers import LAYERS
from lorafa.layers.base import LoraLayer
from lorafa.layers.slots import used_factors
from lorafa.spec import LayerSpec
from lorafa.surgery.targets import key_of
from lorafa.surgery.walk import lora_layers, uncompiled_name
from lorafa.variants import formula_of, variant_types

_FACTOR = re.compile(r"(?:(.*)\.)?(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)")
_NESTED = ".base_layer"
_UNFOLDED = ".lora_unfolded."


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
        """That of the update: (out, in) or (E, out, in)."""
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
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.tensors.items():
        if found := _FACTOR.fullmatch(key):
            factors.setdefault(found[1] or "", {})[found[2].removesuffix(".weight")[-1]] = tensor
    if not factors:
        raise CheckpointError(
            f"{stored.path} holds no factors of LoRA; its keys are: {shorten(stored.tensors, 3) or '(none)'}. Is it "
            "an adapter of another method, or written by another library? Name the folder of a LoRA adapter."
        )
    halves = sorted(path for path, pair in factors.items() if len(pair) < 2)
    if halves:
        raise CheckpointError(
            f"{stored.path} has A or B alone of {len(halves)} layers: {shorten(halves, 3)}. The file is incomplete: "
            "fetch or save it again."
        )
    odd = sorted(path for path, pair in factors.items() if not all(map(_can_be_factor, pair.values())))
    if odd:
        raise CheckpointError(
            f"{stored.path}: the factors of {len(odd)} layers are no matrices of numbers: {shorten(odd, 3)}. Fetch or "
            "save the file again."
        )
    types = variant_types(stored.config)
    paths = sorted(factors, key=_in_order)
    return [_update(path, factors[path]["A"], factors[path]["B"], types, stored) for path in paths]


def updates_in(model: nn.Module, name: str) -> list[tuple[LayerUpdate, LoraLayer]]:
    """The same of adapter ``name`` of a model, each with its layer."""
    made = []
    for path, layer in lora_layers(model):
        if not layer.has_update(name):
            continue
        adapter, place = layer.adapters[name], uncompiled_name(path)
        if layer.parameter_name is not None:
            place = f"{_module_of(place)}.{layer.parameter_name}".removeprefix(".")
        A, B = _with_zeros(*(factor.detach() for factor in used_factors(layer, name)))
        made.append((
            LayerUpdate(
                place, A, B, float(adapter.scaling), adapter.rank, adapter.alpha, adapter.variant.name,
                _is_product(adapter.variant), adapter.variant.uniform,
            ),
            layer,
        ))  # fmt: skip
    return sorted(made, key=lambda found: _in_order(found[0].name))


def beside(stored: StoredAdapter) -> dict[str, int]:
    """What else the file holds, by the key of its tensor, with its size: copied modules, rows, tables, biases."""
    sizes = {key: tensor.numel() for key, tensor in stored.tensors.items()}
    return {key: size for key, size in sizes.items() if not _FACTOR.fullmatch(key) and "lora_" not in key}


def _update(path: str, A: Tensor, B: Tensor, types: Sequence[type[Variant]], stored: StoredAdapter) -> LayerUpdate:
    config, tensors = stored.config, stored.tensors
    name, rank, is_parameter = _named(path, A, B, stored)
    alpha_key = key_of(config.alpha_pattern, name)
    alpha = config.lora_alpha if alpha_key is None else config.alpha_pattern[alpha_key]
    scaling = _times(path) * config.scaling(rank, alpha)
    variant = formula_of(types, config, LayerSpec(name=name, kind="", rank=rank, scaling=scaling, seed=config.seed))
    in_file = 2 * rank if stored.with_start and variant.stacks_start else rank

    def matrices(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return _stack(A, B, in_file) if is_parameter else _flat(A, B)

    loose = LooseTensors(*matrices(A, B), _extras(path, variant, tensors))
    dense = variant.has_dense_files and _holds_dense(stored, variant)
    A, B = (loose.A, loose.B) if dense else _dense(path, variant, loose, stored)
    if A.dim() != B.dim() or A.shape[-2] != B.shape[-1] or A.shape[-2] != in_file:
        raise CheckpointError(
            f"{stored.path}: the factors of {name!r} have ranks {A.shape[-2]} and {B.shape[-1]}, and its config says "
            f"{in_file}. They do not belong together: fetch or save both files again."
        )
    starts = [tensors[key] for key in (_key(path, START_A), _key(path, START_B)) if key in tensors]
    start = matrices(*starts) if len(starts) == 2 and all(map(_can_be_factor, starts)) else None
    if starts and (start is None or [(one.shape, one.dtype) for one in start] != [(f.shape, f.dtype) for f in (A, B)]):
        raise CheckpointError(
            f"{stored.path}: {START_A} and {START_B} of {name!r} are not of the shapes and dtypes of A and B. The file "
            "is damaged: fetch or save it again."
        )
    A, B = update_factors(A, B, start)
    product, uniform = _is_product(variant), variant.uniform
    return LayerUpdate(name, A, B, scaling, rank, alpha, variant.name, product, uniform)


def _can_be_factor(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() >= 2 and 0 not in tensor.shape


def _is_product(variant: Variant) -> bool:
    """Whether the update, where it counts, is s B A."""
    return all(one.plain for one in variant.chain() if one.stage != "gate")


def _holds_dense(stored: StoredAdapter, variant: Variant) -> bool:
    """Whether a file has dense factors where the variant stores others."""
    return stored.with_start or any(_UNFOLDED in key for key in stored.tensors) or not variant.peft_stores


def _in_order(path: str) -> list[tuple[int, int, str]]:
    """Numbers in a name by their size, so that layer 10 comes after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.split(".")]


def _times(path: str) -> int:
    """How often the update of a file is applied: PEFT multiplies the inner layer of attention in twice."""
    inner = {child for kind in LAYERS.names() for child in LAYERS.get(kind).inner_layers}
    return 2 if path.rpartition(f"{_NESTED}.")[2] in inner and f"{_NESTED}." in path else 1


def _named(path: str, A: Tensor, B: Tensor, stored: StoredAdapter) -> tuple[str, int, bool]:
    """The name of the layer or parameter a path is of, the rank the config gives it, and whether it is a parameter.

    Raises:
        CheckpointError: parameters of one module have ranks of their own, and the file does not say which it is.
    """
    config, module = stored.config, _module_of(path)
    parameters = _parameters_of(module, config)
    if not parameters:
        return path, _rank_of(path, config), False
    names = [f"{module}.{parameter}".removeprefix(".") for parameter in parameters]
    ranks = {_rank_of(name, config) for name in names}
    fitting = [rank for rank in ranks if A.shape[0] % rank == 0 and A.shape[0] == B.shape[1]]
    if len(ranks) > 1 and len(fitting) > 1:
        raise CheckpointError(
            f"{stored.path}: {path!r} has the factors of one of {shorten(parameters, 4)}, whose ranks differ, and a "
            "file does not say of which. Give the base model: --base <model>."
        )
    return names[0] if len(names) == 1 else path, (fitting or sorted(ranks))[0], True


def _module_of(path: str) -> str:
    """The module whose parameters nested layers adapt."""
    while path.endswith(_NESTED) or path == _NESTED[1:]:
        path = path.removesuffix(_NESTED[1:]).removesuffix(".")
    return path


def _parameters_of(module: str, config: LoraConfig) -> list[str]:
    """The parameters of a module that ``target_parameters`` names, by their last names."""
    named = (entry.rpartition(".") for entry in config.target_parameters or ())
    return sorted({last for inside, _, last in named if not inside or f".{module}".endswith(f".{inside}")})


def _rank_of(name: str, config: LoraConfig) -> int:
    key = key_of(config.rank_pattern, name)
    return config.r if key is None else config.rank_pattern[key]


def _flat(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices, of kernels too."""
    return (A, B) if A.dim() == 2 else _with_zeros(A.flatten(1), B.flatten(1))


def _with_zeros(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """B (out, r) of a convolution with groups, which stores (out, r / groups): the columns of an output's own group."""
    groups = A.shape[-2] // B.shape[-1]
    if groups > 1 and A.shape[-2] == groups * B.shape[-1]:
        B = torch.block_diag(*B.chunk(groups))  # type: ignore[no-untyped-call]
    return A, B


def _stack(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (E, r, in) and B (E, out, r) of the layout of a file, (E r, in) and (out, r E), or both as they are."""
    experts = A.shape[0] // rank if A.shape[0] == B.shape[1] and A.shape[0] % rank == 0 else 1
    if experts == 1:
        return A, B
    return A.reshape(experts, rank, -1), B.reshape(B.shape[0], rank, experts).permute(2, 0, 1)


def _key(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _extras(path: str, variant: Variant, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {kind: _key(path, extra.in_files) for kind, extra in variant.extras.items()}
    return {kind: tensors[key] for kind, key in named.items() if key in tensors}


def _dense(path: str, variant: Variant, tensors: LooseTensors, stored: StoredAdapter) -> tuple[Tensor, Tensor]:
    try:
        return variant.factors(tensors)
    except KeyError as error:
        raise CheckpointError(
            f"{stored.path} lacks the {error.args[0]!r} of {path!r}, which {variant.name} needs. The file is "
            "incomplete: fetch or save it again."
        ) from error
    except RuntimeError as error:
        raise CheckpointError(
            f"{stored.path}: the tensors of {path!r} are not those of {variant.name}: {first_line(error)}. They do not "
            "belong together: fetch or save the file again."
        ) from error
