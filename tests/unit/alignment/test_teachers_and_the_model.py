"""A teacher says what it is to say whatever is done to the model, or says why it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, get_peft_model
from lorafa.alignment import Alignment, Cached
from lorafa.alignment.schedule import CyclicSettings
from lorafa.errors import AdapterError, BackendError, CheckpointError, ConfigError, DivergedError
from toys.adapters import train
from toys.compare import assert_equal_bits
from toys.language_models import adapted, llama

IDS = torch.tensor([[4, 7, 1, 9, 3, 2], [2, 8, 8, 5, 1, 6]])
BATCH = {"input_ids": IDS, "labels": IDS}


def fresh(base: nn.Module | None = None, **settings: Any) -> Any:
    return get_peft_model(base or llama(), LoraConfig(**({"target_modules": "all-linear", "r": 4} | settings))).eval()


def said(alignment: Alignment, model: Any) -> Tensor:
    return alignment.said(model, BATCH).logits()  # type: ignore[attr-defined]


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits[:, :-1].flatten(0, 1)
    return found


# ---- the student's own layers


@pytest.mark.parametrize("given", ["itself", "the model below", "kept"])
def test_a_student_that_is_its_own_teacher_is_refused_and_stays_as_it_was(given: str, tmp_path: Path) -> None:
    model = fresh()
    before = [p.requires_grad for p in model.parameters()]
    teacher = {"itself": model, "the model below": model.get_base_model(), "kept": Cached(tmp_path / "t", model)}[given]
    with pytest.raises(ConfigError, match=r"The teacher is the student, or has layers .*lora_A.*teacher='base' for"):
        Alignment(model, teacher)
    assert [p.requires_grad for p in model.parameters()] == before


def test_another_model_is_frozen() -> None:
    other = llama()
    Alignment(fresh(), other)
    assert not any(p.requires_grad for p in other.parameters())


# ---- the base


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_base_is_what_it_was_where_some_of_it_is_trained(bias: str) -> None:
    pristine = llama(attention_bias=True).eval()
    model = fresh(llama(attention_bias=True), bias=bias)
    alignment = Alignment(model, "base")
    train(model, 0.3)
    assert any(".bias" in name and p.requires_grad for name, p in model.named_parameters())
    assert torch.allclose(said(alignment, model), logits_of(pristine), atol=1e-6)
    again = Alignment(model, "base")  # as a training that is resumed: what is trained has moved
    assert not torch.allclose(said(again, model), logits_of(pristine), atol=1e-6)
    again.load_state_dict(alignment.state_dict())
    assert_equal_bits(said(again, model), said(alignment, model))


def test_a_base_of_which_something_else_is_trained_is_not_continued() -> None:
    biased = Alignment(fresh(llama(attention_bias=True), bias="all"), "base")
    plain = Alignment(fresh(llama(attention_bias=True)), "base")
    with pytest.raises(CheckpointError, match="values of other parameters than are trained of the base here"):
        plain.load_state_dict(biased.state_dict())


# ---- states of the adapters


@pytest.mark.parametrize("name", ["snapshot", "ema", "anchor"])
def test_adapters_that_are_merged_or_off_have_no_other_state(name: str) -> None:
    model = adapted()
    alignment = Alignment(model, name, divergence="fkl")
    train(model, 0.3)
    model.merge_adapter()
    with pytest.raises(AdapterError, match=rf"The teacher '{name}' is another state .* merged here\. Call unmerge"):
        alignment.loss(model, BATCH)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(AdapterError, match="they are switched off here"):
        alignment.loss(model, BATCH)
    alignment.loss(model, BATCH)
    assert (alignment.last_divergence or 0) > 0


def two() -> Any:
    model = fresh()
    model.add_adapter("other", LoraConfig(target_modules="all-linear", r=4))
    return model


@pytest.mark.parametrize("deletes", [False, True])
@pytest.mark.parametrize("name", ["snapshot", "ema", "anchor"])
def test_another_adapter_in_the_middle_is_named(name: str, deletes: bool) -> None:
    model = two()
    alignment = Alignment(model, name)
    model.set_adapter("other")
    if deletes:
        model.delete_adapter("default")
    text = rf"What is trained has changed since the teacher '{name}' was made: .*lora_A\.(default|other)\.weight"
    with pytest.raises(AdapterError, match=text):
        alignment.loss(model, BATCH)
    with pytest.raises(AdapterError, match=text):
        alignment.teacher.refresh(model) if name != "ema" else alignment.teacher.after_step(model)


def test_an_adapter_of_another_rank_by_the_same_name_is_another() -> None:
    model = fresh()
    alignment = Alignment(model, "snapshot")
    model.add_adapter("other", LoraConfig(target_modules="all-linear", r=4))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(target_modules="all-linear", r=2))
    model.set_adapter("default")
    with pytest.raises(AdapterError, match="What is trained has changed since the teacher 'snapshot' was made"):
        alignment.loss(model, BATCH)


def test_a_roll_back_to_another_adapter_is_refused() -> None:
    model = two()
    settings = CyclicSettings(task_steps=1, teacher_steps=1)
    alignment = Alignment(model, "base", schedule=settings, steps=50, probe=[BATCH])
    model.set_adapter("other")
    with torch.no_grad():
        model.get_base_model().lm_head.weight.mul_(50)  # the task is lost
    alignment.after_step(model)
    with pytest.raises(AdapterError, match="What is trained has changed since the student was last accepted"):
        alignment.after_step(model)


@pytest.mark.slow
def test_a_model_that_was_compiled_since_is_the_same() -> None:
    model = adapted().eval()
    alignment = Alignment(model, "snapshot", divergence="fkl")
    train(model, 0.3)
    wanted = said(alignment, model)
    compiled = torch.compile(model, backend="eager")
    assert_equal_bits(said(alignment, compiled), wanted)
    assert Alignment(compiled, "ema").state_dict()["teacher"]["values"].keys() == alignment.teacher.values.keys()  # type: ignore[attr-defined]


# ---- what is not finite


def spoilt(model: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.fill_(float("nan"))


@pytest.mark.parametrize("settings", [{}, {"divergence": "none", "map": "procrustes"}])
def test_a_student_that_has_diverged_is_not_its_teachers_fault(settings: dict[str, Any]) -> None:
    model = fresh()
    alignment = Alignment(model, llama(), **settings)
    spoilt(model)
    assert not bool(torch.isfinite(alignment.loss(model, BATCH)))  # as without a teacher


def test_a_teacher_that_gives_nan_is_named_by_a_decomposition_too() -> None:
    other = llama()
    alignment = Alignment(fresh(), other, divergence="none", map="procrustes")
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")  # type: ignore[union-attr,index]
    with pytest.raises(DivergedError, match="The divergence from the teacher is not finite"):
        alignment.loss(fresh(), BATCH)


def test_a_gate_brings_a_student_that_has_diverged_back() -> None:
    model = fresh()
    settings = CyclicSettings(task_steps=1, teacher_steps=1)
    alignment = Alignment(model, "base", schedule=settings, steps=50, probe=[BATCH])
    found = []
    for _ in range(2):
        spoilt(model)
        found += alignment.after_step(model)
    assert [decision.kind for decision in found] == ["refused", "rolled back"]
    assert bool(torch.isfinite(alignment.loss(model, BATCH)))


def test_no_average_is_made_of_what_is_not_finite() -> None:
    model = fresh()
    alignment = Alignment(model, "ema")
    spoilt(model)
    with pytest.raises(DivergedError, match=r"The adapter of '.*q_proj' has inf or nan, which no teacher can be made"):
        alignment.after_step(model)


def test_a_roll_back_to_the_start_forgets_what_the_optimizer_has_learnt_since() -> None:
    model = fresh()
    settings = CyclicSettings(task_steps=1, teacher_steps=1)
    alignment = Alignment(model, "base", schedule=settings, steps=50, probe=[BATCH])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        alignment.loss(model, BATCH).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            model.get_base_model().lm_head.weight.mul_(50)
        found = alignment.after_step(model, optimizer)
    assert [decision.kind for decision in found] == ["rolled back"]
    assert all(not bool(state["exp_avg"].any()) and float(state["step"]) == 0 for state in optimizer.state.values())


# ---- what is asked for


@pytest.mark.parametrize(
    ("teacher", "settings", "text"),
    [
        (["base"], {}, r"Unknown teacher \['base'\]"),
        ("base", {"divergence": ["fkl"]}, r"Unknown divergence \['fkl'\]"),
        ("base", {"divergence": ""}, "Unknown divergence ''"),
        ("base", {"divergence": "none"}, "compares inner states alone, .* both need a map"),
        ("base", {"map_layers": (1,)}, "both need a map. Name one"),
        ("base", {"map": "mse", "map_layers": ()}, "names no layer, and the model has 2. Name some from 0"),
        ("base", {"map": "mse", "map_layers": (1, 3)}, r"=\[1, 3\] \(list\) names layer 3, and the model has 2"),
        ("base", {"map": "mse", "map_layers": ("a",)}, "align.map_layers must hold integers >= 0 only, found 'a'"),
        ("base", {"map": "mse", "map_layers": 1}, "align.map_layers must be a list of integers, found 1"),
        ("base", {"schedule": 5}, "schedule has no value 5"),
        ("base", {"schedule": "cyclic", "steps": "12", "probe": [BATCH]}, "steps must be an integer >= 1, found '12'"),
        ("base", {"schedule": "cyclic", "steps": 900, "probe": BATCH}, "probe is a list of batches, .* Pass "),
        ("base", {"schedule": "cyclic", "steps": 900, "probe": 3}, "probe is a list of batches, .* found int"),
        ("base", {"schedule": "cyclic", "steps": 40, "probe": [BATCH]}, "has 40 steps, .* needs 300: .* count in none"),
    ],
)
def test_what_means_nothing_is_refused(teacher: Any, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Alignment(fresh(), teacher, **settings)


@pytest.mark.parametrize("layers", [1, 4])
def test_layers_of_a_teacher_of_another_depth_are_to_be_named(layers: int) -> None:
    other = llama(num_hidden_layers=layers)
    with pytest.raises(ConfigError, match=rf"The teacher has {layers} layers and the student 2, .*map_layers"):
        Alignment(fresh(), other, map="mse")
    alignment = Alignment(fresh(), other, map="mse", map_layers=(1,))
    assert bool(torch.isfinite(alignment.loss(fresh(), BATCH)))


def test_no_model_of_transformers_is_said_to_be_none() -> None:
    with pytest.raises(BackendError, match=r"The student cannot be cut before its head.* is not a transformers model"):
        Alignment(nn.Linear(3, 3), llama())
    with pytest.raises(BackendError, match=r"reads inner states of models of transformers, and this is Linear"):
        Alignment(nn.Linear(3, 3), llama(), map="mse")


def test_a_state_of_another_alignment_is_refused() -> None:
    model = fresh()
    cyclic: dict[str, Any] = {"schedule": CyclicSettings(1, 1), "steps": 9, "probe": [BATCH]}
    of_ema, phases = Alignment(model, "ema").state_dict(), Alignment(model, "snapshot", **cyclic).state_dict()
    snapshot = Alignment(model, "snapshot")
    with pytest.raises(CheckpointError, match="of a training with the teacher 'ema', and here it is 'snapshot'"):
        snapshot.load_state_dict(of_ema)
    with pytest.raises(CheckpointError, match="came in phases, and here it counts in every step"):
        snapshot.load_state_dict(phases)
    with pytest.raises(CheckpointError, match="counted in every step, and here it comes in phases"):
        Alignment(model, "snapshot", **cyclic).load_state_dict(snapshot.state_dict())
    with pytest.raises(CheckpointError, match=r"has no 'carry': it is damaged, or another version's"):
        snapshot.load_state_dict({})
