"""Adapters as other programs, and other versions of a model, write them: how a file is read, and where its layers go.

A layout is how a program writes tensors and numbers; an arrangement is how the layers of a file lie in those of a model
that is cut otherwise. Both are sure or say nothing: a file that two of them claim, or none, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from lorafa.config import LoraConfig
from lorafa.errors import CheckpointError, nearest, shorten, warn
from lorafa.io.layouts.base import OWN_LAYER, Arrangement, Contents, Layout, Raw
from lorafa.io.layouts.names import BaseNames
from lorafa.io.layouts.written import written
from lorafa.registry import Registry

LAYOUTS: Registry[type[Layout]] = Registry(
    "layout",
    {
        "peft": "lorafa.io.layouts.peft:PeftLayout",
        "diffusers": "lorafa.io.layouts.diffusers:DiffusersLayout",
        "kohya": "lorafa.io.layouts.kohya:KohyaLayout",
        "mlx": "lorafa.io.layouts.mlx:MlxLayout",
    },
)
ARRANGEMENTS: Registry[type[Arrangement]] = Registry(
    "arrangement of layers",
    {
        "bare": "lorafa.io.layouts.bare:Bare",
        "moved": "lorafa.io.layouts.moved:Moved",
        "experts_stacked": "lorafa.io.layouts.experts_stacked:ExpertsStacked",
        "experts_apart": "lorafa.io.layouts.experts_apart:ExpertsApart",
        "split": "lorafa.io.layouts.split:Split",
        "fused": "lorafa.io.layouts.fused:Fused",
    },
)


def as_peft(raw: Raw, base: BaseNames) -> tuple[LoraConfig, dict[str, Tensor]] | None:
    """The config and tensors that PEFT would have for this model; None where the file has just these.

    Raises:
        CheckpointError, ConfigError: the file is in no known layout, or may be in two; or it cannot be converted.
    """
    layout = layout_of(raw)
    parameters = _parameters(raw)
    if layout.native and all(base.carries(name, parameters) for name in _heads(raw.tensors)):
        return None
    contents = layout.read(raw, base)
    found = arranged(contents, base)
    return None if layout.native and found is contents else written(found, base, strict=layout.native)


def of_others(
    raw: Raw, names: Callable[[], BaseNames] | None = None
) -> tuple[LoraConfig, dict[str, Tensor]] | None:
    """What :func:`as_peft` makes of a file that another program wrote; None for PEFT's own, as it is.

    Args:
        names: those of the base's layers, asked for only then; None: no base is at hand.

    Raises:
        CheckpointError: it is another program's, and there is no base.
        LoraError: as :func:`as_peft`.
    """
    if raw.given is not None or "peft_type" in raw.values:
        return None
    layout = layout_of(raw)
    if names is None:
        raise CheckpointError(
            f"{raw.path} is in the layout of {layout.written_by}, which is read with the base model at hand. Bring it "
            f"into PEFT's: PeftModel.from_pretrained(base, {str(raw.path)!r}).save_pretrained(folder). The commands "
            "inspect, combine and export take it as it is with --base."
        )
    return as_peft(raw, names())


_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"), "PEFT"),
    **dict.fromkeys(("lora_a", "lora_b"), "MLX"),
    **dict.fromkeys(("lora_down", "lora_up", "alpha"), "kohya's sd-scripts"),
}
"""Words that tensors of the layouts have in their names."""


def layout_of(raw: Raw) -> Layout:
    """The layout that a file is in.

    Raises:
        CheckpointError: none, or more than one.
    """
    every = {name: LAYOUTS.get(name)() for name in LAYOUTS.names()}
    marks = {name: mark for name, layout in every.items() if (mark := layout.detect(raw)) is not None}
    if len(marks) == 1:
        return every[next(iter(marks))]
    if marks:
        said = " and ".join(f"{every[name].written_by} ({mark!r})" for name, mark in marks.items())
        raise CheckpointError(
            f"{raw.path} may be in two layouts: it has the marks of {said}. Leave out the tensors, or the config, that "
            "are not its own. Nothing was loaded."
        )
    words = dict.fromkeys(part for key in raw.tensors for part in key.split(".")[1:])
    near = ((word, nearest(word, _WORDS, 0.7)) for word in list(words)[:1000])
    hint = next((f" Nearest: {word!r} looks like {found!r}, of {_WORDS[found]}." for word, found in near if found), "")
    raise CheckpointError(
        f"{raw.path} is in no layout that lorafa knows: its tensors are called {shorten(list(raw.tensors), 3)}.{hint} "
        f"Known are those of {'; '.join(layout.written_by for layout in every.values())}. Convert it with the program "
        "that wrote it. Nothing was loaded."
    )


def _parameters(raw: Raw) -> list[str]:
    """``target_parameters`` of a file of PEFT."""
    given = raw.values.get("target_parameters") if raw.given is None else raw.given.target_parameters
    return list(given) if isinstance(given, (list, tuple)) else []


def _heads(tensors: Mapping[str, Tensor]) -> list[str]:
    """The modules that tensors of a file of PEFT are of."""
    found = (key.rpartition(".lora_")[0] for key in tensors if ".lora_" in key)
    return list(dict.fromkeys(name.partition(OWN_LAYER)[0] for name in found))


def arranged(contents: Contents, base: BaseNames) -> Contents:
    """The contents on the layers of the model; themselves where no arrangement knows of a layer that is not there.

    Raises:
        CheckpointError: two arrangements claim one layer, or an update cannot be written so.
    """
    every = {name: ARRANGEMENTS.get(name)() for name in ARRANGEMENTS.names()}
    claimed: dict[str, str] = {}
    for name, arrangement in every.items():
        for layer in arrangement.claims(contents, base):
            if layer in claimed:
                raise CheckpointError(
                    f"{contents.path}: {layer} may be {every[claimed[layer]].what}, or {arrangement.what}. Say which "
                    "layer it is by key_mapping. Nothing was loaded."
                )
            claimed[layer] = name
    said = []
    for name in dict.fromkeys(claimed.values()):
        said.append(f"{every[name].what} ({shorten([n for n, by in claimed.items() if by == name], 2)})")
        contents = every[name].convert(contents, base)
    if said:
        warn(
            f"{contents.path} was made for a model with other layers, and was brought to those of this one, which "
            f"changes nothing it computes: {'; '.join(said)}. save_pretrained writes it as it is now."
        )
    return contents
