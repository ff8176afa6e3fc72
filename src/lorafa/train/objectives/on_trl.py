"""OnTrl: a trainer of TRL that resumes bit for bit, saves adapters alone and compares with where training began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorafa.surgery.penalty import penalty_of
from lorafa.train.adapter_checkpoints import AdapterCheckpoints
from lorafa.train.objectives.reference import Reference
from lorafa.train.steady import SteadyTrainer


class OnTrl(SteadyTrainer, AdapterCheckpoints):
    """Put it before a trainer of TRL: ``class Mine(OnTrl, DPOTrainer): ...``.

    Its rows are token ids (:mod:`lorafa.train.objectives.rows`), which TRL takes as they are. What methods add to the
    loss is added. A checkpoint holds the reference. Nothing is told to others, and no model card is written.

    Args:
        reference: the reference of the loss, where it has one; TRL itself may be given it as ``ref_model``.
    """

    train_dataset: Any
    loss_is_scaled_for_ga: Any
    current_gradient_accumulation_steps: int

    def __init__(self, model: nn.Module, *, reference: Reference | None = None, **settings: Any) -> None:
        self.reference = reference
        super().__init__(model, **settings)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss: Tensor = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        penalty = penalty_of(self.model) if self.model.training else None
        if penalty is None:
            return loss
        share = self.current_gradient_accumulation_steps if self.loss_is_scaled_for_ga else 1  # else it is divided
        return loss + penalty.to(loss.device) / share

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: list[str] = list(getattr(self.train_dataset, "column_names", []))

    def _send_telemetry(self) -> None:
        """Tell nobody of the training."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none: the run directory says what was done."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.reference is not None and self.args.should_save:
            self.reference.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if self.reference is not None and checkpoint is not None:
            self.reference.load(Path(checkpoint))


