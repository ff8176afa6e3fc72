"""What an objective's trainer is made of: the model, its rows and all settings of the run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lorafa.errors import ConfigError
from lorafa.models.wrapped import inner_model
from lorafa.train.objectives.on_trl import OnTrl
from lorafa.train.objectives.reference import Reference
from lorafa.train.objectives.rows import Rows
from lorafa.train.settings.optim import pair_optimizer
from lorafa.train.settings.run import RunConfig


@dataclass
class Work:
    """What an objective asks for to make its trainer."""

    model: Any
    """A PeftModel as its training begins."""
    tokenizer: Any
    rows: Rows
    config: RunConfig
    settings: Mapping[str, Any]
    """What `transformers.TrainingArguments` would be told."""
    more: Mapping[str, Any]
    """What any trainer is told beside: its callbacks."""
    _reference: Reference | None = field(default=None, init=False)

    @property
    def own(self) -> Any:
        """Its own settings."""
        return self.config.objective.own

    def reference(self) -> Reference:
        """The model as its training begins; the same one each time."""
        if self._reference is None:
            self._reference = Reference(self.model)
        return self._reference

    def build(
        self, trainer: type[Any], config: type[Any], own: Mapping[str, Any], parts: type[Any] = object, **more: Any
    ) -> Any:
        """A trainer of TRL on the rows.

        Args:
            trainer, config: TRL's classes.
            own: what its config is told beside the settings of all trainings.
            parts: a class with what is different here, which stands before all.
            more: what its trainer is told beside.
        """
        from datasets import Dataset

        train = self.config.train
        whole = {
            **self.settings,
            "bf16": False,  # layers run in the dtype they are stored in, as in every training of adapters
            "gradient_checkpointing": train.gradient_checkpointing,
            "disable_dropout": not self.config.objective.dropout,
            **own,
        }
        heldout = self.rows.heldout[: train.eval_size] if train.measures else []
        kinds = tuple(one for one in (parts, OnTrl, trainer) if one is not object)
        return type(trainer.__name__, kinds, {})(
            self.model,
            args=config(**whole),
            reference=self._reference,
            rules=train.rules,
            train_dataset=Dataset.from_list(self.rows.train),
            eval_dataset=Dataset.from_list(heldout) if heldout else None,
            processing_class=self.tokenizer,
            optimizers=(pair_optimizer(self.model, self.config.optim), None),  # after the reference was made
            **self.more,
            **more,
        )


@contextmanager
def as_it_was(model: Any) -> Iterator[None]:
    """What TRL replaces of a model, its ``forward``, is put back when the block ends.

    Inside, TRL's own calls of old names of transformers (gradient_checkpointing) are not warned of: no user can change
    them.
    """
    inner = inner_model(model)
    own = vars(inner).get("forward")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*activation_checkpointing", category=FutureWarning)
            yield
    finally:
        vars(inner).pop("forward", None)
        if own is not None:
            inner.forward = own


def require_plain_head(model: Any, objective: str) -> None:
    """Raises ConfigError for an adapter on the output head, or a copy of it, which the trainer would pass by."""
    inner = inner_model(model)
    head = inner.get_output_embeddings()
    if head is None:
        return
    weights = {id(parameter) for parameter in head.parameters() if parameter.requires_grad}
    if not weights and not hasattr(head, "get_base_layer"):
        return
    name = next((name for name, module in inner.named_modules() if module is head), "the output head")
    raise ConfigError(
        f"objective={objective} multiplies by the weight of the output head itself, so what is trained on {name!r} "
        "would not count. Leave it out of peft.target_modules, peft.modules_to_save and model.add_tokens, or take "
        "objective=orpo, which does not."
    )


