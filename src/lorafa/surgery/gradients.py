"""Whether gradients reach every adapter: what trains nothing says nothing, unless it is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from lorafa.errors import TrainingError, shorten
from lorafa.layers.base import LoraLayer
from lorafa.layers.host import Host
from lorafa.surgery.walk import PREFIX, places, require_module, tied_groups, user_model

_WRAPPING = ("base_layer", "original_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def check_gradients(model: nn.Module, *, zeros: bool = False) -> None:
    """Raise unless every trainable tensor of the active adapters has a gradient; call it after the first backward pass.

    An adapter on a layer that the model never calls trains nothing, in silence: a layer whose weight other code reads,
    a table that only holds what others share, a head whose weight the loss is multiplied by. In a training loop::

        loss.backward()
        if step == 0:
            lorafa.check_gradients(model)
        optimizer.step()

    :class:`lorafa.train.trainer.LoraTrainer`, and any trainer behind ``AdapterCheckpoints``, does so itself.

    Args:
        model: a :class:`lorafa.PeftModel` (or PEFT's), or a model that holds one or has adapters injected.
        zeros: take gradients that are all zero for gradients. By default a layer whose gradients are all zero counts
            as one that has none, as experts do to which no token was sent. Of a layer that got one, single tensors
            may be zero: those of A are at the start, where B is zero.

    Raises:
        TrainingError: names the tensors without a gradient, and why that may be.
    """
    trainable = [p for p in require_module(model).parameters() if p.requires_grad]
    if not trainable or all(_is_silent(p, zeros) for p in trainable):
        raise TrainingError(
            f"None of the {len(trainable)} trainable weights got a gradient: nothing would be learnt. "
            "Check that an adapter is active and trainable, and that the model is not under torch.no_grad."
        )
    hosts = list(_trained(model))
    silent = {name: found for name, host, tensors in hosts if (found := _without(host, tensors, zeros))}
    if silent:
        tensors = {name: found for name, _, found in hosts}
        raise TrainingError(
            f"{len(silent)} of {len(hosts)} adapted layers got no gradient: "
            f"{shorten(_names(silent, tensors))}. {_cause(model, list(silent))}"
        )


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, Tensor]]]:
    """Every layer, of lorafa or PEFT, with trainable tensors of active adapters: its name, itself, and these."""
    for path, host in model.named_modules():
        if isinstance(host, Host):
            stored = (entry for name in host.active_adapters for entry in host.stored(name))
            tensors = {entry.live or entry.key: entry.tensor for entry in stored}
        elif "lora_A" in getattr(host, "adapter_layer_names", ()):  # PEFT's
            parts = ((key, child) for key, child in host.named_children() if key != "base_layer")
            active = {f".{name}." for name in host.active_adapters}  # type: ignore[union-attr]
            named = ((f"{key}.{n}", p) for key, child in parts for n, p in child.named_parameters())
            tensors = {name: p for name, p in named if any(part in f"{name}." for part in active)}
        else:
            continue
        tensors = {key: t for key, t in tensors.items() if t.requires_grad and t.numel()}  # FSDP1 has empty shards
        if tensors:
            inside = path.rpartition(PREFIX)[2]
            name = ".".join(part for part in inside.split(".") if part not in _WRAPPING)
            parameter = getattr(host, "parameter_name", None)
            yield f"{name}.{parameter}" if parameter else name, host, tensors


def _without(host: nn.Module, tensors: Mapping[str, Tensor], zeros: bool) -> list[str]:
    """The tensors of one layer that have no gradient."""
    if isinstance(host, Host) and not isinstance(host, LoraLayer):
        zeros = True  # rows of tokens that are not in the batch have zeros
    missing = [key for key, tensor in tensors.items() if tensor.grad is None]
    return list(tensors) if all(_is_silent(t, zeros) for t in tensors.values()) else missing


def _is_silent(tensor: Tensor, zeros: bool) -> bool:
    return tensor.grad is None or not (zeros or bool(tensor.grad.any()))


def _names(silent: Mapping[str, Sequence[str]], tensors: Mapping[str, Mapping[str, Tensor]]) -> Iterator[str]:
    """A layer's name where it has no gradient at all, else those of its tensors."""
    for name, found in silent.items():
        if len(found) == len(tensors[name]):
            yield name
        else:
            yield from (f"{name}.{key}" for key in found)


def _cause(model: nn.Module, silent: Sequence[str]) -> str:
    inner = next((user_model(m) for m in model.modules() if user_model(m) is not m), model)
    getter = getattr(inner, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    everything = [place for place in places(inner) if place.name]
    if any(place.module is head and place.name in silent for place in everything):
        return (
            "The loss was computed from the weight of the output head, which was not called: train the head by "
            "modules_to_save, not as a target, or use a trainer that calls it."
        )
    for group in tied_groups(everything):
        names = [place.name for place in group]
        held = next((name for name in names if name in silent), None)
        if held is not None:
            others = " and ".join(repr(name) for name in names if name != held)
            return (
                f"{held!r} shares its weight with {others}, which the model may call in its place: name those, or set "
                "ensure_weight_tying=True."
            )
    return (
        "The loss does not depend on them: the model reads their weight and never calls them, or this batch did not "
        "use them (an expert, an encoder of other inputs). Leave them out of target_modules or target_parameters, or "
        "do without this check (check_gradients=False of a trainer) if that is right."
    )
