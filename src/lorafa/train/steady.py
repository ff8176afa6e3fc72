"""SteadyTrainer: makes a trainer of transformers resume bit for bit, order rows by seed and epoch, and stop in time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.errors import CheckpointError, DivergedError, shorten
from lorafa.train.checkpoints import STATE_FILE, last_checkpoint, state_of
from lorafa.train.rates import scheduler
from lorafa.train.sampling import LengthSampler, OrderSampler, lengths_of
from lorafa.train.whole_checkpoints import WholeCheckpoints

AS_TRANSFORMERS = 1
"""The rules by which warm-ups count and rows are ordered in transformers; see ``train.rules`` of a run."""
MARK = "lorafa"
"""What a checkpoint's state has under ``stateful_callbacks`` for them."""


def rules_of(checkpoint: Path) -> int:
    """The rules a checkpoint was made with; 1 where it has no mark."""
    state = state_of(checkpoint) if (checkpoint / STATE_FILE).is_file() else {}
    mark = state.get("stateful_callbacks", {}).get(MARK, {})
    rules = mark.get("rules", 1) if isinstance(mark, dict) else None
    if not isinstance(rules, int):
        raise CheckpointError(
            f"{checkpoint / STATE_FILE} has rules of its training that no lorafa has written: {mark!r}. Resume from "
            "another checkpoint."
        )
    return rules


class SteadyTrainer(WholeCheckpoints):
    """Stands before a trainer of transformers among the bases of a trainer, whatever its loss is.

    N steps equal k steps, a checkpoint, and N - k more, bit for bit. Rows are ordered by seed and epoch alone:
    ``train_sampling_strategy`` "random", with ``rules=2``, and "group_by_length". A loss or a gradient that is not
    finite stops the training, and so do weights before they are written.

    Args:
        rules: how warm-ups count and samples are ordered: 1 as in `transformers.Trainer`, 2 as in a run of the command
            (``train.rules``). None takes 1, and in a training that is resumed what its checkpoint was made with.
    """

    accelerator: Any
    model: Any
    control: Any
    optimizer: Any
    train_dataset: Any
    lr_scheduler: Any

    def __init__(self, *args: Any, rules: int | None = None, **settings: Any) -> None:
        self._batches_of_step: Sequence[Mapping[str, Any]] = ()
        self._rules_given = rules
        self.rules = AS_TRANSFORMERS if rules is None else rules
        """How warm-ups count and samples are ordered."""
        super().__init__(*args, **settings)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if not torch.isfinite(loss):
            self._stop(f"The loss is {loss.item()} in step {self.state.global_step + 1}{self._rows_of([inputs])}.")
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)  # type: ignore[misc]
        scaled = self.accelerator.scaler is not None  # a scaler passes over steps without finite gradients by itself
        if norm is not None and not scaled and not math.isfinite(norm):
            rows = self._rows_of(self._batches_of_step)
            self._stop(f"The gradient is not finite in step {self.state.global_step + 1}{rows}.")
        return norm

    def _rows_of(self, batches: Sequence[Mapping[str, Any]]) -> str:
        """The rows of batches, in words to stand behind the step; nothing where they cannot be told."""
        return ""

    # ---- rules ------------------------------------------------------------------------------------------------------

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        checkpoint = kwargs.get("resume_from_checkpoint")
        if checkpoint is not None and self._rules_given is None:
            self.rules = rules_of(Path(checkpoint))
        return super()._inner_training_loop(*args, **kwargs)  # type: ignore[misc]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.rules == 1 or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        self.lr_scheduler = scheduler(
            self.args.lr_scheduler_type,
            self.optimizer if optimizer is None else optimizer,
            self.args.get_warmup_steps(num_training_steps),
            num_training_steps,
            self.args.lr_scheduler_kwargs,
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- data -------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        own = self._sampler(dataset, self.args.train_batch_size, random=self.rules > 1)
        return super()._get_train_sampler(dataset) if own is None else own  # type: ignore[misc]

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        by_length = self._sampler(eval_dataset, self.args.eval_batch_size, random=False)
        return super()._get_eval_sampler(eval_dataset) if by_length is None else by_length  # type: ignore[misc]

    def _sampler(self, dataset: Any, batch_size: int, random: bool) -> OrderSampler | None:
        """The order of the samples where it is ours: by length, and any (``random``) where that is asked for."""
        strategy = self.args.train_sampling_strategy
        if strategy not in ("group_by_length", *(["random"] if random else [])) or not hasattr(dataset, "__len__"):
            return None
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if strategy == "random":
            return OrderSampler(len(dataset), seed, self.rules)
        column = self.args.length_column_name
        lengths = list(dataset[column]) if column in getattr(dataset, "column_names", ()) else lengths_of(dataset)
        return LengthSampler(lengths, batch_size * self.args.world_size, seed, self.rules)

    def _run_epoch(self, **kwargs: Any) -> None:
        # transformers tells the epoch to the loader that skips what was trained before a resume; with several processes
        # that one does not pass it on to the sampler, so the whole loader, which does, is told first.
        if hasattr(kwargs["train_dataloader"], "set_epoch"):
            kwargs["train_dataloader"].set_epoch(kwargs["epoch"])
        super()._run_epoch(**kwargs)  # type: ignore[misc]

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # A checkpoint in the middle of a logging interval would lose the first half of its mean: end it here, as where
        # the training ends.
        if self.control.should_save or self.control.should_evaluate or self.control.should_training_stop:
            self.control.should_log = True
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._require_finite()
        return super()._finalize_training(*args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._require_finite()
        self.state.stateful_callbacks[MARK] = {"rules": self.rules}
        super()._save_checkpoint(*args, **kwargs)

    def _require_finite(self) -> None:
        bad = [name for name, p in self.model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
        if bad:
            self._stop(f"After step {self.state.global_step} {len(bad)} weights are not finite: {shorten(bad)}.")

    def _stop(self, what: str) -> None:
        newest = last_checkpoint(self.args.output_dir)
        raise DivergedError(
            f"{what} Lower the learning rate, or clip gradients (max_grad_norm). "
            f"The last good checkpoint: {newest or 'none was written'}."
        )
