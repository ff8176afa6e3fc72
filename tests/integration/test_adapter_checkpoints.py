"""Any trainer of transformers with AdapterCheckpoints in front saves adapters alone, resumes bit for bit, reloads."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

import lorafa
from lorafa.errors import CheckpointError, ConfigError
from lorafa.train.adapter_checkpoints import AdapterCheckpoints
from toys.compare import assert_equal_bits, trained_values
from toys.data import collate, samples
from toys.training import CONFIG, Killed, adapted_model, kill_after

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "checkpoint.json"}


class AdapterTrainer(AdapterCheckpoints, hf.Trainer):  # type: ignore[misc]
    """The trainer of transformers, with this and nothing else."""


def trainer_for(folder: Path, model: Any, callbacks: list[Any] | None = None, **args: Any) -> AdapterTrainer:
    settings = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_steps": 8, "save_steps": 3} | args
    arguments = hf.TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, seed=5, **settings)
    data = {"train_dataset": samples(), "eval_dataset": samples(5, seed=1), "data_collator": collate}
    return AdapterTrainer(model, arguments, callbacks=callbacks, **data)


def several() -> nn.Module:
    """Two adapters that train together, one of them with a head of its own, and a third that rests."""
    model = adapted_model(0.3, modules_to_save=["lm_head"])
    model.add_adapter("second", lorafa.LoraConfig(r=3, target_modules=["o_proj"]))
    model.add_adapter("rests", lorafa.LoraConfig(r=1, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return model


MODELS = {
    "one adapter": lambda: adapted_model(0.3),
    "modules_to_save": lambda: adapted_model(0.3, modules_to_save=["lm_head"]),
    "trainable tokens": lambda: adapted_model(0.3, trainable_token_indices=samples()[0]["input_ids"][:2]),
    "dora": lambda: adapted_model(0.3, use_dora=True),
    "pissa": lambda: adapted_model(0.3, init_lora_weights="pissa"),
    "several adapters": several,
    "tied embeddings": lambda: adapted_model(0.3, base={"tie_word_embeddings": True}),
    "peft": lambda: adapted_model(0.3, peft),
}


@pytest.mark.parametrize("case", MODELS)
def test_resumed_training_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, case: str) -> None:
    whole = trainer_for(tmp_path / "whole", MODELS[case]())
    start = trained_values(whole.model)
    whole.train()
    assert not any(torch.equal(value, start[name]) for name, value in trained_values(whole.model).items())

    killed = trainer_for(tmp_path / "cut", MODELS[case](), [kill_after(5)])
    with pytest.raises(Killed):
        killed.train()
    torch.manual_seed(123)  # another process starts with other random numbers
    resumed = trainer_for(tmp_path / "cut", MODELS[case]())
    resumed.train(resume_from_checkpoint=True)

    assert_equal_bits(trained_values(resumed.model), trained_values(whole.model))
    assert_equal_bits(resumed.optimizer.state_dict(), whole.optimizer.state_dict())


@pytest.mark.parametrize("library", [lorafa, peft], ids=["lorafa", "peft"])
def test_checkpoint_is_an_adapter_that_both_libraries_load(tmp_path: Path, library: ModuleType) -> None:
    trainer = trainer_for(tmp_path, adapted_model(modules_to_save=["lm_head"]), save_steps=8)
    trainer.train()
    folder = tmp_path / "checkpoint-8"
    assert {path.name for path in folder.iterdir()} == ADAPTER | STATE | {"README.md"}
    stored = load_file(folder / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(t.numel() for t in trained_values(trainer.model).values())

    loaded = library.PeftModel.from_pretrained(adapted_model().unload(), folder)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-5, atol=1e-6)


def test_every_adapter_has_its_folder_in_a_checkpoint(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, several(), save_steps=8)
    trainer.train()
    folder = tmp_path / "checkpoint-8"
    assert {p.name for p in folder.iterdir() if (p / "adapter_config.json").is_file()} == {"second", "rests"}
    loaded = lorafa.PeftModel.from_pretrained(adapted_model().unload(), folder)
    for name in ("second", "rests"):
        loaded.load_adapter(folder / name, name)
    loaded.base_model.set_adapter(["default", "second"])
    assert_equal_bits(trained_values(loaded), trained_values(trainer.model))


@pytest.mark.parametrize("case", MODELS)
def test_best_model_is_loaded_at_the_end(tmp_path: Path, case: str) -> None:
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 4.0}
    trainer = trainer_for(tmp_path, MODELS[case](), load_best_model_at_end=True, **every)
    trainable = set(trained_values(trainer.model))
    trainer.train()
    losses = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert 1 <= best < 8, "the rate must be so high that the last step is not the best"
    assert trainer.evaluate()["eval_loss"] == losses[best]
    assert set(trained_values(trainer.model)) == trainable


def test_the_adapted_model_is_what_trains_and_the_model_inside_what_transformers_looks_at(tmp_path: Path) -> None:
    model = adapted_model()
    trainer = trainer_for(tmp_path, model)
    assert trainer.model is trainer.model_wrapped is model
    plain = hf.Trainer(hf.LlamaForCausalLM(CONFIG), trainer.args)
    for answer in ("label_names", "can_return_loss", "model_accepts_loss_kwargs", "_loss_shifts_labels"):
        assert getattr(trainer, answer) == getattr(plain, answer), answer


def test_gradient_checkpointing_of_the_old_kind_reaches_the_adapters(tmp_path: Path) -> None:
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    stored, kept = (trainer_for(tmp_path, adapted_model(), save_strategy="no", **o) for o in ({}, reentrant))
    stored.train()
    kept.train()
    torch.testing.assert_close(trained_values(kept.model), trained_values(stored.model), rtol=1e-4, atol=1e-6)


def test_models_made_by_the_trainer_are_trained_and_saved(tmp_path: Path) -> None:
    arguments = hf.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=2, disable_tqdm=True)
    data = {"train_dataset": samples(), "data_collator": collate}
    trainer = AdapterTrainer(args=arguments, model_init=lambda: adapted_model(), **data)
    trainer.train()
    trainer.save_model(str(tmp_path / "end"))
    assert {path.name for path in (tmp_path / "end").iterdir()} >= ADAPTER


def test_tokenizer_is_saved_with_the_adapter(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")

    class Collator:
        tokenizer = Tokenizer()

    for name, given in {
        "given": {"processing_class": Tokenizer()},
        "collator's": {"data_collator": Collator()},
    }.items():
        arguments = hf.TrainingArguments(str(tmp_path / name), use_cpu=True, report_to="none")
        AdapterTrainer(adapted_model(), arguments, **given).save_model()
        assert (tmp_path / name / "tokenizer.json").is_file()


def test_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer_for(tmp_path, adapted_model(), save_steps=4).train()
    (tmp_path / "checkpoint-8" / "scheduler.pt").unlink()
    trainer = trainer_for(tmp_path, adapted_model())
    with pytest.raises(CheckpointError, match=r"scheduler\.pt missing or damaged.*beside it: .*checkpoint-4"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    with pytest.raises(CheckpointError, match="no complete checkpoint to resume from in"):
        trainer_for(tmp_path / "empty", adapted_model()).train(resume_from_checkpoint=True)


def test_model_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="AdapterTrainer trains adapters, found a plain LlamaForCausalLM"):
        trainer_for(tmp_path, hf.LlamaForCausalLM(CONFIG))


def test_trainer_named_before_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Late names its trainer before.*class Late\(AdapterCheckpoints, \.\.\.\)"):
        type("Late", (hf.Trainer, AdapterCheckpoints), {})
