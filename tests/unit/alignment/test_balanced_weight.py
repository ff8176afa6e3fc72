"""The weight that is read of both gradients: of the whole weights, once, and as soon as the teacher has one."""

from __future__ import annotations

import copy
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa.alignment import DIVERGENCES, Alignment
from lorafa.alignment.gradients import norms, sketched, trained_linear
from lorafa.alignment.schedule import CyclicSettings
from lorafa.alignment.weighing import Weighing
from lorafa.errors import ConfigError, DivergedError
from lorafa.models.head_loss import supervised_nll
from toys.adapters import train
from toys.compare import assert_equal_bits, assert_unchanged, close, everything
from toys.language_models import llama
from toys.teachers import BATCH, COUNTED, LABELS, counted_logits, other_model, student

GOLD = LABELS[:, 1:][COUNTED]


def whole_gradients(model: Any, other: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the weights themselves, by autograd on the model with its adapters in them."""
    plain = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    own = counted_logits(plain)
    divergence = DIVERGENCES.get("fkl")()(own, counted_logits(other).detach(), GOLD).mean()
    layers = [n for n, m in plain.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    weights = [plain.get_submodule(name).weight for name in layers]
    task = torch.autograd.grad(nn.functional.cross_entropy(own, GOLD), weights, retain_graph=True)
    align = torch.autograd.grad(divergence, weights)
    return dict(zip(layers, task, strict=True)), dict(zip(layers, align, strict=True))


def test_sketches_are_of_the_gradient_of_the_whole_weight() -> None:
    model, wanted = student(), whole_gradients(student(), other_model())[0]
    layers = trained_linear(model)
    found = sketched(model, layers, [BATCH], lambda model, number: supervised_nll(model, BATCH))
    assert len(found) == len(wanted) == 14
    for path, one in found.items():
        exact = wanted[path.removeprefix("base_model.model.")]
        S = torch.linalg.svdvals(exact)
        close(one["gradient.S"], S[: len(one["gradient.S"])], 1e-5)  # the model's norms are in float32
    close(torch.tensor(norms(found)).double(), torch.stack([G.norm() for G in wanted.values()]), 1e-6)


def test_the_weight_is_half_the_share_of_the_medians_and_counts_from_the_first_batch_on() -> None:
    model, other = student(), other_model()
    task, align = whole_gradients(model, other)
    wanted = 0.5 * median(float(G.norm()) for G in task.values()) / median(float(G.norm()) for G in align.values())
    assert 0.05 < wanted < 20
    alignment = Alignment(model, other, weight="balanced")
    loss = alignment.loss(model, BATCH)
    assert alignment.weighing.weight == pytest.approx(wanted, rel=1e-6)
    own = counted_logits(model)
    divergence = DIVERGENCES.get("fkl")()(own, counted_logits(other), GOLD).mean()
    close(loss.detach(), (nn.functional.cross_entropy(own, GOLD) + wanted * divergence).detach(), 1e-6)
    (decision,) = alignment.after_step(model)
    assert (decision.kind, decision.step) == ("balanced", 0)
    assert decision.why.endswith(f"weight 0.5 -> {wanted:.4g}")
    alignment.loss(model, BATCH)
    assert alignment.after_step(model) == []


def test_measuring_leaves_the_model_as_it_is_and_draws_nothing() -> None:
    model = student()
    model.train()
    alignment = Alignment(model, other_model(), weight="balanced", map="proj")
    alignment.said(model, BATCH)  # transformers puts hooks on for inner states, and leaves them
    before, state = everything(model), torch.get_rng_state()
    alignment.loss(model, BATCH)
    assert_unchanged(before, model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in [*model.parameters(), *alignment.parameters()])
    assert all(p.requires_grad for p in alignment.parameters())


def test_a_teacher_that_is_the_student_counts_half_until_it_says_something_else() -> None:
    from lorafa import LoraConfig, get_peft_model

    model = get_peft_model(llama().double(), LoraConfig(target_modules="all-linear", r=4)).eval()
    alignment = Alignment(model, "base", divergence="fkl", weight="balanced")
    found = []
    for step in range(4):
        alignment.loss(model, BATCH)
        assert alignment.schedule.share().teacher == 0.5
        found += alignment.after_step(model)
        if step == 2:  # at the next look, before step 4, there is something to see
            train(model, 0.3)
    assert found == []
    alignment.loss(model, BATCH)
    (decision,) = alignment.after_step(model)
    assert (decision.kind, decision.step) == ("balanced", 4)
    assert alignment.weighing.weight != 0.5


def test_looks_come_ever_more_rarely() -> None:
    weighing = Weighing(balances=True, starts_as_student=True)
    looked = []
    for step in range(20):
        if weighing.due(step):
            looked.append(step)
            assert weighing.measure(lambda: ([1.0], [1e-4]), step) is None
    assert looked == [1, 2, 4, 8, 16]
    assert weighing.measure(lambda: ([1.0], [0.5]), 20) is not None
    assert weighing.weight == 1.0
    assert not weighing.due(100)
    assert not Weighing(balances=False, starts_as_student=False).due(5)


def test_with_a_probe_it_is_read_there_and_kept_within_eight_times() -> None:
    model = student()
    settings = CyclicSettings(task_steps=2, teacher_steps=1, rewarm_steps=0, gate=False)
    alignment = Alignment(model, "snapshot", weight="balanced", schedule=settings, steps=12, probe=[BATCH])
    found = []
    for _ in range(3):
        alignment.loss(model, BATCH)
        train(model, 0.05)
        found += alignment.after_step(model)
    kinds = [(d.kind, d.step) for d in found if d.kind in ("balanced", "switch")]
    assert kinds[:2] == [("switch", 2), ("balanced", 2)]
    state = alignment.schedule.state_dict()
    assert state["first_weight"] == alignment.weighing.weight
    outside = Alignment(model, other_model(), weight="balanced", schedule=settings, steps=12, probe=[BATCH])
    assert outside.weighing.weight is not None  # another model has a gradient from the start
    outside.loss(model, BATCH)
    assert [d.kind for d in outside.after_step(model)] == ["balanced"]


def test_a_state_keeps_the_weight() -> None:
    model, other = student(), other_model()
    one = Alignment(model, other, weight="balanced")
    loss = one.loss(model, BATCH)
    one.after_step(model)
    again = Alignment(model, other, weight="balanced")
    again.load_state_dict(copy.deepcopy(one.state_dict()))
    assert_equal_bits(again.loss(model, BATCH), loss)
    assert again.after_step(model) == []


def test_nan_of_a_teacher_has_no_weight() -> None:
    model, other = student(), other_model()
    alignment = Alignment(model, other, weight="balanced")
    with torch.no_grad():
        other.lm_head.weight[3] = float("nan")
    with pytest.raises(DivergedError, match=r"The divergence from the teacher is not finite\. Look at the"):
        alignment.loss(model, BATCH)


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        ("blanced", r"weight must be a number >= 0 or 'balanced', found 'blanced'"),
        (-1, "weight must be a number >= 0, found -1"),
    ],
)
def test_other_weights_are_refused(weight: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Alignment(student(), "base", weight=weight)


def test_a_model_without_trained_linear_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="Gradients are measured on linear layers that are trained, and this model"):
        trained_linear(llama().requires_grad_(False))
    assert len(trained_linear(llama())) == 15  # a model that is trained whole, its head too
