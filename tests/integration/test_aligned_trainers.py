"""A teacher in trainers: the loss of a loop written by hand, phases that resume, and nothing where it has no weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from lorafa.alignment import Alignment
from lorafa.alignment.schedule import CyclicSettings, Decision
from lorafa.errors import CheckpointError, ConfigError
from lorafa.optimizers import OPTIMIZERS
from lorafa.peft_model import PeftModel
from lorafa.train.adapter_checkpoints import AdapterCheckpoints
from lorafa.train.aligned import AlignedTrainer, Aligning
from toys.adapters import train
from toys.data import collate, samples
from toys.training import Killed, adapted_model, kill_after, log_of, trainer_for

CYCLE = CyclicSettings(task_steps=2, teacher_steps=2, rewarm_steps=2, gate=False)
STEPS = 8


def student() -> Any:
    model = adapted_model()
    torch.manual_seed(3)
    train(model, 0.2)
    return model


def trainer(folder: Path, model: Any, alignment: Alignment, kind: type[Any] = AlignedTrainer, **own: Any) -> Any:
    settings = {
        "max_steps": STEPS, "logging_steps": 1, "save_strategy": "no", "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 2,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, seed=5, learning_rate=1e-2,
        **(settings | own.pop("args", {})),
    )  # fmt: skip
    data = {"train_dataset": samples(), "eval_dataset": samples(5, seed=1), "data_collator": collate}
    return kind(model, arguments, alignment=alignment, **(data | own))


def probe() -> list[dict[str, Tensor]]:
    return [collate(samples(4, seed=2))]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


class Plain(Aligning, AdapterCheckpoints, transformers.Trainer):  # type: ignore[misc]
    """The trainer of transformers by one subclass."""


@pytest.mark.parametrize("kind", [AlignedTrainer, Plain])
def test_the_divergence_of_each_step_is_logged_and_evaluations_have_no_teacher(tmp_path: Path, kind: Any) -> None:
    model = student()
    made = trainer(tmp_path, model, Alignment(model, "base", weight=2.0), kind)
    before = made.evaluate()["eval_loss"]
    made.train()
    rows = [row for row in log_of(made) if "loss" in row]
    assert len(rows) == STEPS
    assert all(row["divergence"] > 0 for row in rows)
    plain = trainer_for(tmp_path, student())
    assert before == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


def test_a_trainer_that_wraps_the_model_itself_is_refused_on_several_devices(tmp_path: Path) -> None:
    class OnTwo(transformers.TrainingArguments):  # type: ignore[misc]
        @property
        def n_gpu(self) -> int:
            return 2

    model, own = student(), {"use_cpu": True, "report_to": "none", "per_device_train_batch_size": 2}
    with pytest.raises(ConfigError, match=r"on several devices needs a trainer whose.*Take lorafa\.train\.aligned"):
        Plain(model, OnTwo(str(tmp_path), **own), alignment=Alignment(model, "base"), train_dataset=samples())


def test_batches_of_unequal_counts_are_one_step_of_all_their_tokens(tmp_path: Path) -> None:
    """Four batches of a row each, with 1, 2, 3 and 4 tokens that count, are the step of one batch with all."""
    rows = samples(4)
    for number, row in enumerate(rows):
        labels = list(row["input_ids"])
        row["labels"] = [-100] * (len(labels) - number - 1) + labels[len(labels) - number - 1 :]
    found = []
    for kind in (AlignedTrainer, Plain):
        for size, steps in ((1, 4), (4, 1)):
            model = student()
            args = {"max_steps": 1, "per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
            alignment = Alignment(model, "base", weight=2.0, divergence="fkl")
            made = trainer(tmp_path, model, alignment, kind, args=args, train_dataset=rows)
            gradients: dict[str, Tensor] = {}

            class Watch(transformers.TrainerCallback):  # type: ignore[misc]
                def on_pre_optimizer_step(self, *_: Any, model: Any = None, into: Any = gradients, **__: Any) -> None:
                    into.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

            made.add_callback(Watch())
            made.train()
            (line,) = [row for row in log_of(made) if "loss" in row]
            found.append((line["loss"], line["divergence"], gradients))
    for loss, divergence, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert divergence == pytest.approx(found[0][1], rel=1e-4)  # of float32
        for name, grad in found[0][2].items():
            torch.testing.assert_close(gradients[name], grad, rtol=1e-4, atol=1e-6)


def test_a_teacher_pulls_the_student_back(tmp_path: Path) -> None:
    ends = []
    for weight in (0.0, 200.0):
        model = student()
        alignment = Alignment(model, "base", weight=weight, divergence="fkl")
        trainer(tmp_path, model, alignment, args={"max_steps": 30}).train()
        alignment = Alignment(model, "base", divergence="fkl", weight=1.0)
        ends.append(alignment.loss(model, probe()[0]) and alignment.last_divergence)
    assert ends[1] < ends[0] / 2


def test_weight_zero_trains_to_the_bit_what_no_teacher_does(tmp_path: Path) -> None:
    plain, aligned = student(), student()
    settings = {"max_steps": STEPS, "logging_steps": 1, "lr_scheduler_type": "constant"}
    first = trainer_for(tmp_path / "a", plain, **settings)
    first.train()
    second = trainer(tmp_path / "b", aligned, Alignment(aligned, "base", weight=0.0))
    second.train()
    assert_equal(values(plain), values(aligned))
    assert [row["loss"] for row in log_of(first) if "loss" in row] == [
        row["loss"] for row in log_of(second) if "loss" in row
    ]
    assert not any("divergence" in row for row in log_of(second))


def wider() -> Any:
    """A model with wider states, which only a map between sizes can be compared with."""
    return adapted_model(base={"hidden_size": 12}).eval()


KINDS: dict[str, dict[str, Any]] = {
    "snapshot": {"teacher": lambda: "snapshot", "schedule": CYCLE},
    "reoriented": {"teacher": lambda: "snapshot", "schedule": replace(CYCLE, reorient=True), "weight": "balanced"},
    "projected": {"teacher": wider, "schedule": CYCLE, "map": "proj", "map_weight": 5.0, "weight": "balanced"},
    "without phases": {"teacher": lambda: "base", "schedule": "constant", "weight": "balanced", "divergence": "fkl"},
}


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "reoriented"]


@pytest.mark.parametrize("kind", ["reoriented", *SLOW])
def test_it_resumes_in_the_middle_of_a_phase_to_the_bit(tmp_path: Path, kind: str) -> None:
    def made(folder: Path, **own: Any) -> tuple[Any, Any]:
        model, settings = student(), dict(KINDS[kind])
        teacher, cyclic = settings.pop("teacher")(), settings["schedule"] is not KINDS["without phases"]["schedule"]
        alignment = Alignment(model, teacher, steps=STEPS, probe=probe() if cyclic else (), **settings)
        decisions: list[Decision] = []
        return model, trainer(
            folder, model, alignment, args={"save_strategy": "steps", "save_steps": 1},
            on_decision=decisions.append, **own,
        )  # fmt: skip

    whole, one = made(tmp_path / "whole")
    one.train()
    _, cut = made(tmp_path / "cut", callbacks=[kill_after(4)])  # the checkpoint is that of step 3
    with pytest.raises(Killed):
        cut.train()
    again, resumed = made(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert_equal(values(whole), values(again))
    assert [row for row in log_of(one) if "loss" in row] == [row for row in log_of(resumed) if "loss" in row]
    assert one.alignment.schedule.state_dict() == resumed.alignment.schedule.state_dict()
    assert one.alignment.weighing.state_dict() == resumed.alignment.weighing.state_dict()
    for found, wanted in zip(resumed.alignment.parameters(), one.alignment.parameters(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.slow
def test_the_best_checkpoint_may_be_of_the_middle_of_a_phase(tmp_path: Path) -> None:
    model = student()
    schedule = replace(CYCLE, reorient=True)
    alignment = Alignment(model, "base", schedule=schedule, steps=STEPS, probe=probe())
    made = trainer(tmp_path, model, alignment, args={"save_strategy": "steps", "save_steps": 1})
    made.train()
    assert alignment.carry is not None
    for step, carries in ((3, True), (6, False)):
        made.state.best_model_checkpoint = str(tmp_path / f"checkpoint-{step}")
        made._load_best_model()
        assert alignment.carry.on is carries
        base = adapted_model().unload()
        again = PeftModel.from_pretrained(base, tmp_path / f"checkpoint-{step}").eval()
        with torch.no_grad():
            batch = probe()[0]
            torch.testing.assert_close(model.eval()(**batch).loss, again(**batch).loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [AlignedTrainer, Plain])
def test_a_map_is_trained_with_the_student_and_is_in_no_file(tmp_path: Path, kind: Any) -> None:
    model = student()
    alignment = Alignment(model, wider(), map="proj", map_weight=5.0)
    before = [p.detach().clone() for p in alignment.parameters()]
    assert [tuple(p.shape) for p in before] == [(12, 8), (12, 8)]
    made = trainer(tmp_path, model, alignment, kind, args={"save_strategy": "steps", "save_steps": STEPS})
    made.train()
    assert all(not torch.equal(p, old) for p, old in zip(alignment.parameters(), before, strict=True))
    assert all(p.grad is None for p in alignment.parameters())
    kept = load_file(tmp_path / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    assert len(kept) == len(values(model))
    rows = [row["divergence"] for row in log_of(made) if "loss" in row]
    assert rows[-1] < rows[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS.names() if OPTIMIZERS.get(name).make is not None])
def test_optimizers_of_pairs_train_the_map_too(tmp_path: Path, name: str) -> None:
    model = student()
    alignment = Alignment(model, wider(), map="proj", map_weight=5.0)
    before = [p.detach().clone() for p in alignment.parameters()]
    entry = OPTIMIZERS.get(name)
    own = None if entry.settings is None else entry.settings()
    optimizer = entry.make(model, own, lr=entry.lr, weight_decay=0.0)  # type: ignore[misc]
    made = trainer(tmp_path, model, alignment, optimizers=(optimizer, None), args={"max_steps": 2})
    made.train()
    assert all(not torch.equal(p, old) for p, old in zip(alignment.parameters(), before, strict=True))


def test_an_optimizer_of_a_loop_that_lacks_the_map_is_told() -> None:
    model = student()
    alignment = Alignment(model, wider(), map="proj")
    trained = [p for p in model.parameters() if p.requires_grad]
    alignment.loss(model, probe()[0]).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(ConfigError, match=r"of the student's parameters and of alignment\.parameters"):
        alignment.after_step(model, torch.optim.AdamW(trained))
    alignment.after_step(model, torch.optim.AdamW([*trained, *alignment.parameters()]))


def test_a_checkpoint_of_other_maps_is_refused() -> None:
    model = student()
    state = Alignment(model, wider(), map="proj").state_dict()
    with pytest.raises(CheckpointError, match="has 2 linear maps between inner states, of other sizes or layers"):
        Alignment(model, wider(), map="proj", map_layers=(2,)).load_state_dict(state)


def test_a_checkpoint_without_a_teacher_is_not_continued_with_one(tmp_path: Path) -> None:
    trainer_for(tmp_path, student(), save_strategy="steps", save_steps=2, max_steps=2).train()
    model = student()
    with pytest.raises(CheckpointError, match=r"has no alignment\.pt: it was made without a teacher"):
        trainer(tmp_path, model, Alignment(model, "base")).train(resume_from_checkpoint=True)


def test_decisions_are_told_and_the_rate_is_warmed_again_after_a_switch(tmp_path: Path) -> None:
    model, told, rates = student(), list[Decision](), list[float]()
    alignment = Alignment(model, "snapshot", schedule=CYCLE, steps=STEPS, probe=probe())

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    made = trainer(tmp_path, model, alignment, on_decision=told.append)
    made.callback_handler.callbacks.insert(0, Watch())
    made.train()
    assert [(d.step, d.kind) for d in told if d.kind != "reweighted"] == [(2, "switch"), (4, "switch"), (6, "ended")]
    assert [round(rate / 1e-2, 3) for rate in rates] == [1.0, 1.0, 0.3, 0.65, 0.3, 0.65, 1.0, 1.0]


@pytest.mark.parametrize("kind", [AlignedTrainer, Plain])
@pytest.mark.parametrize("settings", [{"args": {"label_smoothing_factor": 0.1}}, {"compute_loss_func": print}])
def test_another_loss_is_refused(tmp_path: Path, kind: Any, settings: dict[str, Any]) -> None:
    model = student()
    with pytest.raises(ConfigError, match="define another loss"):
        trainer(tmp_path, model, Alignment(model, "base"), kind, **settings)


def test_what_is_no_alignment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"alignment is the lorafa\.alignment\.Alignment of the model, found str"):
        trainer(tmp_path, student(), "base")  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [STEPS - 1, STEPS + 1])
def test_a_schedule_of_another_training_is_refused(tmp_path: Path, steps: int) -> None:
    model = student()
    alignment = Alignment(model, "snapshot", schedule=CYCLE, steps=steps, probe=probe())
    with pytest.raises(ConfigError, match=rf"was told of steps={steps}, and the training has {STEPS}\. Make the Align"):
        trainer(tmp_path, model, alignment).train()


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"", "alignment.pt is damaged"), (b"PK\x03\x04 cut", "alignment.pt is damaged"), (None, "holds no state of an")],
)
def test_a_damaged_state_is_named(tmp_path: Path, content: bytes | None, text: str) -> None:
    model = student()
    one = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer(tmp_path, model, Alignment(model, "base"), args=one).train()
    path = tmp_path / "checkpoint-1" / "alignment.pt"
    (path.parent / "checkpoint.json").unlink()  # as of a version that wrote none
    if content is None:
        torch.save([1], path)
    else:
        path.write_bytes(content)
    model = student()
    with pytest.raises(CheckpointError, match=text):
        trainer(tmp_path, model, Alignment(model, "base")).train(resume_from_checkpoint=str(path.parent))
