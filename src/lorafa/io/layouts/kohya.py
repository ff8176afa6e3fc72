"""The layout of kohya's sd-scripts, which most programs for diffusion models read: one file, no config."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from lorafa.errors import CheckpointError, shorten
from lorafa.io.layouts.base import NORMS, A, B, Contents, Factors, Layout, Raw
from lorafa.io.layouts.components import Part, alpha_of, assumed_config, choose, rank_of, require_all_or_none
from lorafa.io.layouts.names import BaseNames

_KEY = re.compile(r"^(lora_[a-z]+\d?)_([^.]+)\.(.+)$")
_KNOWN = ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")
_ORIGINAL = re.compile(
    r"^(input_blocks|middle_block|output_blocks|double_blocks|single_blocks|joint_blocks|context_refiner|text_model_trans)"
)
_OTHERS = {
    "hada_": "LoHa: its update is a product of two low-rank matrices, entry by entry",
    "lokr_": "LoKr: its update is a Kronecker product",
    "lora_mid": "LoCon with a core between A and B (lora_mid)",
    "oft_": "OFT: its update is a rotation of the weight",
    "diff": "whole differences of weights",
}
"""What the first part of a tensor's name says of methods that are no LoRA."""


class KohyaLayout(Layout):
    """``lora_unet_<layer, dots as underscores>.lora_down.weight`` (r, in), ``.lora_up.weight`` (out, r) and ``.alpha``.

    Read from ``networks/lora.py`` of sd-scripts: the update is alpha / r up down, and without an alpha, up down.
    """

    written_by = "kohya's sd-scripts"

    def detect(self, raw: Raw) -> str | None:
        return next((key for key in raw.tensors if (match := _KEY.match(key)) and match[3] not in ("weight",)), None)

    def read(self, raw: Raw, base: BaseNames) -> Contents:
        by_name = _by_underscores(raw, base)
        parts: dict[str, Part] = {}
        for key, tensor in raw.tensors.items():
            match = _KEY.match(key)
            if match is None:
                raise _unknown(raw, key)
            _require_known(raw, key, match[3])
            part = parts.setdefault(match[1], {})
            part.setdefault(match[2], {})[match[3]] = tensor
        _require_diffusers_names(raw, parts)
        named = {
            component: {by_name.get(_text_model(name, by_name), name): tensors for name, tensors in part.items()}
            for component, part in parts.items()
        }
        chosen = choose(raw, named, base, "lora_down.weight")
        require_all_or_none(raw, [name for name, tensors in chosen.items() if "alpha" in tensors], list(chosen))
        factors = {name: _factors(raw, name, tensors, base) for name, tensors in chosen.items()}
        return Contents(raw.path, assumed_config(factors), factors, {})


def _by_underscores(raw: Raw, base: BaseNames) -> dict[str, str]:
    """Layers of the model by their names with underscores for dots."""
    found: dict[str, str] = {}
    for name in base.layers:
        if (other := found.setdefault(name.replace(".", "_"), name)) != name:
            raise CheckpointError(
                f"{raw.path}: in the names of this layout dots are underscores, and the model's {other!r} and {name!r} "
                "are one then. Nothing was loaded."
            )
    return found


def _text_model(name: str, by_name: Mapping[str, str]) -> str:
    """The name in a text encoder that has lost its ``text_model`` (transformers 5)."""
    return name if name in by_name else name.removeprefix("text_model_")


def _require_known(raw: Raw, key: str, suffix: str) -> None:
    if suffix in _KNOWN:
        return
    method = next((text for start, text in _OTHERS.items() if suffix.startswith(start)), None)
    if method is not None:
        raise CheckpointError(
            f"{raw.path}: {key} belongs to {method}. That is no B A. Merge it into the model with the program it comes "
            "from, and take LoRA of the difference (extract_lora_from_models.py of sd-scripts). Nothing was loaded."
        )
    raise _unknown(raw, key)


def _unknown(raw: Raw, key: str) -> CheckpointError:
    return CheckpointError(
        f"{raw.path} is in the layout of {KohyaLayout.written_by}, and {key} is no part of it: known are "
        f"{', '.join(_KNOWN)}, each behind lora_<part>_<layer>. Nothing was loaded."
    )


def _require_diffusers_names(raw: Raw, parts: Mapping[str, Part]) -> None:
    original = [name for part in parts.values() for name in part if _ORIGINAL.match(name)]
    if original:
        raise CheckpointError(
            f"{raw.path} has the layer names of the original code of the model ({shorten(original, 2)}), not those of "
            "diffusers. Convert it there: pipeline.load_lora_weights(file), then pipeline.unet.save_lora_adapter("
            "folder), or transformer in the place of unet; the folder loads here. Nothing was loaded."
        )


def _factors(raw: Raw, name: str, tensors: Mapping[str, Tensor], base: BaseNames) -> Factors:
    if missing := [key for key in _KNOWN[:2] if key not in tensors]:
        raise CheckpointError(f"{raw.path}: {name} has no {' and no '.join(missing)}. Nothing was loaded.")
    down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
    shape = base.layers.get(name)
    kernel = down.shape[2:] == up.shape[2:] == (1, 1)
    if kernel and shape is not None and len(shape) == 2:  # what is linear here was a convolution there
        down, up = down[:, :, 0, 0], up[:, :, 0, 0]
    rank = rank_of(raw, name, down, up)
    alpha = alpha_of(raw, name, tensors.get("alpha"), rank)
    found = {A: down, B: up}
    if "dora_scale" in tensors:
        found[NORMS] = _norms(raw, name, tensors["dora_scale"], up, len(down.shape))
    return Factors(found, rank, alpha)


def _norms(raw: Raw, name: str, scale: Tensor, up: Tensor, dims: int) -> Tensor:
    """DoRA's norms of output rows, (out,), or (1, out, 1, 1) of a convolution, as PEFT has them."""
    out = up.shape[0]
    if not scale.dim() or scale.shape[0] != out or scale.numel() != out:
        raise CheckpointError(
            f"{raw.path}: {name} has a dora_scale {tuple(scale.shape)}, one norm for each input, as LyCORIS makes them "
            f"by default. DoRA of PEFT has one for each of its {out} outputs (wd_on_out=True there), so no adapter has "
            "its values. Merge it into the model instead. Nothing was loaded."
        )
    return scale.reshape(out) if dims == 2 else scale.reshape(1, out, *[1] * (dims - 2))
