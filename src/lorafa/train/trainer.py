"""Trainers that resume bit for bit and weigh every token alike: of adapters, which alone they save, and of all weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from accelerate.utils import DistributedType
from torch import Tensor, nn

from lorafa.data.packing import as_read
from lorafa.errors import ConfigError, DataError, shorten, warn
from lorafa.models.batch_loss import BatchLoss
from lorafa.models.head_loss import SupervisedLoss, Trial, supports_chunked_loss
from lorafa.models.kinds.entry import RowLosses
from lorafa.models.rows import IGNORE_INDEX
from lorafa.models.wrapped import inner_model
from lorafa.processes import gathered
from lorafa.surgery.penalty import penalty_of
from lorafa.train.adapter_checkpoints import AdapterCheckpoints
from lorafa.train.fillers import Filler, Rounds
from lorafa.train.sampling import tokens_of
from lorafa.train.sharding import Sharding
from lorafa.train.steady import SteadyTrainer

DATA_PARALLEL = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class SupervisedTrainer(SteadyTrainer, transformers.Trainer):  # type: ignore[misc]
    """`transformers.Trainer` for a language model, all of whose weights it may train.

    What it adds: the loss is computed at supervised positions only (`lorafa.models.head_loss`) and announced when it
    cannot be; what methods add to the loss (`lorafa.penalty`) is added; N steps equal k steps, a checkpoint, and N - k
    more, bit for bit; the evaluation loss is a mean over tokens, not over batches;
    ``train_sampling_strategy="group_by_length"`` orders by seed and epoch alone; a loss or a gradient that is not
    finite stops the training. With ``rules=2`` a warm-up begins above 0 and no two seeds have an order of the samples
    in common.

    With several processes losses, evaluations too, are those of one with the batches of all: rows that accelerate
    repeats to fill the last round of batches count once, where a batch has a row for each sample. Under the first FSDP
    and DeepSpeed the model's own loss is used, and resuming is not supported.

    Args:
        model: a language model of transformers, plain or with adapters; a causal one without ``row_losses``.
        args: `transformers.TrainingArguments`.
        chunked_loss: compute the loss at supervised positions only, in chunks; False keeps the model's own.
        chunk_tokens: rows that go through the output head at once; None chooses by memory.
        trial: what a trial of that loss on this model has shown; None makes one.
        rules: how warm-ups count and samples are ordered: 1 as in `transformers.Trainer`, 2 as in a run of the command
            (``train.rules``). None takes 1, and in a training that is resumed what its checkpoint was made with.
        decode: from token ids to text, for errors that name rows.
        row_losses: the loss of models that are not causal (:data:`lorafa.models.kinds.entry.RowLosses`): their labels
            stand at their own positions, and nothing else is said of the loss then.
        **settings: everything else `transformers.Trainer` takes.
    """

    lr_scheduler: Any
    _sharding: Sharding | None = None
    """How the base below adapters is spread; all weights are trained in each process."""

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        chunked_loss: bool = True,
        chunk_tokens: int | None = None,
        trial: Trial | None = None,
        rules: int | None = None,
        decode: Callable[[list[int]], str] | None = None,
        row_losses: RowLosses | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, args, rules=rules, **settings)
        self.decode = decode
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = row_losses is None  # as the chunked loss does
        self.chunk_tokens = chunk_tokens
        self.own_loss_reason = self._own_loss_reason(trial, row_losses) if chunked_loss else "chunked_loss=False"
        """Why the model's own loss is used, or None where the chunked one is."""
        if row_losses is not None and self.own_loss_reason is not None:
            raise ConfigError(
                f"A model that is not causal is trained with the loss of its kind, and here it cannot be: "
                f"{self.own_loss_reason}. Leave that out."
            )
        if chunked_loss and self.own_loss_reason is not None:
            warn(f"Training with the model's own loss, which holds all logits: {self.own_loss_reason}.")
        of_next = SupervisedLoss(self.model, chunk_tokens)
        self._loss = of_next if row_losses is None else BatchLoss(self.model, row_losses)
        self._eval_sums: list[tuple[float, int]] = []
        """Negative log-likelihood and tokens of each batch of the evaluation that runs."""
        self._eval_rounds = self._rounds(None, self.args.eval_batch_size)

    # ---- loss -------------------------------------------------------------------------------------------------------

    def _own_loss_reason(self, trial: Trial | None, row_losses: RowLosses | None) -> str | None:
        kind = self.accelerator.distributed_type
        if kind not in (DistributedType.NO, *DATA_PARALLEL) or self.args.n_gpu > 1:
            return f"the model is spread by {'DataParallel' if self.args.n_gpu > 1 else kind.value}"
        if self.label_smoother is not None or self.compute_loss_func is not None or self.args.use_liger_kernel:
            return "label smoothing, compute_loss_func or use_liger_kernel define another loss"
        if row_losses is not None:
            return None
        return supports_chunked_loss(self.model) if trial is None else trial.own_loss_reason

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Where something wraps the model (data parallel, compile), wrap its loss: that is what calls it."""
        wrapped: nn.Module = super()._wrap_model(model, training=training, dataloader=dataloader)
        data_parallel = self.accelerator.distributed_type in DATA_PARALLEL and self._sharding is None
        wraps = data_parallel or self.args.torch_compile
        if training and wrapped is self.model and wraps and self.own_loss_reason is None:
            return self.accelerator.prepare_model(self._loss)  # type: ignore[no-any-return]
        return wrapped

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.own_loss_reason is not None:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            with self.accelerator.autocast():
                loss = (self._loss if model is self.model else model)(inputs, num_items_in_batch)
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes  # data parallelism averages what should be summed
        penalty = penalty_of(self.model)
        if penalty is not None:  # once a step: the losses of a step's batches are summed
            loss = loss + penalty.to(loss.device) / getattr(self, "current_gradient_accumulation_steps", 1)
        return loss

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        own = self._rounds(self.train_dataset, self.args.train_batch_size).trimmed(epoch_iterator)
        batches, count = super().get_batch_samples(own, *args, **kwargs)
        self._batches_of_step = batches
        if count is not None and int(count) == 0:  # a batch without labels adds 0 where others of the step have some
            raise DataError(
                f"No token of step {self.state.global_step + 1} is trained: all its labels are masked "
                f"(-100){self._rows_of(batches)}. Check the answers of these rows and that max_length leaves room for "
                "them, or leave the rows out."
            )
        return batches, count

    def _rows_of(self, batches: Sequence[Mapping[str, Any]]) -> str:
        """The rows of batches, in words to stand behind the step: where they are from, or else their numbers among the
        training rows."""
        rows = [
            tuple(ids[mask.bool()].tolist())
            for batch in batches
            if {"input_ids", "attention_mask"} <= batch.keys()
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        known = _found(self.train_dataset, rows)
        if not known:
            return ""
        begins = f", the first begins {self.decode(list(rows[0]))[:60]!r}" if self.decode else ""
        named, places = "row" if len(known) == 1 else "rows", [place for _, place in known if place]
        if len(places) == len(known):
            return f" ({named} {shorten(places, 8)}{begins})"
        return f" ({named} {shorten((str(number) for number, _ in known), 8)} of the training rows{begins})"

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared: dict[str, Any] = super()._prepare_inputs(as_read(inputs))
        return prepared

    def _rounds(self, dataset: Any, batch_size: int) -> Rounds:
        return Rounds(self.accelerator, len(dataset) if hasattr(dataset, "__len__") else None, batch_size)

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        if isinstance(inputs, Filler) and "attention_mask" in inputs:
            inputs = {**inputs, "attention_mask": torch.zeros_like(inputs["attention_mask"])}
        super()._track_num_input_tokens(inputs)

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self._eval_sums = []
        self._eval_rounds = self._rounds(getattr(dataloader, "dataset", None), self.args.eval_batch_size)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        total, tokens = 0.0, 0
        for turn in zip(*gathered(self._eval_sums), strict=True):  # in the order of one process
            for loss, count in turn:
                total, tokens = total + loss, tokens + count
        if tokens:
            output.metrics[f"{metric_key_prefix}_loss"] = total / tokens
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """As in transformers, but without logits where nobody asks for them; adds to the loss over all tokens."""
        if inputs.get("labels") is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._eval_rounds.masked(inputs)
        shifted = inputs["labels"][..., 1:] if self._loss_shifts_labels else inputs["labels"]
        count = int((shifted != IGNORE_INDEX).sum())
        if not count and self.accelerator.num_processes == 1:
            return torch.zeros((), device=self.args.device), None, None
        if prediction_loss_only and self.own_loss_reason is None:
            with torch.no_grad(), self.accelerator.autocast():
                total = self._loss(self._prepare_inputs(inputs), 1)
            result = total / max(count, 1), None, None
        else:
            result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            # With several processes transformers divides by the mean number of tokens of a process.
            total = result[0] * self.accelerator.reduce(torch.tensor(float(count), device=self.args.device), "mean")
        self._eval_sums.append((total.item() if count else 0.0, count))
        return result

    def _set_signature_columns_if_needed(self) -> None:
        forward = inner_model(self.model).forward
        self._signature_columns: list[str] = [*inspect.signature(forward).parameters, *self.label_names]


def _found(dataset: Any, rows: Sequence[tuple[int, ...]]) -> list[tuple[int, str]]:
    """The numbers from 1 of the samples with these tokens, or with these before the first that is trained, each the
    first one, and where their rows stand, if known."""
    found: dict[tuple[int, ...], tuple[int, str]] = {}
    wanted = {row for row in rows if row}
    for index in range(len(dataset) if hasattr(dataset, "__len__") else 0):
        if len(found) == len(wanted):
            break
        sample = dataset[index]
        ids = tokens_of(sample)
        whole = () if ids is None else tuple(map(int, ids))
        for tokens in (whole, whole[: _read_of(sample)]):
            if tokens in wanted:
                found.setdefault(tokens, (index + 1, getattr(sample, "place", "")))
    return [found[row] for row in rows if row in found]


def _read_of(sample: Any) -> int:
    """How many tokens of a sample stand before the first that is trained: of models that are not causal these are what
    a batch shows of it."""
    labels = getattr(sample, "labels", None) or ()
    return next((at for at, label in enumerate(labels) if label != IGNORE_INDEX), 0)


class LoraTrainer(SupervisedTrainer, AdapterCheckpoints, transformers.Trainer):  # type: ignore[misc]
    """:class:`SupervisedTrainer`, whose arguments it takes, for a model with adapters.

    Checkpoints hold the adapters, not the base; adapters without a gradient stop the training.

    Args:
        model: `lorafa.PeftModel` (or PEFT's) of a transformers model.
        check_gradients: stop after the first backward pass if an adapter got no gradient. Turn it off where that is
            right, as with experts no token was sent to.

    Raises:
        ConfigError: the model has no adapters.
    """

    _zero_gradients_are_right = False  # as they are where a loss is none, but not of next tokens
