"""The loss whose gradients are collected, of one batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.errors import CalibrationError
from lorafa.models.rows import IGNORE_INDEX, ROW_MULTIPLE

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> a scalar."""
_PLAIN = {"input_ids", "inputs_embeds", "attention_mask", "labels", "shift_labels"}
"""What a batch may have without the model's own loss reading more than labels."""


def call(model: nn.Module, batch: Any) -> Any:
    """``model(**batch)`` for a mapping, ``model(*batch)`` for a tuple or list, else ``model(batch)``."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The ``loss`` of the model's output."""
    output = call(model, batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise CalibrationError(
            f"The model's output ({type(output).__name__}) has no loss. Put labels into the batches, or pass "
            "loss=, a function of model and batch."
        )
    return loss  # type: ignore[no-any-return]


def scalar(loss: Any) -> Tensor:
    """The loss as it is.

    Raises:
        CalibrationError: it is not a tensor with one element.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise CalibrationError(
        f"The loss of a batch must be a tensor with one element, found {found}. Return the mean over the batch from "
        "loss=, as a tensor: not loss.item(), which has no gradient."
    )


def default_loss(model: nn.Module, watched: Collection[nn.Module] = ()) -> Loss:
    """:func:`causal_loss` where a trial with a few tokens shows that it equals the model's own, else :func:`own_loss`.

    Args:
        watched: modules that will have hooks: the output head must not be one, for causal_loss does not call it. The
            trial comes before.
    """
    from lorafa.models.head_loss import (
        supports_chunked_loss,  # brings torch's compiler along, which takes a second to load
    )

    head = getattr(model, "get_output_embeddings", lambda: None)()
    seen = head is not None and any(module in watched for module in head.modules())  # the head itself, if compiled
    return own_loss if seen or supports_chunked_loss(model) else causal_loss


def causal_loss(model: nn.Module, batch: Any) -> Tensor:
    """A causal model's loss, computed at the labelled positions alone; of a batch that has no labels, or more than
    tokens, masks and labels, the model's own."""
    from lorafa.models.head_loss import supervised_loss

    plain = isinstance(batch, Mapping) and batch.keys() <= _PLAIN and _labels(batch) is not None
    return supervised_loss(model, batch) if plain else own_loss(model, batch)


def padded(batch: Any, model: nn.Module) -> Any:
    """A batch of tokens, padded on the right to a multiple of :data:`ROW_MULTIPLE`; anything else as it is.

    A causal model's gradients do not depend on such padding. On a CPU every length costs a dozen MB for a model of 135M
    parameters.
    """
    known = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}
    if not isinstance(batch, Mapping) or batch.keys() - known or not batch.keys() >= {"input_ids", "labels"}:
        return batch
    ids = batch["input_ids"]
    if any(not isinstance(value, Tensor) or value.dim() != 2 or value.shape != ids.shape for value in batch.values()):
        return batch
    more = -ids.shape[1] % ROW_MULTIPLE
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if longest is not None and ids.shape[1] + more > longest:
        return batch
    whole = {"attention_mask": torch.ones_like(ids), **batch}
    return {name: nn.functional.pad(value, (0, more), value=known[name]) for name, value in whole.items()}


def count_labels(model: nn.Module, batch: Any) -> int:
    """How many labels of a batch count: those that are not -100, and of a causal model have a position before them.

    Raises:
        CalibrationError: there are none to count.
    """
    labels = _labels(batch)
    if labels is None:
        raise CalibrationError("weighting='tokens' counts the labels of a batch, and there are none. Put them in.")
    return int((labels[..., _first_label(model, batch) :] != IGNORE_INDEX).sum())


def require_label(model: nn.Module, batch: Any, where: str) -> None:
    """Raises CalibrationError for a batch ("batch 2 of the data") of a causal model whose labels are all -100."""
    if _labels(batch) is not None and not count_labels(model, batch):
        raise CalibrationError(
            f"In {where} no label counts: all are {IGNORE_INDEX}, so it has no loss. Leave it out, or see why its "
            "answers are missing: cut off by a limit of length, for example."
        )


def _labels(batch: Any) -> Tensor | None:
    given = batch if isinstance(batch, Mapping) else {}
    found = given.get("shift_labels") if given.get("shift_labels") is not None else given.get("labels")
    return found if isinstance(found, Tensor) else None


def _first_label(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """1 where labels are moved by one against the tokens: one for each token, of no model known not to be causal."""
    labels = batch.get("labels")
    if batch.get("shift_labels") is not None or not isinstance(labels, Tensor) or labels.dim() < 2:
        return 0
    pairs = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return int(getattr(model, "loss_type", None) in (None, "ForCausalLM") and not pairs)
