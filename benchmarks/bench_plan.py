"""Is the memory that `lorafa plan` says what `lorafa train` then takes: three models, seven settings.

    python benchmarks/bench_plan.py [--data gsm8k_train.jsonl] [--steps 2] [--only smollm2-135m] [--settings default]

SmolLM2-135M in bfloat16; a GPT-2 (Conv1D layers, float32) and a Qwen2 (bfloat16, biases) of random weights, saved into
a temporary folder with SmolLM2's tokenizer. Each plan and each training is a process of its own, one after another. The
training evaluates before and after, the loss and short answers; what is measured is ``peak_rss_bytes`` of its
result.json, the largest resident memory of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import THREADS, emit

NAME = "plan"
TARGET = 0.15
SETTINGS = {
    "default": [],
    "r=64": ["peft.r=64"],
    "checkpointing": ["train.gradient_checkpointing=true"],
    "lora_fa": ["optim=lora_fa"],
    "batch 2": ["train.batch_size=2"],
    "align=base": ["align=base"],
    "align=external": ["align=external", "align.teacher=smollm2-135m"],
}


def random_models(folder: Path) -> dict[str, str]:
    """Models of random weights by name: the folders they are saved in."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    from lorafa.models.load import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m")
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=49152, n_embd=512, n_layer=4, n_head=8))
    qwen2 = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=49152, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=4, tie_word_embeddings=False, max_position_embeddings=2048,
        )
    ).to(torch.bfloat16)  # fmt: skip
    places = {}
    for name, model in {"gpt2": gpt2, "qwen2": qwen2}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        places[name] = str(folder / name)
    return places


def command(*words: str, threads: int) -> str:
    """What a command of lorafa prints, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", "lorafa.cli.main", *words], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"lorafa {' '.join(words)}:\n{done.stderr}")
    return done.stdout


def compared(settings: list[str], folder: Path, threads: int) -> dict[str, Any]:
    """The memory of one run as it is planned and as it is measured, in MiB."""
    planned = json.loads(command("plan", "--json", *settings, threads=threads))
    command("train", f"run_dir={folder}", *settings, threads=threads)
    peak = json.loads((folder / "result.json").read_text(encoding="utf-8"))["peak_rss_bytes"]
    parts = {name: round(size / 2**20) for name, size in planned["memory"].items()}
    ratio = planned["memory"]["total"] / peak
    return {"planned_mib": parts.pop("total"), "measured_mib": round(peak / 2**20), "ratio": round(ratio, 3),
            "met": abs(ratio - 1) <= TARGET, "parts": parts}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="word_problems", help="a jsonl of question/answer rows")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--only", nargs="*", help="models")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=SETTINGS)
    arguments = parser.parse_args()
    data = str(Path(arguments.data).resolve()) if Path(arguments.data).exists() else arguments.data
    common = [f"data={data}", "data.train_size=32", "data.eval_size=8", f"train.steps={arguments.steps}",
              "train.checkpoint_every=0", "eval.max_new_tokens=16"]  # fmt: skip
    missed = 0
    with tempfile.TemporaryDirectory() as scratch:
        models = {"smollm2-135m": "smollm2-135m", **random_models(Path(scratch))}
        for name in arguments.only or models:
            for setting in arguments.settings:
                settings = [f"model={models[name]}", *common, *SETTINGS[setting]]
                row = compared(settings, Path(scratch) / f"{name}-{setting.replace(' ', '-')}", arguments.threads)
                missed += not row["met"]
                emit(benchmark=NAME, model=name, setting=setting, **row)
    emit(benchmark=NAME, figure="predictions further than 15 % from what was measured", value=missed, target=0,
         met=not missed)  # fmt: skip


if __name__ == "__main__":
    main()
