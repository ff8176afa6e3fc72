"""Does a file fit? Every key is accounted for in both directions, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lorafa.errors import CheckpointError, nearest, shape_text, shorten
from lorafa.variants import VARIANTS, asking_settings

Shape = tuple[int, ...]
LIMIT = 8
"""Lines shown of each kind."""

# Tensors that belong to one setting: where only one side has them, the setting differs. Variants add their own.
_SETTING_OF_KEY = {
    "lora_B.bias": "lora_bias",
    "token_adapter.trainable_tokens_delta": "trainable_token_indices",
}
# Keys with a vocabulary axis: the embedding's A, a saved embedding or head, and B of an adapted head. What follows the
# last "embed" of a word is all that is looked at: a key may be long.
_VOCABULARY_KEY = re.compile(
    r"lora_embedding_A|(embed(?:(?!embed)\w)*|wte|shared|lm_head)\.((token_adapter\.)?base_layer\.|lora_B\.)?weight$"
)
_LAYER_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Misfit:
    """What keeps a file from fitting; all empty when it fits."""

    missing: list[str]
    """Keys the model wants and the file does not have."""
    unexpected: list[str]
    """Keys the file has and the model does not want."""
    misshapen: dict[str, tuple[Shape, Shape]]
    """Key -> (shape in the file, shape in the model)."""
    have: dict[str, Shape]
    want: dict[str, Shape]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def raise_if_any(self, path: str | Path, adapter: str) -> None:
        """Refuse the file, listing up to 8 keys of each kind and the likely cause.

        Raises:
            CheckpointError: something is missing, unexpected or misshapen.
        """
        if self:
            raise self.error(path, adapter)

    def error(self, path: str | Path, adapter: str) -> CheckpointError:
        """What keeps the file from fitting, in words."""
        return CheckpointError(f"{path} does not fit adapter {adapter!r}.\n{self.describe()}\nNothing was loaded.")

    def only_more(self) -> bool:
        """Whether the file fits but for tensors of layers on which the adapter has nothing.

        More of a layer that has the adapter (a magnitude, a bias) is another formula, and without it other numbers.
        """
        if self.missing or self.misshapen or not self.unexpected:
            return False
        adapted = {_owner(key) for key in self.want}
        return not any(_owner(key) in adapted for key in self.unexpected)

    def describe(self) -> str:
        shapes = [
            f"{key}: the file has {shape_text(have)}, the model {shape_text(want)}"
            for key, (have, want) in self.misshapen.items()
        ]
        parts = [
            _listing(
                "missing in the file",
                [k + _nearest(k, self.unexpected) for k in self.missing[:LIMIT]],
                len(self.missing),
            ),
            _listing(
                "not in the model",
                [k + _nearest(k, self.missing) for k in self.unexpected[:LIMIT]],
                len(self.unexpected),
            ),
            _listing("of another shape", shapes[:LIMIT], len(shapes)),
            *likely_causes(self),
        ]
        return "\n".join(part for part in parts if part)


def _owner(key: str) -> str:
    """The layer that a tensor of a file is of, or the whole name of what is no tensor of a layer's adapter."""
    return next((key.partition(mark)[0] for mark in (".lora_", ".token_adapter.") if mark in key), key)


def require_floats(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for factors that are whole numbers: codes of a quantizer, which nobody here reads."""
    whole_numbers = [k for k, tensor in tensors.items() if ".lora_" in k and not tensor.dtype.is_floating_point]
    if whole_numbers:
        raise CheckpointError(
            f"{path} holds whole numbers ({tensors[whole_numbers[0]].dtype}) where an adapter has fractions: "
            f"{shorten(whole_numbers, 3)}. It is damaged, or quantized: save it in a floating-point format. Nothing "
            "was loaded."
        )


def compare(have: Mapping[str, Tensor | Shape], want: Mapping[str, Tensor | Shape]) -> Misfit:
    """Compare the tensors of a file (``have``) with those a model expects (``want``); values are tensors or shapes."""
    file, model = _shapes(have), _shapes(want)
    return Misfit(
        missing=sorted(model.keys() - file.keys()),
        unexpected=sorted(file.keys() - model.keys()),
        misshapen={k: (file[k], model[k]) for k in sorted(file.keys() & model.keys()) if file[k] != model[k]},
        have=file,
        want=model,
    )


def _shapes(tensors: Mapping[str, Tensor | Shape]) -> dict[str, Shape]:
    return {key: tuple(value.shape) if isinstance(value, Tensor) else tuple(value) for key, value in tensors.items()}


def _listing(title: str, lines: list[str], count: int) -> str:
    more = [f"... and {count - len(lines)} more"] if count > len(lines) else []
    return "\n    ".join([f"  {title} ({count}):", *lines, *more]) if count else ""


def _nearest(key: str, others: list[str]) -> str:
    close = nearest(key, others, cutoff=0.8)
    return f"  (nearest on the other side: {close})" if close else ""


def likely_causes(misfit: Misfit) -> list[str]:
    """What usually explains such a misfit, as sentences that say what to do; empty when nothing is recognised."""
    found = [
        _other_path(misfit) or _other_depth(misfit) or _nothing_in_common(misfit),
        *_other_settings(misfit),
        _other_rank(misfit),
        _other_vocabulary(misfit),
    ]
    return [cause for cause in found if cause]


def _other_path(misfit: Misfit) -> str | None:
    """Names that agree once a part of the path is exchanged, cut out or put in, such as ``base_model.model.``."""
    if not misfit.missing or not misfit.unexpected:
        return None
    model = misfit.missing[0].split(".")
    file = max((key.split(".") for key in misfit.unexpected), key=lambda parts: _agreeing(parts[::-1], model[::-1]))
    end = _agreeing(file[::-1], model[::-1])
    if end < 2:  # the kind of tensor alone ("lora_A.weight" has two parts) says nothing about the path
        return None
    start = _agreeing(file[:-end], model[:-end])
    in_file, in_model = file[start:-end], model[start:-end]
    moved = {_exchanged(key.split("."), start, in_file, in_model) for key in misfit.unexpected}
    explained = len(moved & set(misfit.missing))
    if explained * 2 <= len(misfit.missing) or any(part.isdigit() for part in in_file + in_model):
        return None
    place = f"after {'.'.join(file[:start])!r}" if start else "at the start"
    return (
        f"{explained} names differ only {place}: the file has {'.'.join(in_file)!r}, the model {'.'.join(in_model)!r}. "
        "The file was made with another wrapping of the model: load it on the same class, or rename its keys."
    )


def _agreeing(one: list[str], other: list[str]) -> int:
    """How many parts two paths have in common at their start."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))


def _exchanged(key: list[str], start: int, old: list[str], new: list[str]) -> str:
    fits = key[start : start + len(old)] == old
    return ".".join(key[:start] + new + key[start + len(old) :]) if fits else ""


def _layer_numbers(keys: Iterable[str]) -> set[int]:
    return {int(match[1]) for key in keys if (match := _LAYER_NUMBER.search(key))}


def _other_depth(misfit: Misfit) -> str | None:
    file, model = _layer_numbers(misfit.have), _layer_numbers(misfit.want)
    if not file or not model or file == model:
        return None
    return (
        f"The file has layers {_range(file)}, the model {_range(model)}: the depth or layers_to_transform differs. "
        "Load it on a model of the depth it was made for."
    )


def _range(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    whole = len(numbers) == high - low + 1
    return (f"{low}..{high}" if high > low else str(low)) if whole else shorten(map(str, sorted(numbers)), 40)


def _nothing_in_common(misfit: Misfit) -> str | None:
    if misfit.have.keys() & misfit.want.keys() or not misfit.have or not misfit.want:
        return None
    return (
        "No name is in both: the file is for another architecture or other target_modules. Compare its adapter_config."
    )


def _other_settings(misfit: Misfit) -> list[str]:
    causes = []
    asking = asking_settings()
    extras = {extra.holder: asking[name] for name in asking for extra in VARIANTS.get(name).extras.values()}
    for part, setting in (_SETTING_OF_KEY | extras).items():
        for keys, owner, other in ((misfit.unexpected, "file", "model"), (misfit.missing, "model", "file")):
            opposite = misfit.want if owner == "file" else misfit.have
            if any(part in key for key in keys) and not any(part in key for key in opposite):
                causes.append(f"Only the {owner} uses {setting}, the {other} does not: the two configs differ.")
    return causes


def _other_rank(misfit: Misfit) -> str | None:
    pairs = [pair for key, pair in misfit.misshapen.items() if ".lora_A" in key or ".lora_embedding_A" in key]
    ranks = {(file[0], model[0]) for file, model in pairs if file[1:] == model[1:]}
    if not pairs or len(ranks) != 1:
        return None
    ((file_rank, model_rank),) = ranks
    return f"The file has rank {file_rank}, the adapter rank {model_rank}. Make the adapter with r={file_rank}."


def _other_vocabulary(misfit: Misfit) -> str | None:
    for key, (file, model) in misfit.misshapen.items():
        axis = 1 if "lora_embedding_A" in key else 0
        if "lora_embedding_B" in key or not _VOCABULARY_KEY.search(key) or len(file) != 2 or len(model) != 2:
            continue
        if file[axis] != model[axis] and file[1 - axis] == model[1 - axis]:
            return (
                f"The file has a vocabulary of {file[axis]}, the model of {model[axis]}. Call "
                f"model.resize_token_embeddings({file[axis]}) before loading."
            )
    return None
