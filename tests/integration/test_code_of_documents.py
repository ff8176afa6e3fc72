"""The scripts that the product's documents show, as they are written there, by `lorafa run`.

Each has the document's own calls with their values; filled in are a model that can be had, the missing import, and what
the trainer and the loop are given. What they say of themselves is asserted in them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from toys.places import ROOT

pytestmark = pytest.mark.slow

BASE = """
from toys.language_models import llama
llama(hidden_size=64, intermediate_size=96).save_pretrained("base")
"""
FAST_ADAPTATION = """
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from transformers import Trainer, get_cosine_schedule_with_warmup
from transformers import AutoModelForCausalLM, TrainingArguments

base_model = AutoModelForCausalLM.from_pretrained("base")
config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, bias="none")
model = get_peft_model(base_model, config)
optimizer = create_lorafa_optimizer(model=model, r=128, lora_alpha=32, lr=7e-5)
scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=100, num_training_steps=1000)
before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
trainer = Trainer(
    model=model, train_dataset=[{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 8,
    args=TrainingArguments("out", max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True),
    optimizers=(optimizer, scheduler),
)
trainer.train()
moved = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
assert moved == {name for name in before if "lora_B" in name}, moved
assert {group["lr"] for group in optimizer.param_groups} == {7e-5 * 3 / 100}
"""
LIBRARY = """
import torch
base_model = llama(hidden_size=64, intermediate_size=96)
dataloader = [{"input_ids": torch.tensor([[1, 2, 3, 4]]), "labels": torch.tensor([[1, 2, 3, 4]])}] * 3

from peft import get_peft_model, LoraConfig
from peft.optimizers import create_lorafa_optimizer

config = LoraConfig(r=64, lora_alpha=16)
model = get_peft_model(base_model, config)
assert {path.rpartition(".")[2] for path in model.base_model.targeted_module_names} == {"q_proj", "v_proj"}
optimizer = create_lorafa_optimizer(model, r=64, lora_alpha=16, lr=1e-4, weight_decay=0.01)
losses = []
for batch in dataloader:
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses

optimizer = create_lorafa_optimizer(model, r=64, lora_alpha=16, lr=1e-4, use_rslora=True)
model(**dataloader[0]).loss.backward()
optimizer.step()

num_accumulation = 2
for accumulation_step in range(num_accumulation):
    loss = model(**dataloader[0]).loss / num_accumulation
    loss.backward()
optimizer.step()
optimizer.zero_grad()
"""
ADAPTATION = """
model = llama(hidden_size=64, intermediate_size=96)

from peft import LoraConfig, get_peft_model

config = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, bias="none")
model = get_peft_model(model, config)
assert model.get_nb_trainable_parameters()[0] == sum(
    8 * sum(layer.weight.shape) for path, layer in model.named_modules() if path.endswith("_proj.base_layer"))
"""
ONE_RANK = "r=128 was given, but the adapters have r=16. The optimizer reads it from each layer"
ONE_SCALING = "use_rslora=True was given"


@pytest.mark.parametrize(
    ("script", "warned"),
    [
        pytest.param(FAST_ADAPTATION, [ONE_RANK], id="000: LoRA-FA with a trainer"),
        pytest.param(LIBRARY, [ONE_SCALING], id="001: the optimizer in a loop"),
        pytest.param(ADAPTATION, [], id="002: LoRA"),
    ],
)
def test_a_script_of_the_documents_runs_by_pefts_name(script: str, warned: list[str], tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(BASE + script, encoding="utf-8")
    paths = [str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lorafa", "run", path.name],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py:") and "UserWarning" in line]
    assert len(said) == len(warned), said
    for line, expected in zip(said, warned, strict=True):
        assert expected in line
        assert "LORAFA_STRICT=1 makes it an error" in line
