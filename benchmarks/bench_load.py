"""How long does it take to load an adapter and let it count, to exchange it, and to add one beside a hundred others?

    python benchmarks/bench_load.py [--repeats 9] [--adapters 100]

SmolLM2-135M's shape with random weights in float32, 210 linear layers, r = 16; the hundred have r = 4. lorafa and PEFT
take turns on models of their own, on the same files, and their outputs are compared first.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from harness import THREADS, emit, median, positive, timed, verdict
from peft.utils import hotswap as peft_hotswap

import lorafa

NAME = "load"
SHAPE = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}  # fmt: skip
IDS = torch.arange(1, 33)[None]
TOLERANCE = 1e-4


def base_model(layers: int) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(SHAPE | {"num_hidden_layers": layers}))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def saved(folder: Path, base: Any, r: int, seed: int) -> str:
    """The folder of an adapter whose update is no zero."""
    model = lorafa.get_peft_model(copy.deepcopy(base), lorafa.LoraConfig(r=r, target_modules="all-linear"))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def require_equal(case: str, models: dict[str, Any]) -> None:
    ours, theirs = (logits(models[name]) for name in ("lorafa", "peft"))
    worst = float((ours - theirs).abs().max() / theirs.abs().max())
    if worst > TOLERANCE:
        raise SystemExit(f"{case}: the outputs differ by {worst:.1e} of the largest one; nothing was timed.")


def load_and_activate(base: Any, folder: str, repeats: int) -> None:
    def run(library: Any, model: Any) -> Any:
        adapted = library.PeftModel.from_pretrained(model, folder)
        adapted.set_adapter("default")
        return adapted

    libraries = {"lorafa": lorafa, "peft": peft}
    require_equal("load", {name: run(library, copy.deepcopy(base)) for name, library in libraries.items()})
    seconds: dict[str, list[float]] = {name: [] for name in libraries}
    for turn in range(repeats + 1):
        for name in libraries if turn % 2 else reversed(libraries):
            model = copy.deepcopy(base)
            taken = timed(lambda: run(libraries[name], model))  # noqa: B023 (called at once)
            if turn:
                seconds[name].append(taken)
    report("load and activate the first adapter", seconds, 0.5)


def second_adapter(base: Any, folder: str, repeats: int) -> None:
    models = {"lorafa": lorafa.PeftModel.from_pretrained(copy.deepcopy(base), folder),
              "peft": peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)}  # fmt: skip

    def run(model: Any) -> None:
        model.load_adapter(folder, "second")
        model.set_adapter("second")

    seconds = in_turns(models, run, repeats, after=lambda model: model.delete_adapter("second"))
    report("load and activate a second adapter", seconds, 0.5)


def exchange(base: Any, first: str, second: str, repeats: int) -> None:
    models = {"lorafa": lorafa.PeftModel.from_pretrained(copy.deepcopy(base), first),
              "peft": peft.PeftModel.from_pretrained(copy.deepcopy(base), first)}  # fmt: skip
    lorafa.prepare_model_for_compiled_hotswap(models["lorafa"], target_rank=16)
    peft_hotswap.prepare_model_for_compiled_hotswap(models["peft"], target_rank=16)
    swaps = {models["lorafa"]: lorafa.hotswap_adapter, models["peft"]: peft_hotswap.hotswap_adapter}
    for folder in (second, first):
        for model, swap in swaps.items():
            swap(model, folder, "default", torch_device="cpu")
        require_equal("hotswap_adapter", models)
    order = iter([second, first] * (2 * repeats + 4))
    seconds = in_turns(models, lambda model: swaps[model](model, next(order), "default", torch_device="cpu"), repeats)
    report("hotswap_adapter", seconds, 1.0)


def in_turns(
    models: dict[str, Any], run: Callable[[Any], None], repeats: int, after: Callable[[Any], None] = lambda model: None
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name in models if turn % 2 else reversed(models):
            taken = timed(lambda: run(models[name]))  # noqa: B023 (called at once)
            after(models[name])
            if turn:
                seconds[name].append(taken)
    return seconds


def report(case: str, seconds: dict[str, list[float]], target: float) -> None:
    ours, theirs = median(seconds["lorafa"]), median(seconds["peft"])
    emit(benchmark=NAME, case=case, lorafa_seconds=round(ours, 4), peft_seconds=round(theirs, 4))
    verdict(NAME, f"{case}, time / PEFT", ours / theirs, target)


def resident(base: Any, folder: str, count: int) -> None:
    """The time to add one does not grow with the adapters that are there; that to choose one is shown beside it."""
    model = lorafa.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    added, chosen = [], []
    for index in range(1, count):
        added.append(timed(lambda: model.load_adapter(folder, f"a{index}")))  # noqa: B023 (called at once)
        chosen.append(timed(lambda: model.set_adapter(f"a{index}")))  # noqa: B023
    for there in sorted({1, 10, 50, count - 5} & set(range(1, count - 4))):
        part = slice(there - 1, there + 4)
        emit(benchmark=NAME, case="load_adapter", resident=there, seconds=round(median(added[part]), 4),
             set_adapter_seconds=round(median(chosen[part]), 4))  # fmt: skip
    growth = median(added[-5:]) / median(added[:5])
    verdict(NAME, f"adding adapter {count} / adding the 2nd (medians of 5)", growth, 1.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive, default=9)
    parser.add_argument("--adapters", type=positive, default=100)
    parser.add_argument("--layers", type=positive, default=SHAPE["num_hidden_layers"], help="of the model; default 30")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")  # PEFT's of files that are not its own
    base = base_model(arguments.layers)
    with tempfile.TemporaryDirectory() as place:
        first, second, small = (
            saved(Path(place) / name, base, r, seed) for name, r, seed in (("one", 16, 1), ("two", 16, 2), ("s", 4, 3))
        )
        load_and_activate(base, first, arguments.repeats)
        second_adapter(base, first, arguments.repeats)
        exchange(base, first, second, arguments.repeats)
        resident(base, small, max(arguments.adapters, 10))


if __name__ == "__main__":
    main()
