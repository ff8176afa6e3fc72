"""A place to train in: a model of a few thousand parameters, twenty rows, and the settings of a short run on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorafa.train import recipe

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROWS = [
    {"question": f"Ann has {a} apples and gets {b} more. How many?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"}
    for a in range(2, 6)
    for b in range(1, 6)
]
STEPS = 12


def make_workplace(folder: Path, **sizes: int) -> Path:
    """Put ``model/`` (random, two layers, of other ``sizes`` where they are given) and ``rows.jsonl`` into a folder."""
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    marks = ["<|user|>", "<|assistant|>", "<|end|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = [row["question"] + row["answer"] for row in ROWS]
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=marks))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    small = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **(small | sizes))
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


def make_teacher(workplace: Path) -> Path:
    """Put ``teacher/``, a model that says something else than ``model/``, beside it."""
    model = LlamaForCausalLM.from_pretrained(workplace / "model")
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(workplace / "teacher")
    PreTrainedTokenizerFast.from_pretrained(workplace / "model").save_pretrained(workplace / "teacher")
    return workplace / "teacher"


def settings(workplace: Path, run_dir: Path) -> list[str]:
    return [
        f"model={workplace / 'model'}", f"data={workplace / 'rows.jsonl'}", f"run_dir={run_dir}", "data.eval_size=4",
        "peft.r=4", "peft.lora_dropout=0.1", "optim.lr=1e-2", f"train.steps={STEPS}", "train.batch_size=4",
        "train.checkpoint_every=4", "train.keep_checkpoints=5", "eval.max_new_tokens=8",
    ]  # fmt: skip


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def interrupt() -> None:
    raise KeyboardInterrupt


def at_step(patch: pytest.MonkeyPatch, step: int, act: Callable[[], None] = interrupt) -> None:
    """Do something when that step of a run was logged: by default what Ctrl-C does."""
    original = recipe.RunCallback.on_log

    def on_log(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        original(self, args, state, control, logs, **rest)
        if state.global_step == step:
            act()

    patch.setattr(recipe.RunCallback, "on_log", on_log)
