"""How likely a model finds given answers: the mean over all, and the sum of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafa.backends.offload import device_of
from lorafa.data.chat import IGNORE, Sample
from lorafa.data.collate import Collate
from lorafa.errors import DataError
from lorafa.evals.by_length import Progress, by_length
from lorafa.evals.entry import Evaluation, Scores
from lorafa.models.batch_loss import SummedLoss
from lorafa.models.head_loss import CROSS_ENTROPY, HiddenStates, supervised_nll, supports_chunked_loss
from lorafa.models.kinds.found import kind_of
from lorafa.models.modes import evaluating
from lorafa.processes import by_turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def answer_loss(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    collator: Collate,
    batch_size: int,
    summed_loss: SummedLoss | None = None,
) -> float:
    """Mean negative log-likelihood of a supervised token, in nats; every token weighs the same.

    Samples of similar length share a batch; the result does not depend on ``batch_size``. exp of it is the
    perplexity of the answers. The model is left as it was. Several processes share the batches out, and all get the
    mean over all of them, added up in the order in which one process would.

    Args:
        summed_loss: computes it for a batch; by default from all logits, which any causal model has;
            a model that is not causal needs that of its kind.

    Raises:
        DataError: no supervised token in ``samples``.
    """
    device = device_of(model)
    answered = [sample for sample in samples if any(label != IGNORE for label in sample.labels[1:])]
    if not answered:
        raise DataError(
            f"None of the {len(samples)} samples has a supervised token, so there is no loss to average. "
            "Raise data.eval_size or data.max_length."
        )
    answered.sort(key=lambda sample: len(sample.input_ids), reverse=True)
    batches = [answered[first : first + batch_size] for first in range(0, len(answered), batch_size)]

    def summed(rows: Sequence[Sample]) -> tuple[float, int]:
        batch = {name: tensor.to(device) for name, tensor in collator(rows).items()}
        loss, terms = (summed_loss or _from_all_logits)(model, batch)
        return float(loss), terms

    total, count = 0.0, 0
    with evaluating(model):
        for loss, terms in by_turns(summed, batches):
            total, count = total + loss, count + terms
    return total / count


def _from_all_logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    losses, count = _rows_from_all_logits(model, batch)
    return torch.stack(losses).sum(), count


def _rows_from_all_logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[list[Tensor], int]:
    inputs = dict(batch)
    targets = inputs.pop("labels")[:, 1:]
    supervised = targets != IGNORE
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    # Row by row, so that the float32 copy of the logits is one row's supervised positions, not the batch.
    losses = [
        F.cross_entropy(row[chosen].float(), target[chosen], reduction="sum")
        for row, target, chosen in zip(logits, targets, supervised, strict=True)
    ]
    return losses, int(supervised.sum())


def row_losses(
    model: PreTrainedModel, samples: Sequence[Sample], collator: Collate, batch_size: int, progress: Progress | None
) -> list[float]:
    """The summed negative log-likelihood of each sample's labelled tokens, in nats; 0 where it has none."""
    device, of_kind = device_of(model), kind_of(model).row_losses()
    chunked = of_kind is None and supports_chunked_loss(model) is None
    counted = [number for number, one in enumerate(samples) if any(label != IGNORE for label in one.labels[1:])]

    def of_batch(numbers: list[int]) -> list[float]:
        rows = [samples[counted[number]] for number in numbers]
        batch = {name: tensor.to(device) for name, tensor in collator(rows).items()}
        if of_kind is not None:
            losses = of_kind(model, batch)[0].tolist()
        elif chunked:
            apart = _RowByRow()
            supervised_nll(model, batch, objective=apart)
            losses = apart.losses
        else:
            losses = [float(loss) for loss in _rows_from_all_logits(model, batch)[0]]
        return losses

    with evaluating(model):
        found = by_length(of_batch, [len(samples[number].input_ids) for number in counted], batch_size, progress)
    of_sample = dict(zip(counted, found, strict=True))
    return [of_sample.get(number, 0.0) for number in range(len(samples))]


class _RowByRow:
    """The cross entropy of each row of a batch by itself."""

    layers: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.losses: list[float] = []

    def __call__(self, states: HiddenStates, targets: Tensor, chunk_tokens: int | None) -> tuple[Tensor, int]:
        total, count = states.last.new_zeros((), dtype=torch.float32), 0
        for row in range(len(targets)):
            loss, terms = CROSS_ENTROPY(
                replace(states, last=states.last[row : row + 1]), targets[row : row + 1], chunk_tokens
            )
            self.losses.append(float(loss))
            total, count = total + loss, count + terms
        return total, count


LOSS = Evaluation(
    asks=lambda *_: [], check=lambda *_: None, measure=lambda *_: Scores("", {}), needs=frozenset()
)
"""Nothing beside the answer loss, which every run measures: no generation, seconds instead of minutes."""
