"""What a run allocates beside its weights: its own code runs without numbers, evaluation, step, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.alignment.alignment import Alignment
from lorafa.costs.batches import Asked, Batch, Batches
from lorafa.costs.teaching import alignment_of
from lorafa.costs.untouched import Block, Untouched, most_alive, without_numbers
from lorafa.data.packing import as_read
from lorafa.evals.generation import encodes
from lorafa.models.batch_loss import BatchLoss, summed_by_rows
from lorafa.models.head_loss import supervised_loss, supervised_nll, supports_chunked_loss
from lorafa.models.kinds.causal import CAUSAL
from lorafa.models.kinds.entry import Kind
from lorafa.models.modes import evaluating, reading_last_positions
from lorafa.peft_model import PeftModel
from lorafa.surgery.walk import lora_layers
from lorafa.train.settings.run import RunConfig

_GROWTHS = 32
"""In how many parts the keys and values of an answer grow: each token would be one more."""


@dataclass(frozen=True)
class Course:
    """The memory of evaluations and a training step, in the order of their operations; weights are no part."""

    blocks: Sequence[Block]
    begins: int
    """The first operation of the training."""
    ends: int
    """Its last operation."""
    forward_ends: int
    own_loss: str | None
    """Why the model's own loss is counted, which holds all logits; None where the chunked one is."""

    def evaluation_peak(self) -> int:
        """The most bytes an evaluation takes."""
        before = [block for block in self.blocks if block.born < self.begins]
        after = [block for block in self.blocks if block.born > self.ends]
        return max(most_alive(before)[0], most_alive(after)[0])

    def kept(self) -> int:
        """Bytes that are there when the forward pass of the step has ended."""
        blocks = [block for block in self.blocks if self.begins <= block.born <= self.forward_ends]
        return sum(block.size for block in blocks if _after(block.died, self.forward_ends))

    def step(self) -> tuple[int, int, int]:
        """Bytes at the peak of the step: kept for backward, gradients, and what is gone again soon."""
        blocks = [block for block in self.blocks if self.begins <= block.born <= self.ends]
        _, at = most_alive(blocks)
        there = [block for block in blocks if block.born <= at and (block.died is None or block.died >= at)]
        kept = sum(b.size for b in there if b.born <= self.forward_ends and _after(b.died, self.forward_ends))
        gradients = sum(b.size for b in there if b.born > self.forward_ends and _after(b.died, self.ends - 1))
        return kept, gradients, sum(b.size for b in there) - kept - gradients


@contextmanager
def _training(model: Any, checkpointed: bool) -> Iterator[None]:
    """The model as the trainer has it: in training mode and, where that is asked for, checkpointed."""
    training = model.training
    model.train()
    try:
        if checkpointed:
            model.activation_checkpointing_enable()
            model.enable_input_require_grads()
        yield
    finally:
        if checkpointed:
            model.disable_input_require_grads()
            model.activation_checkpointing_disable()
        model.train(training)


def _after(died: int | None, operation: int) -> bool:
    return died is None or died > operation


PARTS = 3
"""An evaluation, a step, an evaluation."""


def course_of(
    model: nn.Module,
    config: RunConfig,
    batches: Batches,
    kind: Kind = CAUSAL,
    done: Callable[[int, int], None] = lambda *_: None,
    teacher: nn.Module | None = None,
) -> Course:
    """Let a model on the meta device, with its adapter on, evaluate, train and evaluate a batch each without numbers.

    The model is as it was afterwards.

    Args:
        done: told how many of the ``PARTS`` are done, and how many there are.
        teacher: another model that the run holds this one close to, on the meta device too.

    Raises:
        Exception: whatever the model's code raises where it cannot run so; that is no error of the user.
    """
    whole: Any = PeftModel(model) if any(True for _ in lora_layers(model)) else model  # what adapters read of a call
    dtype = whole.dtype
    own: str | None = None if config.train.chunked_loss or kind.row_losses() else "train.chunked_loss=false"
    with without_numbers(model), nullcontext() if teacher is None else without_numbers(teacher):
        alignment = alignment_of(config.align, whole, teacher)
        state = Untouched()
        with state:
            if kind.row_losses() is None:
                own = own or supports_chunked_loss(model)
            losses = _Losses(whole, state, kind, own, alignment)
            done(0, PARTS)
            if config.eval.before:
                _evaluate(whole, batches, losses)
            done(1, PARTS)
            begins = state.operations + 1
            with _training(whole, config.train.gradient_checkpointing):
                mixed = torch.autocast("cpu", dtype) if config.peft.full and dtype != torch.float32 else nullcontext()
                for _ in range(min(2, config.train.accumulation)):
                    with mixed:
                        loss = losses.trained(batches.training)
                    forward_ends = state.operations
                    loss.backward()  # type: ignore[no-untyped-call]
                    del loss
            ends = state.operations
            model.zero_grad()
            done(2, PARTS)
            _evaluate(whole, batches, losses)
            done(PARTS, PARTS)
        blocks = [Block(block.size, block.born, block.died) for block in state.blocks]
    return Course(blocks, begins, ends, forward_ends, losses.own)


def _evaluate(model: Any, batches: Batches, losses: _Losses) -> None:
    with evaluating(model):
        if batches.heldout is not None:
            losses.evaluated(batches.heldout)
        if batches.asked is not None:
            with reading_last_positions(model):
                _answer(model, batches.asked)


@dataclass(frozen=True)
class _Losses:
    """The losses of batches as the trainer and the evaluation compute them."""

    model: Any
    state: Untouched
    kind: Kind
    own: str | None
    """Why a causal model's own loss is used, which holds all logits; None where it is not."""
    alignment: Alignment | None = None
    """The joint loss of a training with a teacher."""

    def trained(self, batch: Batch) -> Tensor:
        inputs = self._inputs(batch)
        if self.alignment is not None:
            return self.alignment.loss(self.model, inputs, 1)
        if (of_kind := self.kind.row_losses()) is not None:
            loss: Tensor = BatchLoss(self.model, of_kind)(inputs, 1)
        elif self.own is None:
            loss = supervised_loss(self.model, inputs, num_items=1)
        else:
            loss = self.model(**inputs, use_cache=False).loss
        return loss

    def evaluated(self, batch: Batch) -> None:
        inputs = self._inputs(batch)
        if (of_kind := self.kind.row_losses()) is not None:
            summed_by_rows(of_kind)(self.model, inputs)
        elif self.own is None:
            supervised_nll(self.model, inputs)
        else:
            self.model(**inputs, use_cache=False)

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        self.state.chosen = max(1, batch.supervised)
        ids = torch.zeros((batch.rows, batch.tokens), dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        rest = {"labels": (batch.rows, batch.tokens), **batch.shapes}
        inputs |= {name: torch.zeros(rest[name], dtype=torch.int64) for name in rest if name not in inputs}
        return as_read(inputs)


def _answer(model: Any, asked: Asked) -> None:
    """Read the prompts, and let keys and values grow as the answers do."""
    ids = torch.zeros((asked.rows, asked.tokens), dtype=torch.int64)
    encoder = encodes(model)
    begun = {"decoder_input_ids": torch.zeros((asked.rows, 1), dtype=torch.int64)} if encoder else {"logits_to_keep": 1}
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **begun)
    cache = getattr(output.past_key_values, "self_attention_cache", output.past_key_values)
    layers = getattr(cache, "layers", [])
    for _ in range(min(_GROWTHS, asked.new_tokens)):
        more = -(-asked.new_tokens // _GROWTHS)
        for layer in layers:
            for name in ("keys", "values"):
                held = getattr(layer, name, None)
                if isinstance(held, Tensor) and held.dim() == 4:
                    new = held.new_empty((*held.shape[:2], more, held.shape[3]))
                    setattr(layer, name, torch.cat([held, new], dim=2))
