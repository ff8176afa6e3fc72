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
from lorafa.errors import AdapterError, CheckpointError, ConfigError
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


def test_a_model_that_was_compiled_since_is_the_same() -> None:
    model = adapted().eval()
    alignment = Alignment(model, "snapshot", divergence="fkl")
    train(model, 0.3)
    wanted = said(alignment, model)
    compiled = torch.compile(model, backend="eager")
    assert_equal_bits(said(alignment, compiled), wanted)
    assert Alignment(compiled, "ema").state_dict()["teacher"]["values"].keys() == alignment.teacher.values.keys()  # type: ignore[attr-defined]
