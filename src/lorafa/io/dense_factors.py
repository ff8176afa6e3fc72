"""Dense factors in files, beside those that a variant stores: any reader of LoRA can use the former."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from lorafa.adapter import LooseTensors
from lorafa.errors import CheckpointError
from lorafa.layers.base import LoraLayer

Layers = list[tuple[str, LoraLayer]]
"""Layers with their paths in the user's model."""
_UNFOLDED = "lora_unfolded"
STORED_A, STORED_B = f"{_UNFOLDED}.A", f"{_UNFOLDED}.B"
"""What the stored factors are called below the path of a layer where their dense form has the usual names."""


def with_other_factors(layers: Layers, name: str) -> Layers:
    """The layers whose files hold the dense A and B beside those that the variant stores."""
    return [(path, layer) for path, layer in layers if layer.adapters[name].variant.has_dense_files]


def factor_keys(path: str, layer: LoraLayer) -> tuple[str, str]:
    key_A, key_B = layer.factor_names
    return f"{path}.{key_A}", f"{path}.{key_B}"


def unfolded(path: str, key: str) -> str:
    """The key of a stored factor whose dense form has its usual key: ``<path>.lora_unfolded.B``."""
    return f"{path}.{_UNFOLDED}.{key.removesuffix('.weight')[-1]}"  # lora_A, lora_embedding_B


def dense_factors(
    path: str, layer: LoraLayer, name: str, stored: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """By key the dense factors, in the layout of a file, that differ from the ``stored`` ones; extras are in values."""
    variant, (key_A, key_B) = layer.adapters[name].variant, factor_keys(path, layer)
    extras = {kind: values[f"{path}.{extra.in_files}"] for kind, extra in variant.extras.items() if extra.saved}
    loose = LooseTensors(layer.matrix_A(stored[key_A]), layer.matrix_B(stored[key_B]), extras)
    A, B = variant.factors(loose)
    made = {} if A is loose.A else {key_A: layer.stored_A(A)}
    return made if B is loose.B else made | {key_B: layer.stored_B(B)}


def as_stored(layers: Layers, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file with A and B in the form in which the variant stores them.

    Raises:
        CheckpointError: some dense factor is not what its stored form gives.
    """
    tensors = dict(tensors)
    for path, layer in with_other_factors(layers, name):
        keys = factor_keys(path, layer)
        stored = {key: tensors.pop(unfolded(path, key), tensors[key]) for key in keys}
        for key, made in dense_factors(path, layer, name, stored, tensors).items():
            wanted, found = made.float(), tensors[key].float()
            if bool((found - wanted).abs().max() > 0.01 * wanted.abs().max()):  # more than rounding in any dtype
                innermost = layer.adapters[name].variant.chain()[-1]
                between = " and ".join(e.holder for e in innermost.extras.values())
                made_of = f"times {between}" if between else f"in the dense form of {innermost.name}"
                raise CheckpointError(
                    f"{key} is not {unfolded(path, key)} {made_of}: one of them was changed since adapter {name!r} "
                    f"was saved. To go on from {key} as plain LoRA leave the adapter's other keys and the metadata out "
                    "of the file. Nothing was loaded."
                )
        tensors |= stored
    return tensors


def holds_dense(layers: Layers, name: str, tensors: Mapping[str, Tensor], with_start: bool) -> bool:
    """Whether a file has dense factors where the variant stores others; PEFT's files of such adapters do not."""
    if unfolds(tensors, with_start):
        return True
    return not all(layer.adapters[name].variant.peft_stores for _, layer in with_other_factors(layers, name))


def unfolds(tensors: Iterable[str], with_start: bool) -> bool:
    """Whether a file says that its factors are the dense ones: it has those that are stored beside them, or a start.

    Ours of a start that moves the base hold what was taken from it, PEFT's never do.
    """
    return with_start or any(f".{_UNFOLDED}." in key for key in tensors)
