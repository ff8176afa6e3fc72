"""How likely the model finds given answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.nn import functional as F

from lorafa.data.chat import IGNORE, Sample
from lorafa.data.collate import Collator
from lorafa.errors import DataError
from lorafa.evals.generation import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def answer_loss(model: PreTrainedModel, samples: Sequence[Sample], collator: Collator, batch_size: int) -> float:
    """Mean negative log-likelihood of a supervised token, in nats; every token weighs the same.

    Samples of similar length share a batch; the result does not depend on ``batch_size``. exp of it is the
    perplexity of the answers. The model is left as it was.

    Raises:
        DataError: no supervised token in ``samples``.
    """
    device = next(model.parameters()).device
    ordered = sorted(samples, key=lambda sample: len(sample.input_ids), reverse=True)
    total, count = 0.0, 0
    with evaluating(model):
        for first in range(0, len(ordered), batch_size):
            batch = {name: tensor.to(device) for name, tensor in collator(ordered[first : first + batch_size]).items()}
            targets = batch.pop("labels")[:, 1:]
            supervised = targets != IGNORE
            logits = model(**batch, use_cache=False).logits[:, :-1]
            # Row by row, so that the float32 copy of the logits is one row's supervised positions, not the batch.
            for row, target, chosen in zip(logits, targets, supervised, strict=True):
                total += F.cross_entropy(row[chosen].float(), target[chosen], reduction="sum").item()
            count += int(supervised.sum())
    if not count:
        raise DataError(
            f"None of the {len(samples)} samples has a supervised token, so there is no loss to average. "
            "Raise data.eval_size or data.max_length."
        )
    return total / count
