"""How long does it take to give an adapter another rank, by the core of its factors and by the dense update?

    python benchmarks/bench_conversion.py [--repeats 3] [--layers 30]

SmolLM2-135M's shape with random weights in float32: all linear layers, r = 32 to 16, lorafa and PEFT in turns.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from typing import Any

import peft
import torch
import transformers
from harness import THREADS, emit, median, positive, timed, verdict
from torch import Tensor

import lorafa

NAME = "conversion"
SHAPE = {"vocab_size": 1024, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
         "num_key_value_heads": 3}  # fmt: skip


def base_model(layers: int) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, num_hidden_layers=layers)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def adapted(layers: int, folder: str) -> dict[str, Any]:
    """One adapter that has left its start, in both libraries."""
    config = lorafa.LoraConfig(r=32, lora_alpha=64, target_modules="all-linear")
    ours = lorafa.get_peft_model(base_model(layers), config)
    for parameter in ours.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    ours.save_pretrained(folder)
    return {"lorafa": ours, "peft": peft.PeftModel.from_pretrained(base_model(layers), folder)}


def products(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensors[key.replace("lora_A", "lora_B")] @ tensors[key] for key in tensors if "lora_A" in key}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--layers", type=positive, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")  # of what the rank loses, and that it is LoRA already
    libraries: dict[str, Any] = {"lorafa": lorafa, "peft": peft}
    with tempfile.TemporaryDirectory() as folder:
        models = adapted(arguments.layers, folder)
    seconds: dict[str, list[float]] = {name: [] for name in libraries}
    for _ in range(arguments.repeats):
        made: dict[str, Any] = {}
        for name, library in libraries.items():

            def run(library: Any = library, name: str = name, made: dict[str, Any] = made) -> None:
                made[name] = library.convert_to_lora(models[name], 16)[1]

            seconds[name].append(timed(run))
        ours, theirs = products(made["lorafa"]), products(made["peft"])
        assert ours.keys() == theirs.keys()
        for key in ours:  # wrong answers are not timed
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-2, atol=1e-2 * float(theirs[key].abs().max()))
    own, other = median(seconds["lorafa"]), median(seconds["peft"])
    emit(benchmark=NAME, layers=7 * arguments.layers, lorafa_seconds=round(own, 3), peft_seconds=round(other, 3))
    verdict(NAME, "convert_to_lora, r=32 to 16, time / PEFT", own / other, 0.1)


if __name__ == "__main__":
    main()
