"""A phase in new directions: the same function where it begins, the best of its rank where it ends."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.alignment import Alignment
from lorafa.alignment.reorient import Carry
from lorafa.alignment.schedule import CyclicSettings, Decision
from lorafa.errors import AdapterError, CheckpointError
from toys.adapters import train
from toys.compare import assert_equal_bits, best, close
from toys.language_models import adapted, llama

IDS = torch.tensor([[4, 7, 1, 9, 3, 2], [2, 8, 8, 5, 1, 6], [9, 1, 4, 4, 6, 6]])
LABELS = torch.tensor([[-100, -100, 1, 9, 3, 2], [-100, 8, 8, 5, -100, -100], [-100, -100, -100, 4, 6, 6]])
BATCH = {"input_ids": IDS, "labels": LABELS}
PROBE = [{"input_ids": IDS.flip(0), "labels": LABELS.flip(0)}]
SMALL = CyclicSettings(task_steps=2, teacher_steps=3, rewarm_steps=2, gate=False, reorient=True)


def student(**settings: Any) -> Any:
    model = adapted(llama().double(), **settings).double().eval()
    torch.manual_seed(1)
    train(model, 0.2)
    return model


def made(model: nn.Module, teacher: str = "base", steps: int = 20, **own: Any) -> Alignment:
    return Alignment(model, teacher, divergence="fkl", schedule=SMALL, steps=steps, probe=PROBE, **own)


def adam(model: nn.Module, alignment: Alignment | None = None) -> torch.optim.Optimizer:
    more = [] if alignment is None else [*alignment.parameters()]
    return torch.optim.AdamW([*(p for p in model.parameters() if p.requires_grad), *more], lr=1e-2)


def step(model: Any, alignment: Alignment, optimizer: torch.optim.Optimizer) -> tuple[float, list[Decision]]:
    optimizer.zero_grad()
    loss = alignment.loss(model, BATCH)
    loss.backward()  # type: ignore[no-untyped-call]
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 * alignment.rate
    optimizer.step()
    return loss.item(), alignment.after_step(model, optimizer)


def loop(model: Any, alignment: Alignment, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    return [step(model, alignment, optimizer)[0] for _ in range(steps)]


def updates(model: Any) -> dict[str, Tensor]:
    """s B A of each layer, whatever it is made of."""
    return {path: layer.adapters["default"].product().detach() for path, layer in model.base_model.lora_layers()}


@torch.no_grad()
def said(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def reoriented(model: Any) -> tuple[Alignment, torch.optim.Optimizer]:
    """After two steps, where the first phase of the teacher has begun."""
    alignment, optimizer = made(model), adam(model)
    loop(model, alignment, optimizer, 2)
    assert alignment.carry is not None
    assert alignment.carry.on
    return alignment, optimizer


def test_the_function_is_kept_where_a_phase_begins_and_B_is_zero() -> None:
    model = student()
    alignment, optimizer = made(model), adam(model)
    loop(model, alignment, optimizer, 1)
    _, decisions = step(model, alignment, optimizer)
    assert [d.kind for d in decisions] == ["switch", "reoriented"]
    assert "the update of 14 layers is carried" in decisions[1].why
    for name, p in model.named_parameters():
        if "lora_B" in name:
            assert not p.any()
    before = said(model)
    alignment.carry.end(None)  # type: ignore[union-attr]
    close(said(model), before, 1e-9)


def test_it_is_the_function_that_was_there_before() -> None:
    model = student()
    alignment, optimizer = made(model), adam(model)
    loop(model, alignment, optimizer, 1)
    optimizer.zero_grad()
    alignment.loss(model, BATCH).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    before, products = said(model), updates(model)
    alignment.after_step(model, optimizer)
    close(said(model), before, 1e-10)
    for path, product in updates(model).items():
        close(product, products[path], 1e-9)


def test_A_follows_the_gradient_of_the_joint_loss_as_large_as_it_was() -> None:
    """Right singular vectors of the gradient of mu task + lambda fkl, by autograd on the weights themselves."""
    model = student()
    alignment, optimizer = made(model), adam(model)
    loop(model, alignment, optimizer, 1)
    optimizer.zero_grad()
    alignment.loss(model, BATCH).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    plain = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    sizes = {n: p.detach().norm() for n, p in model.named_parameters() if "lora_A" in n}
    with torch.no_grad(), model.disable_adapter():
        theirs = model(input_ids=IDS).logits[:, :-1][LABELS[:, 1:] != -100].log_softmax(-1)
    alignment.after_step(model, optimizer)
    share = alignment.schedule.share()
    own = plain(input_ids=IDS).logits[:, :-1][LABELS[:, 1:] != -100]
    gold = LABELS[:, 1:][LABELS[:, 1:] != -100]
    fkl = (theirs.exp() * (theirs - own.log_softmax(-1))).sum(-1).mean()
    joint = share.task * nn.functional.cross_entropy(own, gold) + share.teacher * fkl
    names = [n for n, m in plain.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    gradients = torch.autograd.grad(joint, [plain.get_submodule(n).weight for n in names])
    layers = dict(model.base_model.lora_layers())
    for name, G in zip(names, gradients, strict=True):
        A = layers[name].adapters["default"].A.detach()
        _, S, Vh = torch.linalg.svd(G, full_matrices=False)
        rows = S[:4, None].sqrt() * Vh[:4]
        close((A @ A.T).diagonal() / (A @ A.T).trace(), S[:4] / S[:4].sum(), 1e-4)
        close(A.T @ A / A.square().sum(), rows.T @ rows / rows.square().sum(), 1e-3)
        close(A.norm(), sizes[f"base_model.model.{name}.lora_A.default.weight"], 1e-6)


def test_the_weight_is_read_before_A_follows_the_joint_gradient() -> None:
    """The directions are those of the loss that the phase has, whose weight was balanced where it begins."""
    found = []
    for weight in ("balanced", None):
        model = student()
        alignment = made(model, "snapshot", weight=0.5 if weight is None else weight)
        optimizer = adam(model)
        loop(model, alignment, optimizer, 1)
        if weight is None:
            alignment.schedule.reweigh(found[0][1])
        _, decisions = step(model, alignment, optimizer)
        kinds = [d.kind for d in decisions]
        assert kinds == (["switch", "reoriented"] if weight is None else ["switch", "balanced", "reoriented"])
        rows = torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_A" in name])
        found.append((rows, alignment.schedule.share().teacher))
    assert found[0][1] != 0.5
    assert found[0][1] == found[1][1]
    close(found[0][0], found[1][0], 1e-6)


@pytest.mark.parametrize("alphas", [{}, {"q_proj": 40.0, "up_proj": 1.0}])
def test_what_is_learnt_in_the_phase_is_added_and_cut_to_the_best_of_the_rank(alphas: dict[str, float]) -> None:
    model = student(alpha_pattern=alphas)
    alignment, optimizer = reoriented(model)
    loop(model, alignment, optimizer, 2)
    optimizer.zero_grad()
    alignment.loss(model, BATCH).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    whole = updates(model)
    decisions = alignment.after_step(model, optimizer)
    compressed = next(d for d in decisions if d.kind == "compressed")
    assert alignment.carry is not None
    assert not alignment.carry.on
    lost = total = 0.0
    for path, product in updates(model).items():
        assert torch.linalg.matrix_rank(whole[path]) == 8
        close(product, best(whole[path], 4), 1e-9)
        lost += float((whole[path] - product).square().sum())
        total += float(whole[path].square().sum())
    assert 0 < compressed.discarded < 0.5
    assert compressed.discarded == pytest.approx(lost / total, rel=1e-9)
    for _, layer in model.base_model.lora_layers():
        assert not layer.lora_start


def test_a_phase_in_which_nothing_is_learnt_loses_nothing() -> None:
    model = student()
    before = said(model)
    carry = Carry(model)
    carry.begin({}, None)  # no gradient: A stays
    close(said(model), before, 1e-12)
    assert carry.end(None) < 1e-20
    close(said(model), before, 1e-9)


def test_layers_whose_gradient_has_too_few_directions_keep_their_A_and_are_counted() -> None:
    model = student()
    one = {"input_ids": IDS[:1], "labels": torch.tensor([[-100, -100, -100, -100, -100, 2]])}
    alignment, optimizer = Alignment(model, "base", schedule=SMALL, steps=20, probe=PROBE), adam(model)
    found: list[Decision] = []
    for _ in range(2):
        optimizer.zero_grad()
        alignment.loss(model, one).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found += alignment.after_step(model, optimizer)
    assert "whose gradient has fewer directions than their rank" in found[-1].why


def test_the_file_of_the_adapter_is_whole_in_the_middle_of_a_phase(tmp_path: Path) -> None:
    model = student()
    alignment, optimizer = reoriented(model)
    loop(model, alignment, optimizer, 1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama().double(), tmp_path).double().eval()
    close(said(again), said(model), 1e-5)
    config = again.peft_config["default"]
    assert config.r == 4
    copied = LoraConfig.from_pretrained(tmp_path)
    assert (copied.r, copied.lora_alpha / copied.r) == (8, model.peft_config["default"].lora_alpha / 4)


def test_other_states_of_the_adapter_do_not_carry_what_the_student_does() -> None:
    model = student()
    alignment = Alignment(model, "snapshot", divergence="fkl", schedule=SMALL, steps=20, probe=PROBE)
    wanted = alignment.said(model, BATCH).rows.clone()  # type: ignore[attr-defined]
    loop(model, alignment, adam(model), 3)
    assert alignment.carry is not None
    assert alignment.carry.on
    close(alignment.said(model, BATCH).rows, wanted, 1e-12)  # type: ignore[attr-defined]


def test_an_average_of_products_goes_on_through_the_phase() -> None:
    """The exact average of s B A over the steps, up to what its rank cannot hold."""
    model = student()
    alignment = Alignment(model, "ema", divergence="fkl", schedule=SMALL, steps=20, probe=PROBE)
    optimizer, exact = adam(model), updates(model)
    for _ in range(4):
        step(model, alignment, optimizer)
        exact = {path: 0.95 * exact[path] + 0.05 * now for path, now in updates(model).items()}
    teacher: Any = alignment.teacher
    assert alignment.carry is not None
    assert alignment.carry.on
    with alignment.carry.without(), teacher.running(model):
        found = updates(model)
    for path, wanted in exact.items():
        assert float((found[path] - wanted).norm() / wanted.norm()) < 0.05


def test_moments_begin_anew_with_the_directions() -> None:
    model = student()
    _, optimizer = reoriented(model)
    states = [optimizer.state[p] for n, p in model.named_parameters() if "lora_" in n]
    assert states
    assert not any(bool(value.any()) for state in states for value in state.values())


def test_a_roll_back_drops_what_was_carried() -> None:
    model = student()
    settings = CyclicSettings(task_steps=2, teacher_steps=1, rewarm_steps=0, reorient=True)
    alignment, optimizer = Alignment(model, "base", schedule=settings, steps=50, probe=PROBE), adam(model)
    loop(model, alignment, optimizer, 2)
    assert alignment.carry is not None
    assert alignment.carry.on
    kept = {name: value.clone() for name, value in alignment._kept["values"].items()}
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
        for p in model.parameters():
            if p.requires_grad:
                p.add_(10 * torch.randn_like(p))
    found = alignment.after_step(model, optimizer) + alignment.after_step(model, optimizer)
    assert [d.kind for d in found] == ["refused", "rolled back"]
    assert not alignment.carry.on
    for name, p in model.named_parameters():
        if name in kept:
            assert_equal_bits(p.detach(), kept[name])


@pytest.mark.parametrize("at", [2, 3, 6])
def test_a_training_goes_on_in_the_middle_of_a_phase_to_the_bit(at: int) -> None:
    whole = student()
    alignment, optimizer = made(whole, "snapshot"), adam(whole)
    losses = loop(whole, alignment, optimizer, 9)

    first = student()
    begun, state = made(first, "snapshot"), adam(first)
    loop(first, begun, state, at)
    kept = (copy.deepcopy(begun.state_dict()), copy.deepcopy(first.state_dict()), copy.deepcopy(state.state_dict()))

    second = student()
    resumed, again = made(second, "snapshot"), adam(second)
    resumed.load_state_dict(kept[0])
    second.load_state_dict(kept[1])
    again.load_state_dict(kept[2])
    assert loop(second, resumed, again, 9 - at) == losses[at:]
    for path, product in updates(second).items():
        assert_equal_bits(product, updates(whole)[path])


def test_a_phase_that_the_training_ends_in_is_folded_in() -> None:
    model = student()
    settings = CyclicSettings(task_steps=2, teacher_steps=3, gate=False, reorient=True, end_on_teacher=True)
    alignment = Alignment(model, "base", schedule=settings, steps=5, probe=PROBE)
    optimizer = adam(model)
    loop(model, alignment, optimizer, 4)
    _, decisions = step(model, alignment, optimizer)
    assert [d.kind for d in decisions] == ["compressed"]
    assert alignment.carry is not None
    assert not alignment.carry.on


def test_a_checkpoint_that_carries_something_needs_the_setting() -> None:
    model = student()
    begun = reoriented(model)[0]
    state, plain = begun.state_dict(), student()
    off = Alignment(plain, begun.teacher.name, schedule=replace(SMALL, reorient=False), steps=20, probe=PROBE)
    with pytest.raises(CheckpointError, match=r"in a phase with align\.reorient=true, and here it is off"):
        off.load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"init_lora_weights": "pissa"}, "has a frozen start already, as PiSSA's has. Leave it off"),
        ({"use_dora": True}, r"cuts the product of A and B, and the update of .*\(dora\) is more than one product"),
        ({"freeze_A": True}, "gives A new directions, and no adapter is trained here with both of its factors"),
    ],
)
def test_adapters_that_cannot_be_carried_are_refused(settings: dict[str, Any], text: str) -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules="all-linear", r=4, **settings))
    with pytest.raises(AdapterError, match=text):
        made(model)
