"""Programs that import `peft`, unmodified, with lorafa's objects: TRL, diffusers, sentence-transformers, lm-eval."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from toys.by_name import found_by_name

pytestmark = pytest.mark.slow

TRL = """
import math, sys
from pathlib import Path
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from toys.language_models import byte_tokenizer, tiny_llama
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

here, found = Path(sys.argv[1]), {}
tokenizer = byte_tokenizer()
common = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "max_steps": 2,
          "per_device_train_batch_size": 2, "learning_rate": 0.01, "bf16": False}
pairs = Dataset.from_list([{"prompt": "1+1?", "chosen": " 2 and more", "rejected": " 3"}] * 4)
targets = {"r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}

def trained_before():  # an adapter that is no identity
    torch.manual_seed(1)
    return get_peft_model(tiny_llama(), LoraConfig(init_lora_weights=False, **targets))

def run(name, trainer):
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if n in before and not torch.equal(before[n], p)}
    found[f"{name} trains the adapter alone"] = bool(moved) and all(".default." in n for n in moved)
    found[f"{name} has a PeftModel"] = isinstance(trainer.model, PeftModel)
    return [entry for entry in trainer.state.log_history if "loss" in entry]

texts = Dataset.from_list([{"prompt": "1+1?", "completion": " 2"}] * 4)
sft = SFTTrainer(
    tiny_llama(), SFTConfig(output_dir=str(here / "sft"), save_steps=1, **common), train_dataset=texts,
    processing_class=tokenizer, peft_config=LoraConfig(**targets),
)
run("SFT", sft)
names = {path.name for path in (here / "sft" / "checkpoint-2").iterdir()}
found["SFT saves the adapter alone"] = "adapter_model.safetensors" in names and "model.safetensors" not in names
again = PeftModel.from_pretrained(tiny_llama(), here / "sft" / "checkpoint-2")
ids = torch.tensor([[5, 6, 7]])
one, other = sft.model.eval()(ids).logits, again(ids).logits
found["SFT's checkpoint is its model"] = bool(torch.allclose(one, other, atol=1e-5))

for precompute in (False, True):
    dpo = DPOTrainer(
        trained_before(), args=DPOConfig(output_dir=str(here / "dpo"), save_strategy="no", beta=2.0,
        precompute_ref_log_probs=precompute, **common), train_dataset=pairs, processing_class=tokenizer,
    )
    found[f"DPO, precomputed={precompute}: the reference is what training began from"] = (
        abs(run(f"DPO, precomputed={precompute}", dpo)[0]["loss"] - math.log(2)) < 1e-3)

grpo = GRPOTrainer(
    trained_before(), reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
    args=GRPOConfig(output_dir=str(here / "grpo"), save_strategy="no", beta=0.5, num_generations=2,
                    max_completion_length=6, temperature=1.0, **common),
    train_dataset=Dataset.from_list([{"prompt": "1+1?"}] * 4), processing_class=tokenizer,
)
first = run("GRPO", grpo)[0]
found["GRPO: the reference is what training began from"] = abs(first["kl"]) < 1e-4
say(found)
"""

DIFFUSERS = """
import copy, sys
from pathlib import Path
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel

here, found = Path(sys.argv[1]), {}
torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=16, attention_head_dim=4)
text = CLIPTextModel(CLIPTextConfig(
    vocab_size=50, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=10, bos_token_id=1, eos_token_id=2))
vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
x, states = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
ids = torch.tensor([[3, 4, 2]])

@torch.no_grad()
def run(of_unet, of_text):
    inner = of_unet.eval()(x, torch.tensor(3), states).sample
    return torch.cat([inner.flatten(), of_text.eval()(ids).last_hidden_state.flatten()])

def same(one, other):
    return bool(torch.allclose(one, other, rtol=1e-4, atol=1e-5))

plain = run(unet, text)
other_unet, other_text = copy.deepcopy(unet), copy.deepcopy(text)
other_unet.add_adapter(LoraConfig(
    r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
other_text.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
y = run(other_unet, other_text)
StableDiffusionPipeline.save_lora_weights(
    here / "style", unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(other_unet)),
    text_encoder_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(other_text)))
pipe = StableDiffusionPipeline(
    vae=vae, text_encoder=text, tokenizer=None, unet=unet, scheduler=DDIMScheduler(), safety_checker=None,
    feature_extractor=None, requires_safety_checker=False)
now = lambda: run(pipe.unet, pipe.text_encoder)
pipe.load_lora_weights(here / "style", adapter_name="style")
found["loaded"] = same(now(), y) and not same(y, plain)
found["active"] = pipe.get_active_adapters() == ["style"]
found["listed"] = sorted(pipe.get_list_adapters()) == ["text_encoder", "unet"]
pipe.set_adapters("style", 0.0)
found["weighed down to nothing"] = same(now(), plain)
pipe.load_lora_weights(here / "style", adapter_name="twin")
pipe.set_adapters(["style", "twin"], [0.25, 0.75])
found["two halves"] = same(now(), y)
pipe.disable_lora()
found["off"] = same(now(), plain)
pipe.enable_lora()
pipe.delete_adapters("twin")
pipe.set_adapters("style")
found["one left"] = same(now(), y)
found["scaled in the call"] = bool(torch.allclose(
    pipe.unet(x, torch.tensor(3), states, cross_attention_kwargs={"scale": 0.0}).sample.flatten(),
    plain[: x.numel()], atol=1e-5))
pipe.fuse_lora()
found["fused"] = same(now(), y)
pipe.unfuse_lora()
found["unfused"] = same(now(), y)
pipe.unload_lora_weights()
found["unloaded"] = same(now(), plain)

# one adapter in the place of another, of another rank
swapped = []
for rank in (4, 2):
    other = copy.deepcopy(unet)
    other.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q"], init_lora_weights=False))
    swapped.append(run(other, text))
    other.save_lora_adapter(here / str(rank))
other = copy.deepcopy(unet)
other.enable_lora_hotswap(target_rank=8)
given = {"adapter_name": "one", "prefix": None, "use_safetensors": True}
other.load_lora_adapter(here / "4", **given)
found["before the swap"] = same(run(other, text), swapped[0])
other.load_lora_adapter(here / "2", hotswap=True, **given)
found["after the swap"] = same(run(other, text), swapped[1]) and not same(*swapped)
say(found)
"""

SENTENCES = """
import sys
from pathlib import Path
import numpy, torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, models
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

here, found = Path(sys.argv[1]), {}
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c"]
raw = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")
torch.manual_seed(0)
BertModel(BertConfig(vocab_size=7, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                     num_attention_heads=2)).save_pretrained(here / "bert")
tokenizer.save_pretrained(here / "bert")
model = SentenceTransformer(modules=[models.Transformer(str(here / "bert")), models.Pooling(16)], device="cpu")
plain = model.encode(["a b", "c"])
model.add_adapter(LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False))
changed = model.encode(["a b", "c"])
found["counts"] = not numpy.allclose(plain, changed) and model.active_adapters() == ["default"]
model.save_pretrained(str(here / "saved"))
names = {path.name for path in (here / "saved").rglob("*")}
found["saves the adapter alone"] = "adapter_model.safetensors" in names and "model.safetensors" not in names
again = SentenceTransformer(str(here / "saved"), device="cpu")
found["reads it"] = bool(numpy.allclose(again.encode(["a b", "c"]), changed, atol=1e-5))
say(found)
"""

HARNESS = """
import sys
from pathlib import Path
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from toys.language_models import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM

here, found = Path(sys.argv[1]), {}
tiny_llama().save_pretrained(here / "base")
byte_tokenizer().save_pretrained(here / "base")
model = get_peft_model(
    AutoModelForCausalLM.from_pretrained(here / "base"),
    LoraConfig(r=2, lora_alpha=40, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")).eval()
model.save_pretrained(here / "adapter")
said = []
for settings in ({}, {"peft": str(here / "adapter")}):
    harness = HFLM(pretrained=str(here / "base"), device="cpu", batch_size=1, **settings)
    said.append(harness.loglikelihood([Instance("loglikelihood", {}, ("ab", " cd"), 0)])[0][0])
ids = harness.tokenizer("ab cd", return_tensors="pt").input_ids
start = len(harness.tokenizer("ab").input_ids)
with torch.no_grad():
    logs = model(ids).logits.log_softmax(-1)[0]
expected = float(sum(logs[at - 1, ids[0, at]] for at in range(start, ids.shape[1])))
found["scores the adapter"] = abs(said[1] - expected) < 1e-3 and abs(said[0] - expected) > 1e-2
say(found)
"""


@pytest.mark.parametrize(
    ("package", "script"),
    [("trl", TRL), ("diffusers", DIFFUSERS), ("sentence_transformers", SENTENCES), ("lm_eval", HARNESS)],
    ids=["trl", "diffusers", "sentence-transformers", "lm-eval"],
)
def test_a_program_that_imports_peft_runs_on_lorafa(package: str, script: str, tmp_path: Any) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    found = found_by_name(script, str(tmp_path))
    assert [claim for claim, holds in found.items() if not holds] == []
