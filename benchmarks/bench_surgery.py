"""How long does it take to put adapters on a model and to load them, and does the hundredth cost more than the second?

    python benchmarks/bench_surgery.py [--repeats 5]

SmolLM2-135M's shape with random weights in bfloat16: 210 linear layers, r = 64. lorafa and PEFT take turns.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from typing import Any

import peft
import torch
import transformers
from harness import THREADS, emit, median, timed, verdict

import lorafa

NAME = "surgery"
SHAPE = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}  # fmt: skip


def base_model() -> Any:
    config = transformers.LlamaConfig(**SHAPE)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def wrap(repeats: int) -> None:
    base = base_model()
    seconds: dict[str, list[float]] = {"lorafa": [], "peft": []}
    for turn in range(repeats + 1):
        for library in (lorafa, peft):
            model = copy.deepcopy(base)
            config = library.LoraConfig(r=64, target_modules="all-linear")
            taken = timed(lambda: library.get_peft_model(model, config))  # noqa: B023 (called at once)
            if turn:
                seconds[library.__name__].append(taken)
            wrapped = sum("lora_A" in name for name, _ in model.named_parameters())
            assert wrapped == 210, f"{library.__name__} adapted {wrapped} layers"
    ours, theirs = median(seconds["lorafa"]), median(seconds["peft"])
    emit(benchmark=NAME, case="get_peft_model", lorafa_seconds=round(ours, 3), peft_seconds=round(theirs, 3))
    verdict(NAME, "get_peft_model, r=64, time / PEFT", ours / theirs, 0.35)


def load(repeats: int) -> None:
    base = base_model()
    seconds: dict[str, list[float]] = {"lorafa": [], "peft": []}
    with tempfile.TemporaryDirectory() as folder:
        config = lorafa.LoraConfig(r=64, target_modules="all-linear")
        lorafa.get_peft_model(copy.deepcopy(base), config).save_pretrained(folder)
        for turn in range(repeats + 1):
            for library in (lorafa, peft):
                model = copy.deepcopy(base)
                taken = timed(lambda: library.PeftModel.from_pretrained(model, folder))  # noqa: B023 (called at once)
                if turn:
                    seconds[library.__name__].append(taken)
    ours, theirs = median(seconds["lorafa"]), median(seconds["peft"])
    emit(benchmark=NAME, case="from_pretrained", lorafa_seconds=round(ours, 3), peft_seconds=round(theirs, 3))
    verdict(NAME, "from_pretrained, r=64, time / PEFT", ours / theirs, 0.5)


def many(count: int) -> None:
    config = lorafa.LoraConfig(r=4, target_modules="all-linear")
    model = lorafa.get_peft_model(base_model(), config, adapter_name="a0")
    taken = [timed(lambda: model.add_adapter(f"a{index}", config)) for index in range(1, count)]  # noqa: B023
    second, last = median(taken[:5]), median(taken[-5:])
    emit(benchmark=NAME, case="add_adapter", second_seconds=round(second, 3), last_seconds=round(last, 3), count=count)
    verdict(NAME, f"adding adapter {count} / adding the 2nd (medians of 5)", last / second, 1.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--adapters", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")  # PEFT's of its own files
    wrap(arguments.repeats)
    load(arguments.repeats)
    many(arguments.adapters)


if __name__ == "__main__":
    main()
