"""Models that choose one of several classes for a text: an encoder (BERT) or a decoder, with a head that is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafa.data.chat import IGNORE, Sample
from lorafa.data.classes import ClassCollator, classes_of, encoding_of
from lorafa.data.collate import Collate
from lorafa.data.encoding import Encoding
from lorafa.data.pairs import prompts_of
from lorafa.data.records import Record
from lorafa.errors import SourceError
from lorafa.models.kinds.checks import check_finite
from lorafa.models.kinds.entry import CLASSES, CLASSIFIER, Kind, RowLosses, architecture_of
from lorafa.models.rows import IGNORE_INDEX
from lorafa.models.sourced import as_source_error, model_step

WRITERS = ("ForCausalLM", "LMHeadModel")
"""How those end that write text, which an encoder's config may name, too."""


def _own_classes(config: Any) -> tuple[str, ...]:
    """The classes that a checkpoint with this config has a head for; none where it has no head."""
    headed = architecture_of(config).endswith(CLASSIFIER)
    return tuple(str(name) for _, name in sorted(config.id2label.items())) if headed else ()


class Classification(Kind):
    """Its head is new where the model has none for these classes: trained whole, and saved with the adapter."""

    name = "classification"
    words = "a sequence classifier"
    auto_class = "AutoModelForSequenceClassification"
    task_type = "SEQ_CLS"
    offers = frozenset({CLASSES})
    usual_eval = "accuracy"

    def is_of(self, model: Any) -> bool:
        return type(model).__name__.endswith(CLASSIFIER)

    def is_made_for(self, config: Any) -> bool:
        """A config that names a classifier, or an encoder that is no decoder as well."""
        named = architecture_of(config)
        if named.endswith(CLASSIFIER):
            return True
        if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
            return False
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_MASKED_LM_MAPPING_NAMES,
            MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        )

        encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not named.endswith(WRITERS)
        return encoder and config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    def classes(self, config: Any, answers: Callable[[], Sequence[str]] | None, where: str) -> tuple[str, ...]:
        """The classes of the model's own head where it has one for all answers, else the answers.

        Raises:
            DataError: the answers are too few or too many to be classes.
            SourceError: nothing says which classes there are.
        """
        own = _own_classes(config)
        if answers is None:
            if not own:
                raise SourceError(
                    f"The {where} has no head of a classifier, and nothing says which classes it is to tell apart. "
                    "Give the run or the adapter that has trained one."
                )
            return own
        wanted = classes_of(answers())
        return own if {*wanted} <= {*own} else wanted

    def keeps_head(self, config: Any, classes: Sequence[str]) -> bool:
        """As many outputs do not make it one for other classes."""
        return _own_classes(config) in ((), tuple(classes))

    def fullest(self, length: int) -> Sample:
        """The class stands behind the text."""
        return Sample([0] * (length + 1), [IGNORE] * length + [0])

    def longest(self, samples: Sequence[Sample]) -> int:
        """The class behind a text is not read."""
        return max((len(sample.input_ids) - 1 for sample in samples), default=0)

    def classes_in(self, model: Any) -> tuple[str, ...]:
        return tuple(name for _, name in sorted(model.config.id2label.items()))

    def loading(self, classes: Sequence[str]) -> dict[str, Any]:
        names = dict(enumerate(classes))
        numbers = {name: number for number, name in names.items()}
        return {"id2label": names, "label2id": numbers, "problem_type": "single_label_classification"}

    def settle(self, model: Any, tokenizer: Any) -> None:
        """A decoder's head reads the last token that is no padding: by its id, which is to be the one that pads.

        Raises:
            SourceError: there is none.
        """
        if tokenizer.pad_token_id is None:
            raise SourceError(
                "The tokenizer has neither a pad token nor an end-of-sequence token, so texts of unequal length cannot "
                "stand in one batch. Set tokenizer.pad_token."
            )
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        model.config.pad_token_id = tokenizer.pad_token_id

    def may_be_new(self, weight: str, model: Any) -> bool:
        """The head, which is what is outside of the body, and the pooler of an encoder, which pretraining may lack."""
        prefix = model.base_model_prefix + "."
        return not weight.startswith(prefix) or weight.startswith(f"{prefix}pooler.")

    def check(self, where: str, model: Any) -> None:
        """The output for one token is finite."""
        ids = torch.ones(1, 1, dtype=torch.long, device=model.device)
        with as_source_error(f"The {where} could not run on one token", model_step()), torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        check_finite(where, model, logits)

    def encoding(self, model: Any) -> Encoding:
        return encoding_of(self.classes_in(model))

    def prompts(self, records: Iterable[Record], tokenizer: Any) -> list[list[int]]:
        return prompts_of(records, tokenizer)

    def collator(self, pad_id: int) -> Collate:
        return ClassCollator(pad_id)

    def row_losses(self) -> RowLosses:
        return class_losses


def class_losses(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood of each row's class, in nats (rows,), and 1, or 0 where it is -100 (rows,)."""
    inputs = dict(batch)
    labels = inputs.pop("labels")
    logits = model(**inputs).logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="none")
    return losses, (labels != IGNORE_INDEX).long()


CLASSIFICATION = Classification()
