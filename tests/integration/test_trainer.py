"""The trainer resumes bit for bit, saves adapters only, weighs every token alike and stops when nothing is learnt."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import datasets
import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

import lorafa
from lorafa.data.chat import Sample
from lorafa.data.collate import Collator
from lorafa.errors import CheckpointError, ConfigError, DivergedError, TrainingError
from lorafa.train.checkpoints import last_checkpoint
from toys.compare import assert_equal_bits, trained_values
from toys.data import VOCAB, samples
from toys.training import CONFIG, Do, Killed, adapted_model, kill_after, log_of, trainer_for

# ---- resume ----


@pytest.mark.parametrize("every", [2, 5], ids=["checkpoint in an epoch", "checkpoint at the end of an epoch"])
@pytest.mark.parametrize("order", ["random", "group_by_length"])
@pytest.mark.parametrize("library", [lorafa, peft], ids=["lorafa", "peft"])
def test_resumed_training_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, library: ModuleType, order: str, every: int
) -> None:
    """5 batches an epoch, 12 steps: the order of three epochs, dropout, the log and the optimizer must all continue."""
    args = {"train_sampling_strategy": order, "save_strategy": "steps", "save_steps": every, "max_steps": 12}
    args |= {"eval_strategy": "steps", "eval_steps": 4, "lr_scheduler_type": "cosine"}
    whole = trainer_for(tmp_path / "whole", adapted_model(0.3, library), **args)
    whole.train()

    killed = trainer_for(tmp_path / "cut", adapted_model(0.3, library), {"callbacks": [kill_after(9)]}, **args)
    with pytest.raises(Killed):
        killed.train()
    torch.manual_seed(123)  # another process starts with other random numbers
    resumed = trainer_for(tmp_path / "cut", adapted_model(0.3, library), **args)
    resumed.train(resume_from_checkpoint=True)

    assert resumed.state.global_step == whole.state.global_step == 12
    assert_equal_bits(trained_values(resumed.model), trained_values(whole.model))
    assert_equal_bits(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    assert log_of(resumed) == log_of(whole)


def test_resume_takes_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    trainer_for(tmp_path, save_strategy="steps", save_steps=2, max_steps=6).train()
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text('{"global_st')  # killed while saving
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    resumed = trainer_for(tmp_path, max_steps=8)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8


def test_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer_for(tmp_path, save_strategy="steps", save_steps=2, max_steps=4).train()
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-4" / "rng_state.pth").unlink()
    trainer = trainer_for(tmp_path)
    before = trained_values(trainer.model)
    with pytest.raises(
        CheckpointError, match=r"optimizer\.pt, rng_state\.pth missing or damaged.*beside it: .*checkpoint-2"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_equal_bits(trained_values(trainer.model), before)
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match="no complete checkpoint to resume from in"):
        trainer.train(resume_from_checkpoint=True)


WORKER = """
import sys
from pathlib import Path
import torch
from test_trainer import PARALLEL
from toys import training as t
from toys.compare import trained_values
from toys.processes import leave_group

folder, kill, batch = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
args = {"per_device_train_batch_size": batch, **PARALLEL}
trainer = t.trainer_for(folder, own={"callbacks": [t.kill_after(kill)]}, **args)
try:
    trainer.train()
except t.Killed:
    trainer = t.trainer_for(folder, **args)
    trainer.train(resume_from_checkpoint=True)
assert trainer.own_loss_reason is None
if trainer.is_world_process_zero():
    torch.save(trained_values(trainer.model), folder / "weights.pt")
if torch.distributed.is_initialized():
    leave_group()
"""
PARALLEL = {"gradient_accumulation_steps": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 4, "optim": "sgd"}
PARALLEL |= {"learning_rate": 0.5, "max_grad_norm": 0.0, "train_sampling_strategy": "group_by_length"}


@pytest.mark.slow
def test_two_processes_train_like_one_and_resume_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}

    def run(name: str, processes: int, kill: int, batch: int) -> dict[str, Tensor]:
        launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
        arguments = [str(tmp_path / "worker.py"), str(tmp_path / name), str(kill), str(batch)]
        subprocess.run([sys.executable, *launch, *arguments], env=environment, check=True)
        return torch.load(tmp_path / name / "weights.pt")

    whole = run("whole", processes=2, kill=99, batch=1)
    assert_equal_bits(run("cut", processes=2, kill=5, batch=1), whole)
    torch.testing.assert_close(run("one", processes=1, kill=99, batch=2), whole, rtol=1e-4, atol=1e-6)


# ---- checkpoints ----


def test_checkpoint_holds_the_adapter_and_what_resume_needs_and_nothing_of_the_base(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, save_strategy="steps", save_steps=8)
    trainer.train()
    files = {path.name for path in (tmp_path / "checkpoint-8").iterdir()} - {"README.md"}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert files == adapter | {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "checkpoint.json"}
    stored = load_file(tmp_path / "checkpoint-8" / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(t.numel() for t in trained_values(trainer.model).values())


def test_every_adapter_of_the_model_is_saved_and_resumed(tmp_path: Path) -> None:
    def two_adapters() -> nn.Module:
        model = adapted_model()
        model.add_adapter("second", lorafa.LoraConfig(r=3, target_modules=["o_proj"]))
        model.base_model.set_adapter(["default", "second"])
        return model

    trainer = trainer_for(tmp_path, two_adapters(), save_strategy="steps", save_steps=4, max_steps=4)
    trainer.train()
    resumed = trainer_for(tmp_path, two_adapters(), max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_bits(trained_values(resumed.model), trained_values(trainer.model))


def test_best_model_is_loaded_at_the_end_and_a_lower_loss_is_better(tmp_path: Path) -> None:
    args = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1.0}
    trainer = trainer_for(tmp_path, load_best_model_at_end=True, **args)
    trainer.train()
    losses = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert 1 <= best < 8, "the rate must be so high that the last step is not the best"
    assert trainer.state.best_global_step == best
    assert trainer.state.best_metric == losses[best]
    assert trainer.evaluate()["eval_loss"] == losses[best]


# ---- loss ----


def step_gradients(folder: Path, accumulation: int, chunked: bool) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    model = adapted_model()

    def keep(state: hf.TrainerState) -> None:
        found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    own = {"callbacks": [Do("on_pre_optimizer_step", keep)], "chunked_loss": chunked, "train_dataset": samples(4)}
    batch = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer_for(folder, model, own, max_steps=1, max_grad_norm=0.0, **batch).train()
    return found


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_gradient_does_not_depend_on_accumulation(tmp_path: Path, accumulation: int, chunked: bool) -> None:
    whole, parts = (step_gradients(tmp_path, n, chunked) for n in (1, accumulation))
    assert whole
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunked", [True, False])
def test_evaluation_loss_is_the_mean_over_tokens(tmp_path: Path, chunked: bool) -> None:
    trainer = trainer_for(tmp_path, own={"chunked_loss": chunked}, per_device_eval_batch_size=2)
    with torch.no_grad():
        rows = [
            (trainer.model(torch.tensor([row["input_ids"]])).logits[0, 1:-1], row["labels"][2:])
            for row in samples(5, 1)
        ]
        total = sum(nn.functional.cross_entropy(l, torch.tensor(t), reduction="sum") for l, t in rows)
    expected = float(total) / sum(len(t) for _, t in rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_chunked_loss_trains_like_the_own_loss(tmp_path: Path) -> None:
    chunked, own = (
        trainer_for(tmp_path, own={"chunked_loss": c}, gradient_accumulation_steps=2) for c in (True, False)
    )
    chunked.train()
    own.train()
    assert (chunked.own_loss_reason, own.own_loss_reason) == (None, "chunked_loss=False")
    torch.testing.assert_close(trained_values(chunked.model), trained_values(own.model), rtol=1e-3, atol=1e-4)


def test_metrics_that_need_logits_get_them(tmp_path: Path) -> None:
    shapes = []
    own = {"compute_metrics": lambda output: shapes.append(output.predictions.shape) or {"seen": 1.0}}
    metrics = trainer_for(tmp_path, own=own).evaluate()
    assert shapes == [(5, 11, VOCAB)]  # the longest of the five has 11 tokens
    assert metrics["eval_loss"] == pytest.approx(trainer_for(tmp_path).evaluate()["eval_loss"], rel=1e-5)


def test_mixed_precision_runs_through_the_chunked_loss(tmp_path: Path) -> None:
    half, full = (trainer_for(tmp_path, bf16=bf16, max_steps=2) for bf16 in (True, False))
    half.train()
    full.train()
    assert half.state.log_history[-1]["train_loss"] == pytest.approx(full.state.log_history[-1]["train_loss"], rel=1e-2)


@pytest.mark.slow
def test_compiled_training_compiles_the_loss_with_the_model(tmp_path: Path) -> None:
    compiled = trainer_for(tmp_path, torch_compile=True, torch_compile_backend="eager", max_steps=2)
    compiled.train()
    plain = trainer_for(tmp_path, max_steps=2)
    plain.train()
    torch.testing.assert_close(trained_values(compiled.model), trained_values(plain.model), rtol=1e-4, atol=1e-5)


def test_own_loss_is_announced_with_its_reason(tmp_path: Path) -> None:
    model = adapted_model(modules_to_save=["lm_head"])
    with pytest.warns(
        UserWarning, match="model's own loss, which holds all logits: the output head is not a plain nn.Linear"
    ):
        trainer = trainer_for(tmp_path, model, max_steps=1)
    trainer.train()
    with pytest.warns(UserWarning, match="label smoothing, compute_loss_func or use_liger_kernel define another loss"):
        trainer_for(tmp_path, label_smoothing_factor=0.1)


# ---- data ----


def test_columns_the_base_model_does_not_know_are_dropped(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{**row, "question": "?"} for row in samples()])
    trainer = trainer_for(tmp_path, own={"train_dataset": rows}, max_steps=1)
    assert set(next(iter(trainer.get_train_dataloader()))) == {"input_ids", "attention_mask", "labels"}
    trainer.train()


def test_encoded_samples_of_this_package_are_trained_on_grouped_by_length(tmp_path: Path) -> None:
    data = [Sample(**row) for row in samples()]
    encoded = {"train_dataset": data, "eval_dataset": data, "data_collator": Collator(pad_id=0)}
    trainer = trainer_for(tmp_path, own=encoded, train_sampling_strategy="group_by_length", max_steps=2)
    trainer.train()
    plain = trainer_for(
        tmp_path, own={"eval_dataset": samples()}, train_sampling_strategy="group_by_length", max_steps=2
    )
    plain.train()
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


# ---- what stops the training ----


def zero(model: nn.Module, *names: str) -> nn.Module:
    """Zero all A (B is zero already) of the layers whose path contains one of ``names``: their gradients vanish."""
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_A" in path and any(name in path for name in names):
                parameter.zero_()
    return model


def test_training_stops_if_no_weight_gets_a_gradient(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, zero(adapted_model(), ""))
    with pytest.raises(TrainingError, match=r"None of the 8 trainable weights got a gradient.*adapter is active") as e:
        trainer.train()
    assert not isinstance(e.value, DivergedError)


def test_training_stops_and_names_the_layers_that_get_no_gradient(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, zero(adapted_model(), "layers.1.self_attn.q_proj"))
    with pytest.raises(
        TrainingError, match=r"1 of 4 adapted layers got no gradient: model\.layers\.1\.self_attn\.q_proj\."
    ):
        trainer.train()
    model = zero(adapted_model(), "layers.1.self_attn.q_proj")
    trainer_for(tmp_path, model, own={"check_gradients": False}, max_steps=1).train()


class Experts(nn.Module):
    """y = down up x; ``idle`` is in no product."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.idle = (nn.Parameter(torch.eye(4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.up.T @ self.down.T


@pytest.mark.parametrize("library", [lorafa, peft], ids=["lorafa", "peft"])
def test_adapted_parameters_that_get_no_gradient_are_named(library: ModuleType) -> None:
    """Adapters on parameters of one module sit in each other; each answers for itself."""
    parameters = ["experts.up", "experts.idle", "experts.down"]
    config = library.LoraConfig(r=2, target_modules=["head"], target_parameters=parameters)
    model = nn.Sequential()
    model.experts, model.head = Experts(), nn.Linear(4, 3)
    adapted = library.get_peft_model(model, config)
    adapted(torch.ones(2, 4)).sum().backward()
    with pytest.raises(TrainingError, match=r"1 of 4 adapted layers got no gradient: experts\.idle\."):
        lorafa.check_gradients(adapted)


def spoil(model: nn.Module, step: int, event: str) -> Do:
    """Set a trainable weight of a value projection to nan (with a query of nan, attention on CPU returns zeros)."""

    def action(state: hf.TrainerState) -> None:
        if state.global_step == step:
            next(p for name, p in model.named_parameters() if p.requires_grad and "v_proj" in name).data.fill_(
                torch.nan
            )

    return Do(event, action)


def test_loss_that_is_not_finite_stops_before_the_step_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    model = adapted_model()
    args = {"save_strategy": "steps", "save_steps": 2}
    trainer = trainer_for(tmp_path, model, {"callbacks": [spoil(model, 4, "on_step_begin")]}, **args)
    with pytest.raises(
        DivergedError,
        match=r"The loss is nan in step 5 \(rows \d+, \d+ of the training rows\)\. Lower.*checkpoint: .*checkpoint-4",
    ):
        trainer.train()
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4
    assert not trainer.optimizer.state_dict()["state"][0]["exp_avg"].isnan().any()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = adapted_model()
    args = {"save_strategy": "steps", "save_steps": 2}
    trainer = trainer_for(tmp_path, model, {"callbacks": [spoil(model, 2, "on_step_end")]}, **args)
    with pytest.raises(
        DivergedError, match=r"After step 2 1 weights are not finite: .*lora_A.*checkpoint: none was written"
    ):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_model_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found a plain LlamaForCausalLM\. Wrap it first: model = get_peft_model"):
        trainer_for(tmp_path, hf.LlamaForCausalLM(CONFIG))
