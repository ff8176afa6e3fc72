"""What a teacher takes is counted: the weights of another model, states that are kept, and a step with both."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafa import LoraConfig, get_peft_model
from lorafa.alignment import Alignment
from lorafa.alignment.registries import TEACHERS
from lorafa.conf.compose import compose
from lorafa.costs import fits
from lorafa.costs.batches import Batch, Batches
from lorafa.costs.memory import Counted, Memory, count, shape_of, teacher_of
from lorafa.errors import ConfigError, SourceError
from lorafa.models.attention import use_blocks
from toys.adapters import train
from toys.language_models import adapted, llama
from toys.watch import Alive, Kept
from toys.workplace import make_workplace

BATCHES = Batches(Batch(4, 64, 100), None, None, 10, "a test")
CYCLIC = ("align.schedule=cyclic",)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_workplace(tmp_path_factory.mktemp("work")) / "model")


def counted(model: str, *more: str) -> Counted:
    config = compose([f"model={model}", "peft.r=4", "peft.lora_dropout=0", *more])
    return count(shape_of(config.model), config, BATCHES)


def parts(found: Counted) -> Memory:
    """Without the process, which grows in tests, and the gaps, which any difference moves."""
    return replace(found.memory, process=0, gaps=0)


def test_a_teacher_made_of_the_student_takes_the_states_it_keeps(model: str) -> None:
    plain = parts(counted(model))
    assert plain.teacher == 0
    assert parts(counted(model, "align=base", "align.weight=0")) == plain
    for name, copies in {"base": 0, "snapshot": 1, "ema": 1, "anchor": 2}.items():
        found = parts(counted(model, f"align={name}"))
        assert found.teacher == copies * plain.adapter
        assert (found.weights, found.adapter, found.state) == (plain.weights, plain.adapter, plain.state)


def test_a_cyclic_schedule_keeps_the_student_and_its_optimizer(model: str) -> None:
    plain = parts(counted(model))
    assert parts(counted(model, "align=base", *CYCLIC)).teacher == plain.adapter + plain.state
    assert parts(counted(model, "align=snapshot", *CYCLIC)).teacher == 2 * plain.adapter + plain.state


@pytest.mark.parametrize("name", ["base", "snapshot", "ema", "anchor"])
def test_a_teacher_keeps_as_many_states_as_it_says(name: str) -> None:
    student = adapted(llama())
    teacher: Any = TEACHERS.get(name)()
    teacher.begin(student)
    for _ in range(2):
        train(student, 0.1)
        teacher.after_step(student)
        teacher.refresh(student)
    kept = [tensor for held in (getattr(teacher, "values", {}), getattr(teacher, "reference", {}))
            for tensor in held.values()]  # fmt: skip
    size = sum(storage.nbytes() for storage in {t.data_ptr(): t.untyped_storage() for t in kept}.values())
    assert size == teacher.copies * sum(p.nbytes for p in student.parameters() if p.requires_grad)


def test_another_model_takes_its_weights_in_the_format_that_is_asked_for(model: str) -> None:
    external = ("align=external", f"align.teacher={model}")
    plain, found = parts(counted(model)), parts(counted(model, *external))
    assert found.teacher == found.weights == plain.weights
    half = parts(counted(model, *external, "align.dtype=bfloat16"))
    assert 0.4 < half.teacher / plain.weights < 0.6
    assert half.weights == plain.weights


def test_weights_of_a_teacher_that_are_converted_lie_beside_what_they_become(model: str) -> None:
    settings = [f"model={model}", "peft.r=1", "align=external", f"align.teacher={model}", "align.dtype=bfloat16"]
    config = compose(settings)
    teacher = teacher_of(config)
    assert teacher is not None
    assert teacher.stored is not None
    found = count(shape_of(config.model), config, None).memory
    most = found.weights + found.adapter + teacher.loaded_bytes + teacher.stored.bytes
    assert found.total - found.process == max(most, found.weights + found.adapter + found.state + found.teacher)
    assert found.loading > 0


def trained(model: str) -> Any:
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(model)
    use_blocks(base)  # as a run loads it
    found = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    train(found, 0.1)
    return found.train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 50, (4, 64))
    labels = ids.clone()
    labels[:, :-25] = -100  # 100 of them count
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize(
    "align",
    [
        {"teacher": "base"},
        {"teacher": "snapshot", "divergence": "js"},
        {"teacher": "external"},
        {"teacher": "base", "map": "procrustes"},
    ],
)
def test_the_peak_of_a_step_with_a_teacher_is_that_of_a_real_one(model: str, align: dict[str, str]) -> None:
    from transformers import AutoModelForCausalLM

    named = [f"align={align['teacher']}", *(f"align.{key}={align[key]}" for key in align if key != "teacher")]
    named += [f"align.teacher={model}"] if align["teacher"] == "external" else []
    found = counted(model, *named)
    assert found.uncounted is None
    assert found.course is not None
    student, rows = trained(model), batch()
    given = AutoModelForCausalLM.from_pretrained(model) if align["teacher"] == "external" else align["teacher"]
    alignment = Alignment(student, given, **{key: align[key] for key in align if key != "teacher"})
    known = [*student.parameters(), *student.buffers()]
    with Kept(*known) as kept:
        alignment.loss(student, rows, 1).backward()
    student.zero_grad()
    gc.collect()
    with Alive() as alive:
        alignment.loss(student, rows, 1).backward()
    # Beside what autograd keeps there are the batch's ids, mask and labels, moved by one, and the loss.
    assert kept.bytes <= found.course.kept() <= 1.02 * kept.bytes + 4 * 64 * 8 * 4
    assert sum(found.course.step()) == pytest.approx(alive.peak, rel=0.03)


def test_a_teacher_that_cannot_be_compared_is_refused_as_by_the_run(tmp_path: Path, model: str) -> None:
    other = llama(vocab_size=900, max_position_embeddings=256)
    other.save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(ConfigError, match="their distributions over next tokens cannot be compared"):
        counted(model, "align=external", f"align.teacher={tmp_path}")


def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_loaded(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama(hidden_size=256, intermediate_size=1024).save_pretrained(tmp_path)  # type: ignore[operator]
    config = compose([f"model={model}", "peft.r=4"])
    taught = compose([f"model={model}", "peft.r=4", "align=external", f"align.teacher={tmp_path}",
                      "align.divergence=none", "align.map=procrustes"])  # fmt: skip
    monkeypatch.setattr(fits, "available_bytes", lambda: 4_000_000)
    fits.require_room(config)
    with pytest.raises(SourceError, match=r"teacher \d.* MiB.* are available\. Nothing was loaded"):
        fits.require_room(taught)
