"""transformers with lorafa by PEFT's name: its own adapter API, and its Trainer, both unmodified."""

from __future__ import annotations

from typing import Any

import pytest

from toys.by_name import found_by_name

pytestmark = pytest.mark.slow

API = """
import json, sys, warnings
from pathlib import Path
import torch, transformers
from safetensors.torch import save_file
from peft import LoraConfig, PeftModel, get_peft_model
from toys.language_models import IDS, llama, logits, mixtral, qwen2_moe

transformers.utils.logging.disable_progress_bar()
here, found = Path(sys.argv[1]), {}

def config(**settings):
    given = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    return LoraConfig(**given, **settings)

def same(one, other):
    return bool(torch.allclose(one, other, rtol=1e-5, atol=1e-6))

def fresh():
    torch.manual_seed(0)
    return llama().eval()

# one adapter, two, none, and back
model = fresh()
plain = logits(model)
model.add_adapter(config(), "a")
a = logits(model)
model.add_adapter(config(trainable_token_indices=[1, 2], modules_to_save=["lm_head"]), "b")
with torch.no_grad():
    model.get_input_embeddings().token_adapter.trainable_tokens_delta["b"].add_(1)
    model.get_output_embeddings().modules_to_save["b"].weight.add_(0.1)
b = logits(model)
found["differ"] = not (same(a, plain) or same(b, plain) or same(a, b))
found["last added counts"] = model.active_adapters() == ["b"]
model.set_adapter("a")
found["one"] = same(logits(model), a)
model.set_adapter("b")
found["other"] = same(logits(model), b)
rows = model.get_input_embeddings()
model.disable_adapters()
found["none"] = same(logits(model), plain)
model.enable_adapters()
found["rows on again"] = not rows.disable_adapters
model.set_adapter(["a", "b"])
found["both"] = model.active_adapters() == ["a", "b"] and rows.active_adapters == ["a", "b"]
model.get_output_embeddings().enable_adapters(True)  # transformers switches copies of modules off, and never on
model.set_adapter("b")
held = model.get_adapter_state_dict("b")
found["state dict"] = any("trainable_tokens_delta" in key for key in held) and "lm_head.weight" in held
model.save_pretrained(here / "b")
names = {path.name for path in (here / "b").iterdir()}
found["files"] = "adapter_model.safetensors" in names and not any(name.startswith("model") for name in names)
model.delete_adapter("b")
found["deleted"] = list(model.peft_config) == ["a"] and same(logits(model), a)
again = fresh()
again.load_adapter(here / "b", "x")
found["loaded"] = same(logits(again), b)
found["frozen"] = not any(p.requires_grad for n, p in again.named_parameters() if "lora_" in n)
again.delete_adapter("x")
found["empty again"] = same(logits(again), plain) and not hasattr(again, "peft_config")

# files of a PeftModel
model.delete_adapter("a")
fresh().save_pretrained(here / "base")
load = lambda: transformers.AutoModelForCausalLM.from_pretrained(here / "base").eval()
outputs = []
for number, settings in enumerate(({"use_dora": True}, {}, {})):
    torch.manual_seed(number)
    made = get_peft_model(load(), config(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.5)
    outputs.append(logits(made))
    made.save_pretrained(here / str(number))
auto = transformers.AutoModelForCausalLM.from_pretrained(here / "0")
found["auto"] = same(logits(auto.eval()), outputs[0])
model = load()
said = model.load_adapter(here / "0")
found["dora"] = same(logits(model), outputs[0]) and not said.missing_keys and not said.unexpected_keys
model = load()
model.load_adapter(here / "1", "default")
first = same(logits(model), outputs[1])
model.load_adapter(here / "2", "default", hotswap=True)
found["swapped"] = first and same(logits(model), outputs[2])

# experts of transformers 4
for make, names, block in (
    (mixtral, ("w1", "w3", "w2"), "block_sparse_moe"), (qwen2_moe, ("gate_proj", "up_proj", "down_proj"), "mlp"),
):
    torch.manual_seed(0)
    model = make().eval()
    of = model.config
    inner = getattr(of, "moe_intermediate_size", None) or of.intermediate_size
    generator, tensors = torch.Generator().manual_seed(1), {}
    owners = [(f"experts.{number}", inner) for number in range(3)]
    if make is qwen2_moe:
        owners.append(("shared_expert", of.shared_expert_intermediate_size))
    for layer in range(of.num_hidden_layers):
        for owner, size in owners:
            for name in names:
                into, out = (size, of.hidden_size) if name == names[2] else (of.hidden_size, size)
                key = f"base_model.model.model.layers.{layer}.{block}.{owner}.{name}"
                tensors[key + ".lora_A.weight"] = torch.randn(2, into, generator=generator)
                tensors[key + ".lora_B.weight"] = torch.randn(out, 2, generator=generator)
    folder = here / make.__name__
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": list(names)}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    torch.manual_seed(0)
    expected = logits(PeftModel.from_pretrained(make().eval(), folder))  # held against PEFT in tests/parity
    before = logits(model)
    model.load_adapter(folder)
    found[make.__name__] = same(logits(model), expected) and not same(before, expected)
say(found)
"""

TRAINER = """
import sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file
from torch.utils.data import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from toys.language_models import llama

transformers.utils.logging.disable_progress_bar()
here, found = Path(sys.argv[1]), {}

class Rows(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, at):
        ids = torch.randint(0, 9, (6,), generator=torch.Generator().manual_seed(at))
        return {"input_ids": ids, "labels": ids.clone()}

def model():
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    return get_peft_model(llama(), config)

def trainer(of, folder, **settings):
    arguments = transformers.TrainingArguments(
        output_dir=str(here / folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, use_cpu=True,
        report_to=[], disable_tqdm=True, learning_rate=0.05, seed=3, logging_steps=1, **settings)
    return transformers.Trainer(of, arguments, train_dataset=Rows(), eval_dataset=Rows())

whole = model()
trainer(whole, "whole").train()
checkpoint = here / "whole" / "checkpoint-2"
names = {path.name for path in checkpoint.iterdir()}
found["adapter alone"] = "adapter_model.safetensors" in names and not names & {"model.safetensors", "pytorch_model.bin"}
resumed = model()
trainer(resumed, "resumed").train(resume_from_checkpoint=str(checkpoint))
ends = [get_peft_model_state_dict(one) for one in (whole, resumed)]
found["resumed"] = ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
best = model()
runner = trainer(best, "best", eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
                 metric_for_best_model="loss", greater_is_better=True, save_total_limit=2)
runner.train()
path = Path(runner.state.best_model_checkpoint)
stored, live = load_file(path / "adapter_model.safetensors"), get_peft_model_state_dict(best)
found["best is the first"] = path.name == "checkpoint-2"
found["best"] = stored.keys() == live.keys() and all(torch.equal(stored[k], live[k]) for k in stored)
found["is a PeftModel"] = isinstance(best, PeftModel)
say(found)
"""


@pytest.mark.parametrize("script", [API, TRAINER], ids=["adapter API", "Trainer"])
def test_transformers_works_with_lorafa_by_pefts_name(script: str, tmp_path: Any) -> None:
    found = found_by_name(script, str(tmp_path))
    assert [claim for claim, holds in found.items() if not holds] == []
