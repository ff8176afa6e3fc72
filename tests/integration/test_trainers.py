"""Trainers of other libraries, unmodified, with an adapted model; and TRL's with AdapterCheckpoints in front of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lorafa import PeftModel
from lorafa.train.adapter_checkpoints import AdapterCheckpoints
from toys.compare import assert_equal_bits, trained_values
from toys.data import Counting
from toys.language_models import IDS, adapted, inference, llama

transformers = pytest.importorskip("transformers")


SETTINGS = {
    "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 2, "report_to": [],
    "use_cpu": True, "disable_tqdm": True, "seed": 3,
}  # fmt: skip


def trainer(model: nn.Module, folder: Path, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(str(folder), **(SETTINGS | options))
    return transformers.Trainer(model, arguments, train_dataset=Counting(), eval_dataset=Counting())


# ---- transformers.Trainer as it is: checkpoints of the whole state, an adapter where save_pretrained is called


def dropped_out() -> PeftModel:
    return adapted(lora_dropout=0.3, modules_to_save=["lm_head"])


def test_the_trainer_of_transformers_resumes_bit_for_bit_from_the_whole_state(tmp_path: Path) -> None:
    whole = trainer(dropped_out(), tmp_path)
    whole.train()
    state = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert state.keys() == whole.model.state_dict().keys(), "the base is in the checkpoint too"
    torch.manual_seed(123)  # another process starts with other random numbers
    resumed = trainer(dropped_out(), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_equal_bits(trained_values(resumed.model), trained_values(whole.model))


def test_the_trainer_of_transformers_loads_the_best_model_and_its_adapter_is_saved(tmp_path: Path) -> None:
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 1.0}
    run = trainer(dropped_out(), tmp_path, load_best_model_at_end=True, **every)
    run.train()
    losses = {line["step"]: line["eval_loss"] for line in run.state.log_history if "eval_loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert best < 6, "the rate must be so high that the last step is not the best"
    assert run.evaluate()["eval_loss"] == losses[best]
    run.model.save_pretrained(tmp_path / "adapter")
    assert_equal_bits(inference(PeftModel.from_pretrained(llama(), tmp_path / "adapter")), inference(run.model))


def test_the_trainer_of_transformers_cannot_save_the_whole_state_of_tied_weights(tmp_path: Path) -> None:
    """What docs/peft.md says; AdapterCheckpoints has no whole state to save."""
    run = trainer(adapted(llama(tie_word_embeddings=True)), tmp_path)
    with pytest.raises(RuntimeError, match="share memory"):
        run.train()


# ---- TRL


def sft(trl: Any, model: Any, folder: Path, **options: Any) -> Any:
    datasets = pytest.importorskip("datasets")
    rows = [
        {"input_ids": row["input_ids"].tolist(), "completion_mask": [0, 0, 1, 1, 1, 1, 1, 1]}
        for row in (Counting()[index] for index in range(16))
    ]
    data = datasets.Dataset.from_list(rows)
    arguments = trl.SFTConfig(str(folder), **(SETTINGS | {"max_length": None, "bf16": False} | options))

    class AdapterSFT(AdapterCheckpoints, trl.SFTTrainer):  # type: ignore[misc, name-defined]
        pass

    return AdapterSFT(model, arguments, train_dataset=data, eval_dataset=data, processing_class=numbers_tokenizer())


def numbers_tokenizer() -> Any:
    """Numbers separated by blanks."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({str(i): i for i in range(31)} | {"?": 31}, unk_token="?")
    fast = tokenizers.Tokenizer(words)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="0", eos_token="1")


@pytest.mark.parametrize(
    "make", [lambda: adapted(lora_dropout=0.3), dropped_out], ids=["layers", "modules_to_save of the head"]
)
def test_sft_trainer_saves_resumes_and_reloads_adapters(tmp_path: Path, make: Callable[[], PeftModel]) -> None:
    trl = pytest.importorskip("trl")
    whole = sft(trl, make(), tmp_path)
    before = trained_values(whole.model)
    whole.train()
    assert not any(torch.equal(value, before[name]) for name, value in trained_values(whole.model).items())
    names = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-6")
    torch.testing.assert_close(inference(loaded), inference(whole.model), rtol=1e-5, atol=1e-6)

    resumed = sft(trl, make(), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_equal_bits(trained_values(resumed.model), trained_values(whole.model))

    every = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "greater_is_better": True}  # so not the last
    best = sft(trl, make(), tmp_path / "best", load_best_model_at_end=True, **every)
    best.train()
    losses = [line["eval_loss"] for line in best.state.log_history if "eval_loss" in line]
    assert best.evaluate()["eval_loss"] == max(losses) > losses[-1]
    assert best.model.generate(IDS[:1], max_new_tokens=2, do_sample=False).shape == (1, 8)
