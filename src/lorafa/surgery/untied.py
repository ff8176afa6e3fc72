"""A head and an embedding that the model ties, after merging has given them different weights: what the config says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lorafa.backends.offload import weight_of
from lorafa.errors import warn
from lorafa.surgery.bypassed import words_of

_FLAG = "tie_word_embeddings"
_APART = "After merging, the output head and the input embedding hold different weights"


def says_tied(model: nn.Module) -> bool:
    """Whether the model says that its head shares the weight of its embedding."""
    return bool(getattr(getattr(model, "config", None), _FLAG, False))


def can_be_untied(kind: type[nn.Module], config: Any) -> bool:
    """Whether the config of a model of a class can say that its head and its embedding differ, and no more than that.

    T5's takes it for "outputs are not scaled" and ties the tables all the same; Switch Transformers scale their outputs
    where it is set.
    """
    if hasattr(config, "to_dict") and getattr(type(config).from_dict(config.to_dict() | {_FLAG: False}), _FLAG):
        return False
    return _FLAG not in words_of(kind).get("forward", ())


def loosen(model: Any) -> None:
    """Let the config of a model that says it is tied agree with its weights, where merging gave it different ones.

    What shared the embedding's weight because of what the config said (the tables of BART's two halves) has one of its
    own afterwards, so that it is saved.
    """
    if not hasattr(model, "get_output_embeddings"):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is embedding.weight or head.weight.shape != embedding.weight.shape:
        return
    if (weight_of(head) == weight_of(embedding)).all():
        head.weight = embedding.weight
        return
    if not can_be_untied(type(model), model.config):
        warn(
            f"{_APART}, and the config of a {type(model).__name__} has no way to say so: {_FLAG} stays True. Do not "
            "call tie_weights(). Saved, transformers loads both weights, with a warning; other programs lose one of "
            "the two."
        )
        return
    before = _ties(model)
    for config in _configs(model):
        setattr(config, _FLAG, False)
    for name in before.keys() - _ties(model).keys():
        _separate(model, name, before[name])
    warn(
        f"{_APART}, so config.{_FLAG} was set to False: saved with it set to True, one of the two would be lost."
    )


def _configs(model: Any) -> list[Any]:
    """The config of a model, and that of its text model, of which transformers asks either."""
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return [model.config] if text is model.config else [model.config, text]


def _ties(model: Any) -> Mapping[str, str]:
    """Which tensors share which others by what the config says, by name."""
    expanded = getattr(model, "get_expanded_tied_weights_keys", None)
    return {} if expanded is None else expanded(all_submodels=True)


def _separate(model: nn.Module, name: str, other: str) -> None:
    """Give a tensor that is that of ``other`` the same values in a place of its own."""
    path, _, key = name.rpartition(".")
    owner, tensor = model.get_submodule(path), model.get_parameter(name)
    if tensor is model.get_parameter(other) and not tensor.is_meta:
        setattr(owner, key, nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad))
