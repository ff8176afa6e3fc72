"""Does a merged model compute what the adapted one does? Measured on outputs, against what rounding explains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.errors import AdapterError, ConfigError, LoraError, first_line
from lorafa.models.modes import evaluating
from lorafa.surgery.activate import require_adapters, require_nothing_merged
from lorafa.surgery.merge import merge_adapter, unmerge_adapter
from lorafa.surgery.walk import hosts, lora_layers

TIMES = 4.0
"""An error is put down to rounding up to this many times what moving each merged weight by one unit in its last place,
up or down at random, does to the outputs. Rounding itself moves a weight by half a unit at most."""
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class MergeCheck:
    """How far the outputs of a merged model are from those of the adapted one."""

    max_error: float
    """The largest difference of two outputs (logits, where the model has them)."""
    mean_error: float
    """The mean of the differences, each without its sign."""
    scale: float
    """The root mean square of the adapted model's outputs."""
    allowed_max: float
    """The largest difference that rounding explains; inf where a quantized base is quantized anew: of that nothing is
    said."""
    allowed_mean: float
    """The largest mean that rounding explains."""
    same_choice: float
    """The share of positions at which both models have the same highest output."""

    @property
    def explained(self) -> bool:
        """Whether rounding explains the error."""
        return self.max_error <= self.allowed_max and self.mean_error <= self.allowed_mean

    def __str__(self) -> str:
        known = self.allowed_max != float("inf")
        bounds = [f" (rounding explains {one:.2g})" if known else "" for one in (self.allowed_max, self.allowed_mean)]
        return (
            f"largest error {self.max_error:.2g}{bounds[0]}, mean {self.mean_error:.2g}{bounds[1]}, outputs of size "
            f"{self.scale:.2g}; the same choice at {100 * self.same_choice:.1f} % of the positions"
        )

    def require_explained(self) -> None:
        """Raises AdapterError where rounding does not explain the error."""
        if not self.explained:
            raise AdapterError(
                f"The merged model does not compute what the adapted one does: {self}. Keep the adapter beside the "
                "model, or merge in a wider dtype, and report the model and the adapter's config."
            )


def check_merge(
    model: nn.Module, inputs: Inputs | None = None, adapter_names: Sequence[str] | None = None
) -> MergeCheck:
    """Merge, compare outputs, and unmerge again: the model is bit for bit as it was.

    Args:
        model: with adapters on it, none of which is merged.
        inputs: arguments of its forward; None makes token ids, for models that take some.
        adapter_names: what is merged; default: the active adapters.

    Raises:
        ConfigError: no inputs are given, and none can be made.
        AdapterError, BackendError: as :func:`lorafa.surgery.merge.merge_adapter`.
    """
    adapted, merged, moved = measured(model, inputs, adapter_names)
    return compared(adapted, merged, None if moved is None else moved - merged)


def measured(
    model: nn.Module, inputs: Inputs | None, adapter_names: Sequence[str] | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Outputs of the adapted model, of the merged one, and of that with its weights moved by a unit; None for the last
    where a quantized base was quantized anew."""
    require_nothing_merged(model)
    given = made_inputs(model) if inputs is None else dict(inputs)
    with evaluating(model), _counting(model, adapter_names):
        adapted = outputs_of(model, given) if inputs is not None else _first_outputs(model, given)
        try:
            merge_adapter(model, adapter_names)
            merged = outputs_of(model, given)
            if any(layer.backend.quantized for _, layer in lora_layers(model) if layer.merged):
                return adapted, merged, None
            _nudge(model)
            moved = outputs_of(model, given)
        finally:
            unmerge_adapter(model)
    return adapted, merged, moved


@contextmanager
def _counting(model: nn.Module, names: Sequence[str] | None) -> Iterator[None]:
    """Exactly these adapters count inside the block, disabled ones too; None leaves those that are active."""
    if names is not None:
        require_adapters(model, names)
    before = [(host, host.active_adapters, host.disable_adapters) for _, host in hosts(model)]
    try:
        for host, active, _ in before:
            host.activate(active if names is None else list(dict.fromkeys(names)))
            host.enable_adapters(True)
        yield
    finally:
        for host, active, disabled in before:
            host.activate(active)
            host.enable_adapters(not disabled)


def compared(adapted: Tensor, merged: Tensor, noise: Tensor | None) -> MergeCheck:
    """The check for two outputs of one shape.

    Args:
        noise: what moving weights by a unit does to the outputs; None where that is not known.

    Raises:
        AdapterError: they have different shapes, or are not finite.
    """
    if adapted.shape != merged.shape:
        raise AdapterError(f"The merged model gives {tuple(merged.shape)}, the adapted one {tuple(adapted.shape)}.")
    if not bool(adapted.isfinite().all() & merged.isfinite().all()):
        raise AdapterError("The outputs are not finite, so they cannot be compared. Give other inputs.")
    errors, unknown = (adapted - merged).abs(), float("inf")
    scale = float(adapted.square().mean().sqrt())
    least = TIMES * torch.finfo(torch.float32).eps * scale  # norms of a float64 model may compute in float32
    return MergeCheck(
        max_error=float(errors.max()),
        mean_error=float(errors.mean()),
        scale=scale,
        allowed_max=unknown if noise is None else max(least, TIMES * float(noise.abs().max())),
        allowed_mean=unknown if noise is None else max(least, TIMES * float(noise.abs().mean())),
        same_choice=float((adapted.argmax(-1) == merged.argmax(-1)).float().mean()),
    )


def made_inputs(model: Any, rows: int = 2, length: int = 32) -> dict[str, Tensor]:
    """Token ids (rows, length), the same each time, for a model of transformers that reads them.

    Raises:
        ConfigError: it reads something else.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    if vocabulary is None or getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ConfigError(
            f"No inputs can be made for a {type(model).__name__}, which takes no token ids. Give some to compare "
            "outputs on: verify={...}, the arguments of its forward."
        )
    longest = getattr(text, "max_position_embeddings", None) or length
    longest = length if longest < 1 else longest  # XLNet says -1
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    ids = torch.randint(vocabulary, (rows, min(length, longest)), generator=generator).to(device)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = ids
    return made


def _first_outputs(model: nn.Module, made: Inputs) -> Tensor:
    """Outputs on inputs that :func:`made_inputs` has made.

    Raises:
        ConfigError: the model does not take them.
    """
    try:
        return outputs_of(model, made)
    except LoraError:
        raise
    except Exception as error:  # of the model's own code: any kind
        raise ConfigError(
            f"The model cannot be asked with token ids alone: {first_line(error)}. Give some inputs to "
            "compare outputs on: verify={...}, the arguments of its forward."
        ) from error


def verified(model: nn.Module, verify: bool | Inputs, adapter_names: Sequence[str] | None = None) -> MergeCheck | None:
    """What ``verify=`` of a merge asks for: False nothing, True a check on made inputs, else one on these.

    Raises:
        AdapterError: rounding does not explain the error; the model is as it was.
        LoraError: as :func:`check_merge`.
    """
    if verify is False:
        return None
    if verify is not True and not isinstance(verify, Mapping):
        raise ConfigError(f"verify= is True, False, or the arguments of the model's forward, found {verify!r}.")
    check = check_merge(model, None if verify is True else verify, adapter_names)
    check.require_explained()
    return check


def outputs_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """Logits, or the first floating-point tensor that the model gives, in float64 on the CPU."""
    with evaluating(model):
        given = model(**inputs)
    found = getattr(given, "logits", None)
    if not isinstance(found, Tensor):
        several = list(given.values()) if isinstance(given, Mapping) else given
        listed = several if isinstance(several, (tuple, list)) else [several]
        found = next((each for each in listed if isinstance(each, Tensor) and each.is_floating_point()), None)
    if found is None:
        raise ConfigError(f"A {type(model).__name__} gives a {type(given).__name__}, which holds nothing to compare.")
    return found.detach().to("cpu", torch.float64)


def _nudge(model: nn.Module) -> None:
    """Move each merged weight by about one unit in its last place, up or down at random; unmerging takes it back."""
    generator = torch.Generator().manual_seed(1)
    for _, host in hosts(model):
        for merged, _ in host.merged_parameters():
            values = merged.data
            signs = torch.randint(2, values.shape, generator=generator, dtype=torch.int8).to(values.device) * 2 - 1
            factor = 1 + torch.finfo(values.dtype).eps * signs.to(torch.promote_types(values.dtype, torch.float32))
            merged.data = (values * factor).to(values.dtype)
