"""A teacher that knows the truth, and rows with noise in their labels: phases in turn come nearer to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorafa import LoraConfig, get_peft_model
from lorafa.alignment import Alignment
from lorafa.alignment.schedule import CyclicSettings
from toys.language_models import llama

TARGETS = ["o_proj", "down_proj"]


def base() -> Any:
    torch.manual_seed(0)
    return llama().eval()


def planted() -> Any:
    """The base with an update of rank 2 on each layer that is trained."""
    model, generator = base(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.endswith(tuple(TARGETS)):
                out, in_ = module.weight.shape
                delta = torch.randn(out, 2, generator=generator) @ torch.randn(2, in_, generator=generator)
                module.weight.add_(0.4 * delta / delta.norm() * module.weight.norm())
    return model


def student() -> Any:
    model = base()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(target_modules=TARGETS, r=4, lora_alpha=8)).eval()


@torch.no_grad()
def rows(teacher: Any, count: int, noise: float, seed: int) -> dict[str, Tensor]:
    """What the teacher writes, of which a share of the labels is any token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 32, (count, 1), generator=generator)
    for _ in range(15):
        p = teacher(input_ids=ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
    wrong = torch.rand(ids.shape, generator=generator) < noise
    labels = torch.where(wrong, torch.randint(0, 32, ids.shape, generator=generator), ids)
    return {"input_ids": ids, "labels": labels}


def trained(teacher: Any, weight: float) -> tuple[float, float, int]:
    """Task's loss and divergence on clean rows that were not trained on, and how often the teacher was read."""
    model, noisy, held = student(), rows(teacher, 8, 0.3, seed=2), rows(teacher, 32, 0.0, seed=3)
    settings = CyclicSettings(task_steps=4, teacher_steps=4, rewarm_steps=0, gate=False)  # which would refuse the noise
    alignment = Alignment(
        model, teacher, weight=weight, divergence="fkl", schedule=settings, steps=28, probe=[rows(teacher, 4, 0.0, 4)]
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(28):
        optimizer.zero_grad()
        alignment.loss(model, noisy).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        alignment.after_step(model, optimizer)
    measured = Alignment(model, teacher, divergence="fkl", probe=[held]).probe(model)
    return measured.task, measured.divergence, alignment.teacher_passes


def test_phases_of_a_teacher_lower_the_divergence_and_the_tasks_loss() -> None:
    teacher = planted()
    (task, divergence, never), (own_task, own_divergence, passes) = trained(teacher, 0.0), trained(teacher, 2.0)
    assert never == 0
    assert passes == 12  # three phases of four steps
    assert own_divergence < 0.8 * divergence, (own_divergence, divergence)
    assert own_task < task, (own_task, task)
