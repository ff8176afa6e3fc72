"""The joint loss is that of the formula over all logits, with its gradients, for every divergence and teacher."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa.alignment import DIVERGENCES, MAPS, Alignment, Cached
from lorafa.alignment.maps.base import States
from lorafa.alignment.schedule import CyclicSettings
from lorafa.alignment.teachers.external import External
from lorafa.errors import AdapterError, BackendError, ConfigError, DivergedError
from lorafa.models.head_loss import supervised_loss
from toys.adapters import train
from toys.compare import assert_equal_bits, close
from toys.language_models import adapted, llama
from toys.teachers import BATCH, COUNTED, IDS, LABELS, assert_same, counted_logits, gradients, other_model, student


@pytest.mark.parametrize("teacher", ["base", "external"])
@pytest.mark.parametrize("name", DIVERGENCES.names())
def test_it_is_the_formula_over_all_logits(name: str, teacher: str) -> None:
    model, other = student(), other_model()
    alignment = Alignment(model, other if teacher == "external" else teacher, weight=0.7, divergence=name)
    loss = alignment.loss(model, BATCH)
    found = gradients(loss, model)
    with torch.no_grad():
        if teacher == "external":
            theirs = counted_logits(other)
        else:
            with model.disable_adapter():
                theirs = counted_logits(model)
    own, gold = counted_logits(model), LABELS[:, 1:][COUNTED]
    divergence = DIVERGENCES.get(name)()(own, theirs, gold).mean()
    wanted = nn.functional.cross_entropy(own, gold) + 0.7 * divergence
    close(loss.detach(), wanted.detach(), 1e-10)
    assert alignment.last_divergence == pytest.approx(divergence.item(), rel=1e-9)
    assert_same(found, gradients(wanted, model))


@pytest.mark.parametrize("name", MAPS.names())
def test_distances_of_states_are_added_for_each_layer(name: str) -> None:
    model, other = student(), other_model()
    alignment = Alignment(model, other, weight=0.5, divergence="fkl", map=name, map_weight=0.3)
    loss = alignment.loss(model, BATCH)
    found = gradients(loss, model)

    def states(one: Any) -> list[Tensor]:
        layers = one(input_ids=IDS, output_hidden_states=True).hidden_states
        return [layers[layer][:, :-1][COUNTED] for layer in (1, 2)]

    def look(one: Any, layer: int) -> Any:
        base = one.get_base_model() if hasattr(one, "get_base_model") else one
        return base.lm_head if layer == 2 else lambda h: base.lm_head(base.model.norm(h))

    with torch.no_grad():
        theirs, said = counted_logits(other), states(other)
    own, gold = counted_logits(model), LABELS[:, 1:][COUNTED]
    between = MAPS.get(name)()
    assert alignment.term is not None
    distances = [
        between(States(H, look(model, layer), alignment.term.projections.get(layer)), States(T, look(other, layer)))
        for layer, H, T in zip((1, 2), states(model), said, strict=True)
    ]
    divergence = DIVERGENCES.get("fkl")()(own, theirs, gold).mean()
    wanted = nn.functional.cross_entropy(own, gold) + 0.5 * (divergence + 0.3 * sum(distances) / 2)
    close(loss.detach(), wanted.detach(), 1e-9)
    assert_same(found, gradients(wanted, model), 1e-4)  # the model's norms take their gradients in float32


def test_the_lens_after_the_last_layer_is_what_the_models_say() -> None:
    """Symmetric KL of the two distributions, and 1/2 Var_p of the difference of logits: no norm comes twice."""
    model, other = student(), other_model()
    for one in (model.get_base_model(), other):
        with torch.no_grad():
            one.model.norm.weight.copy_(torch.linspace(0.3, 3, one.config.hidden_size))
    own, theirs = counted_logits(model), counted_logits(other)
    log_q, log_p = own.log_softmax(-1), theirs.log_softmax(-1)
    lens = 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean()
    found = Alignment(model, other, divergence="none", map="lens", map_layers=(2,), map_weight=1.0)
    close(found.discrepancy(model, BATCH).detach(), lens.detach(), 1e-9)
    head = copy.deepcopy(other.lm_head)  # one head, which functional reads both states through
    model.get_base_model().lm_head.load_state_dict(head.state_dict())  # type: ignore[union-attr]
    difference = counted_logits(model) - theirs
    p = log_p.exp()
    variance = (p * difference.square()).sum(-1) - (p * difference).sum(-1).square()
    found = Alignment(model, other, divergence="none", map="functional", map_layers=(2,), map_weight=1.0)
    close(found.discrepancy(model, BATCH).detach(), variance.mean().detach() / 2, 1e-9)


def test_a_lens_of_tables_that_are_filled_up_is_on_the_tokens_both_have() -> None:
    model, other = adapted(llama(vocab_size=200).double()).eval(), llama(vocab_size=202).double().eval()
    alignment = Alignment(model, other, divergence="none", map="lens", map_layers=(2,), map_weight=1.0)
    log_q, log_p = counted_logits(model).log_softmax(-1), counted_logits(other)[:, :200].log_softmax(-1)
    wanted = 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean()
    close(alignment.discrepancy(model, BATCH).detach(), wanted.detach(), 1e-9)


@pytest.mark.parametrize("teacher", ["base", "snapshot"])
def test_a_teacher_that_is_the_student_has_no_divergence_and_no_gradient(teacher: str) -> None:
    model = adapted(llama().double()).eval() if teacher == "snapshot" else _fresh()
    alignment = Alignment(model, teacher, weight=3.0)
    plain = gradients(supervised_loss(model, BATCH), model)
    found = gradients(alignment.loss(model, BATCH), model)
    assert abs(alignment.last_divergence or 0.0) < 1e-14
    assert_same(found, plain, 1e-12)


def _fresh() -> Any:
    from lorafa import LoraConfig, get_peft_model

    return get_peft_model(llama().double(), LoraConfig(target_modules="all-linear", r=4)).eval()


def test_a_snapshot_is_what_the_student_was_until_it_is_refreshed() -> None:
    model = student()
    alignment = Alignment(model, "snapshot", divergence="fkl")
    before = counted_logits(model).detach()
    train(model, 0.3)
    alignment.loss(model, BATCH)
    moved = alignment.last_divergence
    gold = LABELS[:, 1:][COUNTED]
    with torch.no_grad():
        expected = float(DIVERGENCES.get("fkl")()(counted_logits(model), before, gold).mean())
    assert moved == pytest.approx(expected, rel=1e-9)
    alignment.teacher.refresh(model)
    alignment.loss(model, BATCH)
    assert abs(alignment.last_divergence or 0.0) < 1e-14


def test_a_state_goes_on_where_it_was_kept() -> None:
    model = student()
    one = Alignment(model, "snapshot")
    kept = one.state_dict()
    train(model, 0.3)
    other = Alignment(model, "snapshot")
    other.load_state_dict(kept)
    assert_equal_bits(other.loss(model, BATCH), one.loss(model, BATCH))
    assert (other.last_divergence or 0) > 0


def test_weight_zero_is_a_plain_loss_to_the_bit_and_asks_no_teacher() -> None:
    model = student()
    other = other_model()
    other.forward = None  # type: ignore[assignment]
    alignment = Alignment(model, other, weight=0.0)
    assert_equal_bits(alignment.loss(model, BATCH), supervised_loss(model, BATCH))
    assert alignment.last_divergence is None


def test_the_teacher_draws_no_dropout_and_the_student_is_as_it_was() -> None:
    model = student(lora_dropout=0.5)
    model.train()
    alignment = Alignment(model, "base")
    one = alignment.said(model, BATCH).rows
    state = torch.get_rng_state()
    assert_equal_bits(alignment.said(model, BATCH).rows, one)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.base_model.lora_layers()[0][1].disable_adapters


class Plain(nn.Module):
    pass


def test_what_cannot_be_compared_is_refused() -> None:
    model = student()
    with pytest.raises(ConfigError, match=r"The teacher has 48 tokens and the student 32.*divergence='none' and a map"):
        Alignment(model, llama(vocab_size=48))
    with pytest.raises(ConfigError, match="The teacher has 48 tokens and the student 32"):
        Alignment(model, llama(vocab_size=48), divergence="none", map="lens")
    with pytest.raises(ConfigError, match=r"Unknown teacher 'bse'\. Did you mean 'base'"):
        Alignment(model, "bse")
    with pytest.raises(ConfigError, match="Unknown divergence 'kl'"):
        Alignment(model, "base", divergence="kl")
    with pytest.raises(ConfigError, match="weight must be a number >= 0, found -1"):
        Alignment(model, "base", weight=-1)
    with pytest.raises(ConfigError, match=r"names no model\. Pass the model itself"):
        Alignment(model, "external")
    with pytest.raises(AdapterError, match="align=base compares a model with adapters and without"):
        Alignment(llama(), "base")
    with pytest.raises(BackendError, match="The teacher cannot be cut before its head"):
        Alignment(model, Plain())


def test_inner_states_of_other_widths_and_vocabularies_are_compared_without_a_divergence() -> None:
    model = student()
    wider = llama(vocab_size=48, hidden_size=24, num_attention_heads=3).double()
    alignment = Alignment(model, wider, divergence="none", map="procrustes")
    assert bool(torch.isfinite(alignment.loss(model, BATCH)))
    assert (alignment.last_divergence or 0) > 0


def test_a_teacher_that_gives_nan_is_named() -> None:
    model, other = student(), other_model()
    alignment = Alignment(model, other)
    with torch.no_grad():
        other.lm_head.weight[3] = float("nan")  # type: ignore[union-attr,index]
    with pytest.raises(DivergedError, match="The divergence from the teacher is not finite"):
        alignment.loss(model, BATCH)


class Fewer(External):
    """A teacher that leaves out the last row of each batch."""

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[nn.Module]:
        def cut(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return args, {name: value[:-1] for name, value in kwargs.items()}

        hook = self.model.register_forward_pre_hook(cut, with_kwargs=True)
        try:
            with super().running(model) as teaching:
                yield teaching
        finally:
            hook.remove()


def test_a_teacher_on_fewer_rows_than_the_batch_is_refused(tmp_path: Path) -> None:
    model = student()
    with pytest.raises(ConfigError, match="has read 7 supervised positions, and the student 10 of the same"):
        Alignment(model, Fewer(other_model())).loss(model, BATCH)
    with pytest.raises(ConfigError, match="The teacher has read 7 supervised positions, and the batch has 10"):
        Alignment(model, Cached(tmp_path / "t", Fewer(other_model()))).loss(model, BATCH)


# ---- phases


PROBE = [{"input_ids": IDS, "labels": LABELS}]
SMALL = CyclicSettings(task_steps=2, teacher_steps=2, rewarm_steps=2, gate=False)


def loop(model: Any, alignment: Alignment, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = alignment.loss(model, BATCH)
        loss.backward()  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * alignment.rate
        optimizer.step()
        alignment.after_step(model, optimizer)
        losses.append(loss.item())
    return losses


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def test_the_teacher_runs_in_its_phases_alone() -> None:
    model = student()
    alignment = Alignment(model, "snapshot", schedule=SMALL, steps=12, probe=PROBE)
    loop(model, alignment, adam(model), 12)
    assert alignment.teacher_passes == 4  # two phases of two steps; the last cycle has no room


@pytest.mark.parametrize("kind", ["ema", "anchor", "snapshot"])
def test_what_the_rank_of_an_average_could_not_hold_is_in_the_record(kind: str) -> None:
    model = student()
    alignment, optimizer, found = Alignment(model, kind, schedule=SMALL, steps=12, probe=PROBE), adam(model), []
    for _ in range(4):
        optimizer.zero_grad()
        alignment.loss(model, BATCH).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found += [one.discarded for one in alignment.after_step(model, optimizer) if one.kind == "switch"]
    assert len(found) == 2
    wanted = {"ema": (True, True), "anchor": (False, True), "snapshot": (False, False)}[kind]
    assert tuple(0 < one < 0.5 for one in found) == wanted


def test_a_training_goes_on_in_the_middle_of_a_phase_to_the_bit() -> None:
    whole = student()
    alignment = Alignment(whole, "snapshot", schedule=SMALL, steps=12, probe=PROBE)
    optimizer = adam(whole)
    losses = loop(whole, alignment, optimizer, 12)

    first = student()
    begun, state = Alignment(first, "snapshot", schedule=SMALL, steps=12, probe=PROBE), adam(first)
    loop(first, begun, state, 7)
    kept = (copy.deepcopy(first.state_dict()), copy.deepcopy(state.state_dict()), copy.deepcopy(begun.state_dict()))

    second = student()
    resumed, again = Alignment(second, "snapshot", schedule=SMALL, steps=12, probe=PROBE), adam(second)
    second.load_state_dict(kept[0])
    again.load_state_dict(kept[1])
    resumed.load_state_dict(kept[2])
    assert loop(second, resumed, again, 5) == losses[7:]


@pytest.mark.parametrize(("teacher", "forgotten"), [("snapshot", True), ("anchor", True), ("base", False)])
def test_a_refreshed_teacher_is_measured_anew(teacher: str, forgotten: bool) -> None:
    """The least divergence that drift is measured by is that from the teacher as it is, not from the one before."""
    model = student()
    settings = CyclicSettings(task_steps=2, teacher_steps=1, gate=False, trigger="drift")
    alignment = Alignment(model, teacher, schedule=settings, steps=20, probe=PROBE)
    loop(model, alignment, adam(model), 3)
    state = alignment.schedule.state_dict()
    assert (state["phase"], state["in_phase"]) == ("task", 0)
    assert (state["least"] == float("inf")) is forgotten


def test_a_refusal_twice_brings_the_student_and_its_optimizer_back() -> None:
    model = student()
    with torch.no_grad():
        model.lm_head.weight.mul_(100)  # for the loss to feel it
    settings = CyclicSettings(task_steps=1, teacher_steps=1, rewarm_steps=0)
    loop(model, Alignment(model, "base", weight=0.0), adam(model), 20)
    alignment = Alignment(model, "base", schedule=settings, steps=50, probe=PROBE)
    optimizer = adam(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    found = []
    for _ in range(2):
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(10 * torch.randn_like(p))  # far away: the task is lost
        found += alignment.after_step(model, optimizer)
    assert [decision.kind for decision in found] == ["refused", "rolled back"]
    for name, p in model.named_parameters():
        if name in before:
            assert_equal_bits(p.detach(), before[name])


def test_a_cyclic_schedule_asks_for_what_it_needs() -> None:
    with pytest.raises(ConfigError, match="Pass probe, batches with labels, and steps"):
        Alignment(student(), "base", schedule="cyclic")
