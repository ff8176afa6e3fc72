"""Encoders with a decoder (T5, BART): they read one text and write another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafa.data.chat import IGNORE, Sample
from lorafa.data.collate import Collate
from lorafa.data.encoding import Encoding
from lorafa.data.pairs import PAIRS, PairCollator, divided, prompts_of
from lorafa.data.records import Record
from lorafa.errors import SourceError
from lorafa.models.kinds.checks import check_finite
from lorafa.models.kinds.entry import CLASSIFIER, LIKELIHOOD, TEXT, Kind, RowLosses, architecture_of, per_row
from lorafa.models.rows import IGNORE_INDEX
from lorafa.models.sourced import as_source_error, model_step
from lorafa.models.wrapped import inner_model


class Seq2Seq(Kind):
    """A prompt goes through the encoder, and the decoder writes the answer."""

    name = "seq2seq"
    words = "a sequence-to-sequence model"
    auto_class = "AutoModelForSeq2SeqLM"
    task_type = "SEQ_2_SEQ_LM"
    offers = frozenset({LIKELIHOOD, TEXT})
    usual_eval = "match"

    def is_of(self, model: Any) -> bool:
        pairs = getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True
        return pairs and not type(model).__name__.endswith(CLASSIFIER)

    def is_made_for(self, config: Any) -> bool:
        pairs = bool(getattr(config, "is_encoder_decoder", False))
        return pairs and not architecture_of(config).endswith(CLASSIFIER)

    def check(self, where: str, model: Any) -> None:
        """It says what its decoder reads, and its output for one token is finite."""
        if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            raise SourceError(
                f"The {where} ({type(model).__name__}) does not say what its decoder reads where it is to write an "
                "answer (prepare_decoder_input_ids_from_labels), so it cannot be trained to. Give another model."
            )
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        with as_source_error(f"The {where} could not run on one token", model_step()), torch.no_grad():
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            logits = model(**inputs, decoder_input_ids=_begun(model, ids)).logits
        check_finite(where, model, logits)

    def encoding(self, model: Any) -> Encoding:
        return PAIRS

    def prompts(self, records: Iterable[Record], tokenizer: Any) -> list[list[int]]:
        return prompts_of(records, tokenizer)

    def collator(self, pad_id: int) -> Collate:
        return PairCollator(pad_id)

    def row_losses(self) -> RowLosses:
        return answer_losses

    def fullest(self, length: int) -> Sample:
        """The prompt and the answer are cut each by itself."""
        return Sample([0] * (2 * length), [IGNORE] * length + [0] * length)

    def longest(self, samples: Sequence[Sample]) -> int:
        return max((len(side) for sample in samples for side in divided(sample)), default=0)


def answer_losses(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood of each row's labels, in nats (rows,), and how many it has (rows,).

    Labels stand at their own positions; the decoder is given them moved on by one, as the model itself does it.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels")
    logits = model(**inputs, decoder_input_ids=_begun(inner_model(model), labels)).logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide.transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none")
    return per_row(losses, labels, IGNORE_INDEX)


def _begun(base: Any, labels: Tensor) -> Tensor:
    """What the decoder reads where it is to write these labels: the start token, then all but the last."""
    given: Tensor = base.prepare_decoder_input_ids_from_labels(labels)
    return given


SEQ2SEQ = Seq2Seq()
