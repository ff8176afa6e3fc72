"""What the joint loss reads: every position that counts alike, and of the teacher no dropout, gradient or rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from lorafa import LoraConfig, get_peft_model
from lorafa.alignment import DIVERGENCES, Alignment
from lorafa.alignment.teachers.external import External
from toys.adapters import train
from toys.compare import close
from toys.language_models import llama
from toys.teachers import BATCH, COUNTED, IDS, LABELS, assert_same, counted_logits, gradients, other_model, student


@pytest.mark.parametrize("name", DIVERGENCES.names())
def test_under_autocast_the_rounding_is_the_same_for_both(name: str) -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules="all-linear", r=4)).eval()
    with torch.no_grad():
        model.get_base_model().lm_head.weight.mul_(60)  # type: ignore[union-attr]
    alignment = Alignment(model, "base", divergence=name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = alignment.discrepancy(model, BATCH)
    assert abs(loss.item()) < 1e-7  # of float32
    assert all(not g.any() or float(g.abs().max()) < 1e-6 for g in gradients(loss, model).values())


class Watched(External):
    """A teacher that says in which mode it was run, and whether gradients were taken."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.modes: list[tuple[bool, bool]] = []

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[nn.Module]:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            modes = {one.training for one in module.modules()}
            self.modes.append((modes == {False}, torch.is_grad_enabled()))

        hook = self.model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with super().running(model) as teaching:
                yield teaching
        finally:
            hook.remove()


def test_a_teacher_is_run_without_dropout_and_gets_no_gradient() -> None:
    model, other = student(), other_model()
    other.requires_grad_(True).train()
    model.train()
    teacher = Watched(other)
    alignment = Alignment(model, teacher, divergence="fkl", map="mse", map_weight=2.0)
    teacher.modes.clear()
    alignment.loss(model, BATCH).backward()  # type: ignore[no-untyped-call]
    assert teacher.modes == [(True, False)]
    assert other.training  # as it was
    assert all(p.grad is None for p in other.parameters())


@pytest.mark.parametrize("kind", ["snapshot", "ema", "anchor"])
def test_a_teacher_of_the_students_own_values_draws_no_dropout_and_gives_no_gradient(kind: str) -> None:
    """The gradient is that of the student's side of the formula alone."""
    model = student(lora_dropout=0.5)
    alignment = Alignment(model, kind, divergence="rkl", weight=2.0)
    before = counted_logits(model).detach()
    torch.manual_seed(3)
    train(model, 0.3)
    model.train()
    close(alignment.said(model, BATCH).logits(), before, 1e-9)  # type: ignore[attr-defined]
    model.eval()
    found = gradients(alignment.loss(model, BATCH), model)
    own, gold = counted_logits(model), LABELS[:, 1:][COUNTED]
    wanted = nn.functional.cross_entropy(own, gold) + 2.0 * DIVERGENCES.get("rkl")()(own, before, gold).mean()
    assert_same(found, gradients(wanted, model))


@pytest.mark.parametrize("side", ["behind", "in front"])
@pytest.mark.parametrize("teacher", ["base", "external"])
def test_padding_counts_for_nothing(teacher: str, side: str) -> None:
    model, other = student(), other_model()
    alignment = Alignment(model, other if teacher == "external" else teacher, weight=0.7, map="gram", map_weight=1.0)
    plain = alignment.loss(model, BATCH)
    found, divergence = gradients(plain, model), alignment.last_divergence
    ends = (0, 3) if side == "behind" else (3, 0)
    ids, labels = nn.functional.pad(IDS, ends, value=5), nn.functional.pad(LABELS, ends, value=-100)
    mask = nn.functional.pad(torch.ones_like(IDS), ends)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = alignment.loss(model, {"input_ids": ids, "labels": labels, "attention_mask": mask, "position_ids": places})
    close(padded.detach(), plain.detach(), 1e-8)
    assert alignment.last_divergence == pytest.approx(divergence, rel=1e-8)
    assert alignment.last_positions == 10
    assert_same(gradients(padded, model), found, 1e-6)


@pytest.mark.parametrize("name", DIVERGENCES.names())
def test_every_token_of_a_step_weighs_alike_whatever_batch_it_is_in(name: str) -> None:
    """Batches of one step, with 4, 3 and 3 positions, divided by the positions of all, are the batch of all rows."""
    model = student()
    alignment = Alignment(model, other_model(), weight=0.7, divergence=name)
    whole = alignment.loss(model, BATCH)
    wanted, divergence = gradients(whole, model), alignment.last_divergence
    total, sums = torch.zeros((), dtype=torch.float64), 0.0
    for row in range(3):
        one = {key: value[row : row + 1] for key, value in BATCH.items()}
        total = total + alignment.loss(model, one, 10)
        sums += (alignment.last_divergence or 0.0) * alignment.last_positions
    close(total.detach(), whole.detach(), 1e-9)
    assert sums / 10 == pytest.approx(divergence, rel=1e-9)
    assert_same(gradients(total, model), wanted)


def test_a_batch_of_a_step_without_labels_adds_nothing() -> None:
    model = student()
    alignment = Alignment(model, other_model(), weight=0.7, map="mse")
    none = {"input_ids": IDS, "labels": torch.full_like(LABELS, -100)}
    loss = alignment.loss(model, none, 10)
    assert (loss.item(), alignment.last_divergence, alignment.last_positions) == (0.0, 0.0, 0)
    assert not any(bool(g.any()) for g in gradients(loss, model).values())
