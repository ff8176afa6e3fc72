"""What a batch without labels does, and what stops a training: the step and the rows are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lorafa.data.chat import Sample
from lorafa.data.collate import Collator
from lorafa.errors import DataError, DivergedError
from toys.data import samples
from toys.training import Do, adapted_model, trainer_for


def masked(rows: list[dict[str, list[int]]], *which: int) -> list[dict[str, list[int]]]:
    return [{**row, "labels": [-100] * len(row["labels"])} if i in which else row for i, row in enumerate(rows)]


def gradients(folder: Path, rows: list[dict[str, list[int]]], chunked: bool, **args: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    model = adapted_model()

    def keep(state: hf.TrainerState) -> None:
        found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    own = {"callbacks": [Do("on_pre_optimizer_step", keep)], "chunked_loss": chunked, "train_dataset": rows}
    trainer_for(folder, model, own, max_steps=1, max_grad_norm=0.0, **args).train()
    return found


@pytest.mark.parametrize("chunked", [True, False])
def test_a_batch_without_labels_adds_nothing_to_its_step(tmp_path: Path, chunked: bool) -> None:
    rows = samples(3)
    one = {"per_device_train_batch_size": 1}
    accumulated = gradients(tmp_path, masked(rows, 1), chunked, gradient_accumulation_steps=3, **one)
    without = gradients(tmp_path, [rows[0], rows[2]], chunked, gradient_accumulation_steps=2, **one)
    assert without
    torch.testing.assert_close(accumulated, without, rtol=1e-5, atol=1e-7)


def test_a_step_without_labels_is_refused_with_its_rows(tmp_path: Path) -> None:
    own = {"train_dataset": masked(samples(4), 0, 1, 2, 3), "decode": str}
    with pytest.raises(
        DataError, match=r"No token of step 1 is trained: .* \(rows \d, \d of the training rows, the fi"
    ):
        trainer_for(tmp_path, own=own, max_steps=1).train()


def test_rows_are_named_by_where_they_stand_where_that_is_known(tmp_path: Path) -> None:
    def of_file(count: int) -> list[Sample]:
        rows = masked(samples(4), 0, 1, 2, 3)[:count]
        return [Sample(**row, place=f"d.jsonl, line {7 * number}") for number, row in enumerate(rows, 1)]

    own = {"train_dataset": of_file(2), "data_collator": Collator(0), "decode": str}
    with pytest.raises(
        DataError, match=r"\(-100\) \(rows d\.jsonl, line (7|14), d\.jsonl, line (14|7), the first begins '\["
    ):
        trainer_for(tmp_path, own=own, max_steps=1).train()
    one = {"train_dataset": of_file(1), "data_collator": Collator(0)}
    with pytest.raises(DataError, match=r"\(-100\) \(row d\.jsonl, line 7\)\. Check the answers"):
        trainer_for(tmp_path, own=one, max_steps=1).train()


@pytest.mark.parametrize("chunked", [True, False])
def test_a_held_out_batch_without_labels_counts_nothing(tmp_path: Path, chunked: bool) -> None:
    rows, own = samples(5, seed=1), {"chunked_loss": chunked}
    args = {"per_device_eval_batch_size": 1}
    some = trainer_for(tmp_path, own=own | {"eval_dataset": masked(rows, 2)}, **args).evaluate()["eval_loss"]
    rest = trainer_for(tmp_path, own=own | {"eval_dataset": rows[:2] + rows[3:]}, **args).evaluate()["eval_loss"]
    assert some == pytest.approx(rest, rel=1e-6)


class Broken(torch.autograd.Function):
    """The identity, with a gradient that is none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * torch.nan


def breaking(model: nn.Module) -> nn.Module:
    """After the first step the gradient of the second layer's input is not finite."""
    calls: list[int] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        calls.append(1)
        states = args[0] if args else kwargs["hidden_states"]
        broken = Broken.apply(states) if len(calls) > 3 and states.requires_grad else states
        return ((broken, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": broken})

    model.get_base_model().model.layers[1].register_forward_pre_hook(hook, with_kwargs=True)  # type: ignore[operator]
    return model


@pytest.mark.parametrize("clipped", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path: Path, clipped: float) -> None:
    model = breaking(adapted_model())
    own = {"decode": lambda ids: f"text of {len(ids)} tokens"}
    with pytest.raises(
        DivergedError, match=r"The gradient is not finite in step \d \(rows .* the first begins 'text of \d+ tokens'\)"
    ):
        trainer_for(tmp_path, model, own, max_grad_norm=clipped).train()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_weights_that_are_not_finite_at_the_end_are_no_result(tmp_path: Path) -> None:
    model = adapted_model()

    def spoil(state: hf.TrainerState) -> None:
        if state.global_step == 2:
            next(p for name, p in model.named_parameters() if "lora_B" in name).data.fill_(torch.inf)

    trainer = trainer_for(tmp_path, model, {"callbacks": [Do("on_step_end", spoil)]}, max_steps=2)
    with pytest.raises(DivergedError, match=r"After step 2 1 weights are not finite"):
        trainer.train()
