"""Everything a training needs once all is loaded: the model, its samples, how it is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lorafa.alignment.schedule import Decision
from lorafa.data.collate import Collate, Tokenized
from lorafa.data.packing import PackCollator
from lorafa.data.prepared import SampleSet
from lorafa.models.head_loss import Trial
from lorafa.models.kinds.causal import CAUSAL
from lorafa.models.kinds.entry import Kind
from lorafa.models.quantize import Quantized
from lorafa.peft_model import PeftModel
from lorafa.train.evaluation import Chosen
from lorafa.train.fit import Material
from lorafa.train.keeping import Trained
from lorafa.train.objectives.making import samples_of_pass
from lorafa.train.objectives.rows import Rows
from lorafa.train.objectives.work import Work
from lorafa.train.settings.run import RunConfig
from lorafa.train.teacher import teacher_of


@dataclass(frozen=True)
class Prepared:
    """Everything a training needs, ready and shown."""

    model: Any
    """A PeftModel, or with ``peft.full`` a model of transformers."""
    tokenizer: Any
    data: SampleSet
    batch_rows: Sequence[Tokenized]
    """What batches are made of: the samples to train on, or packs of them."""
    collator: Collate
    seconds: float
    """How long it took to load and make all this."""
    evaluation: Chosen
    kind: Kind = CAUSAL
    quantized: Quantized | None = None
    """What ``model.quantize`` has done to the base."""
    covered: list[dict[str, Any]] = field(default_factory=list)
    """Which modules are adapted, one entry a kind of them."""
    start: dict[str, Any] = field(default_factory=dict)
    """What a start from data has read and chosen; empty for the others."""
    teacher: Any = None
    """The teacher that the start has read; None where it has read none."""
    trial: Trial | None = None
    """What the run's one trial of the chunked loss has shown; None where the model's own is asked for."""
    rows: Rows | None = None
    """What the objective is trained on, where it is TRL's."""

    def material(self, config: RunConfig, decided: Callable[[Decision], None] | None = None) -> Material:
        """The part that the training itself takes; what the schedule of a teacher decides is told ``decided``."""
        heldout, collator = self.data.heldout.samples, PackCollator(self.collator)
        decode, losses = self.tokenizer.decode, self.kind.row_losses()
        rows, size = self.batch_rows, config.eval.batch_size
        teach = teacher_of(config.align, self.model, self.tokenizer, rows, heldout, collator, size, self.teacher)
        if self.rows is not None:
            own: tuple[Any, Any] = self.rows.train, self.rows.heldout
            make = partial(self._trainer, self.rows, config)
            length = samples_of_pass(self.rows, config)
            return Material(self.model, *own, collator, decode, None, make=make, pass_length=length)
        return Material(self.model, rows, heldout, collator, decode, self.trial, losses, teach, decided)

    def _trainer(self, rows: Rows, config: RunConfig, settings: Mapping[str, Any], more: Mapping[str, Any]) -> Any:
        """The trainer of an objective of TRL."""
        make = config.objective.entry.trainer
        assert make is not None
        return make(Work(self.model, self.tokenizer, rows, config, settings, more))

    def trained(self) -> Trained:
        """The part that is kept."""
        return Trained(self.model, self.tokenizer, self.kind)

    def counted(self) -> dict[str, int]:
        """How many rows are trained on and held out, and how many were left out or cut."""
        train, heldout, own = self.data.train, self.data.heldout, self.rows
        if own is not None:
            return {
                "train": len(own.train),
                "heldout": len(own.heldout),
                "repeated": self.data.repeated,
                "dropped": own.dropped,
                "truncated": own.truncated,
            }
        return {
            "train": len(train.samples),
            "heldout": len(heldout.samples),
            "repeated": self.data.repeated,
            "dropped": train.dropped + heldout.dropped,
            "truncated": train.truncated + heldout.truncated,
        }


def counted(model: Any) -> dict[str, int]:
    """How many numbers a model has, and how many of them are trained."""
    if isinstance(model, PeftModel):
        trainable, everything = model.get_nb_trainable_parameters()
        return {"trainable": trainable, "all": everything}
    weights = list(model.parameters())
    return {"trainable": sum(w.numel() for w in weights if w.requires_grad), "all": sum(w.numel() for w in weights)}
