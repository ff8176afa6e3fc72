"""Adapted models in transformers and accelerate, unmodified: generation, pipelines, checkpointing, trainers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from toys.adapters import train
from toys.data import Counting
from toys.language_models import IDS, adapted, inference, llama, loss_and_gradients, t5

transformers = pytest.importorskip("transformers")


# ---- generation


@pytest.mark.parametrize("base", [llama, t5])
def test_generation_is_that_of_the_merged_model(base: Callable[[], nn.Module]) -> None:
    model = adapted(base(), target_modules=None).eval()
    options = {"max_new_tokens": 5, "do_sample": False}
    by_adapter = model.generate(IDS, **options)
    with model.disable_adapter():
        plain = model.generate(input_ids=IDS, **options)
    assert torch.equal(plain, base().eval().generate(IDS, **options))
    assert torch.equal(by_adapter, model.merge_and_unload().generate(IDS, **options))


def test_generation_with_a_cache_and_beams_and_on_the_inner_model() -> None:
    model = adapted().eval()
    for options in ({"num_beams": 2}, {"use_cache": False}):
        outputs = [
            m.generate(IDS, max_new_tokens=4, do_sample=False, **options) for m in (model, model.get_base_model())
        ]
        assert torch.equal(outputs[0], outputs[1])


class Tokenizer:
    """Numbers separated by blanks."""

    def __new__(cls, folder: Path) -> Any:
        from tokenizers import Tokenizer as Fast
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import Whitespace

        fast = Fast(WordLevel({str(i): i for i in range(31)} | {"?": 31}, unk_token="?"))
        fast.pre_tokenizer = Whitespace()
        return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="0", eos_token="1")


def test_a_pipeline_runs_an_adapted_model(tmp_path: Path) -> None:
    model = adapted().eval()
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=Tokenizer(tmp_path), device="cpu")
    text = pipeline("4 5 6", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    expected = model.generate(torch.tensor([[4, 5, 6]]), max_new_tokens=4, do_sample=False)[0]
    assert text.replace(" ", "") == "".join(str(int(token)) for token in expected)


# ---- gradient checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("when", ["before", "after", "inside"])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool, when: str) -> None:
    kind = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    base = llama()
    if when == "before":
        base.gradient_checkpointing_enable(**kind)
    model = adapted(base).train()
    if when == "after":
        model.gradient_checkpointing_enable(**kind)
    if when == "inside":
        model.get_base_model().gradient_checkpointing_enable(**kind)
        model.enable_input_require_grads()
    source = adapted(llama())
    model.load_state_dict(source.state_dict())
    wanted = loss_and_gradients(source.train())
    found = loss_and_gradients(model)
    assert found.keys() == wanted.keys()
    assert model.get_base_model().model.gradient_checkpointing
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.skipif(
    not hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable"), reason="a name of newer transformers"
)
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_by_its_newer_name_changes_no_gradient(reentrant: bool) -> None:
    model, source = adapted().train(), adapted().train()
    model.load_state_dict(source.state_dict())
    wanted = loss_and_gradients(source)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    found = loss_and_gradients(model)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_a_saved_adapter_is_trained_on_with_checkpointing(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).train()
    base = llama()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    wanted, found = loss_and_gradients(plain), loss_and_gradients(model)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_gradient_checkpointing_can_be_turned_off_again() -> None:
    model = adapted().train()
    wanted = loss_and_gradients(model)
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    for name, value in loss_and_gradients(model).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-7, msg=name)


# ---- copies and number formats


def test_a_deep_copy_of_an_adapted_transformer_is_independent() -> None:
    model = adapted(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    twin = copy.deepcopy(model)
    before = inference(model)
    assert torch.equal(inference(twin), before)
    train(twin)
    assert torch.equal(inference(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_trains_float32_adapters(dtype: torch.dtype) -> None:
    model = adapted(llama().to(dtype)).train()
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(input_ids=IDS).logits.dtype == dtype
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = loss_and_gradients(model)["loss"]
    for _ in range(8):
        last = loss_and_gradients(model)["loss"]
        optimizer.step()
    assert last < first
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value)


# ---- accelerate and the Trainer


def test_accelerate_prepares_an_adapted_model() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = adapted().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader(Counting(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(3):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert isinstance(accelerator.unwrap_model(model), PeftModel)


def trainer(model: nn.Module, folder: Path, **options: Any) -> Any:
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 2, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **(settings | options))
    return transformers.Trainer(model, arguments, train_dataset=Counting(), eval_dataset=Counting())


def test_the_trainer_of_transformers_trains_the_adapter_alone(tmp_path: Path) -> None:
    model = adapted()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    moved = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    run = trainer(model, tmp_path)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    assert not any(torch.equal(model.get_parameter(name), value) for name, value in moved.items())


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
    ],
)
def test_the_trainer_of_transformers_trains_in_its_usual_modes(tmp_path: Path, options: dict[str, Any]) -> None:
    run = trainer(adapted(), tmp_path, save_strategy="no", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_what_the_trainer_of_transformers_saves_can_be_loaded(tmp_path: Path) -> None:
    """It knows PEFT's classes only, so of ours it saves the whole state dict; LoraTrainer saves the adapter alone."""
    model = adapted()
    trainer(model, tmp_path).train()
    checkpoint = tmp_path / "checkpoint-4"
    names = {path.name for path in checkpoint.iterdir()}
    fresh = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear"))
    if "adapter_model.safetensors" in names:
        fresh = PeftModel.from_pretrained(llama(), checkpoint)
    else:
        from safetensors.torch import load_file

        assert "model.safetensors" in names
        fresh.load_state_dict(load_file(checkpoint / "model.safetensors"))
    assert torch.equal(inference(fresh), inference(model))


def test_the_trainer_of_transformers_resumes(tmp_path: Path) -> None:
    whole = adapted()
    trainer(whole, tmp_path / "whole").train()
    halves = adapted()
    trainer(halves, tmp_path / "halves", max_steps=2).train()
    continued = adapted()
    trainer(continued, tmp_path / "halves", lr_scheduler_type="constant").train(
        resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-2")
    )
    assert continued.get_nb_trainable_parameters() == whole.get_nb_trainable_parameters()
    assert not torch.equal(inference(continued), inference(halves))


def test_the_trainer_of_transformers_evaluates_and_keeps_the_best_model(tmp_path: Path) -> None:
    run = trainer(
        adapted(), tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, save_total_limit=1
    )
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert run.state.best_metric == min(losses)
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-5)
