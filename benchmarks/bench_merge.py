"""What does merging an adapter into a model in shards take, memory and time: file by file, or loaded as PEFT does it?

    python benchmarks/bench_merge.py [--gb 2.0] [--repeats 3] [--folder DIR]

A Llama of random weights in ten shards and an adapter of r = 16 on all linear layers. Each merge runs in a process of
its own; peaks are of resident memory above an interpreter that has torch imported, seconds are from the start of the
process to its end. lorafa's files are on the disk when it ends, PEFT's are not, so its time until they are (fsync) is
given as well. Results are compared weight by weight: both round a sum to bfloat16, PEFT once more on the way.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import emit, median, positive, verdict
from safetensors import safe_open
from safetensors.torch import save_file

from lorafa import LoraConfig

NAME, SHARDS, RANK = "merge", 10, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MEASURED = """
import json, sys, time
import torch
torch.set_num_threads({threads})
{work}
with open("/proc/self/status") as status:  # what getrusage gives counts the process this one was forked from as well
    peak = next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
processor = time.process_time()
print(json.dumps({{"peak": peak, "seconds": seconds, "processor": processor}}))
"""
NOTHING = "seconds = 0.0"
OURS = """
begun = time.perf_counter()
from lorafa import merge_to_folder
merge_to_folder({adapter!r}, {out!r}, base={base!r})
seconds = time.perf_counter() - begun
"""
THEIRS = """
begun = time.perf_counter()
from transformers import AutoModelForCausalLM
from peft import PeftModel
model = AutoModelForCausalLM.from_pretrained({base!r}, dtype="auto")
PeftModel.from_pretrained(model, {adapter!r}).merge_and_unload().save_pretrained({out!r})
seconds = time.perf_counter() - begun
"""
SYNCED = """
import os, pathlib
for path in pathlib.Path({out!r}).iterdir():
    with open(path, "rb") as file:
        os.fsync(file.fileno())
seconds = time.perf_counter() - begun
"""


def shapes(gb: float) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The config of a Llama of at least ``gb`` GB in bfloat16, and the shape of each weight."""
    hidden, middle, vocabulary, keys = (2048, 5632, 32000, 512) if gb >= 0.5 else (64, 176, 500, 16)
    block = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (middle, hidden), "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    size = sum(torch.Size(shape).numel() for shape in block.values())
    layers = max(SHARDS, int((gb * 1e9 / 2 - 2 * vocabulary * hidden) // size) + 1)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "dtype": "bfloat16",
        "intermediate_size": middle, "num_hidden_layers": layers, "num_attention_heads": 32, "vocab_size": vocabulary,
        "num_key_value_heads": 32 * keys // hidden, "tie_word_embeddings": False,
    }  # fmt: skip
    found = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return config, found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def make_base(folder: Path, gb: float) -> dict[str, tuple[int, ...]]:
    """Write the model in ten shards of about the same size."""
    config, found = shapes(gb)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    total, done, index = sum(torch.Size(shape).numel() for shape in found.values()), 0, {}
    shards: list[list[str]] = [[] for _ in range(SHARDS)]
    for name, shape in found.items():
        shards[min(SHARDS - 1, SHARDS * done // total)].append(name)
        done += torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(0)
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        tensors = {name: torch.randn(found[name], generator=generator).mul_(0.02).to(torch.bfloat16) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    text = json.dumps({"metadata": {"total_size": 2 * total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return found


def make_adapter(folder: Path, found: dict[str, tuple[int, ...]], base: Path) -> None:
    LoraConfig(r=RANK, target_modules=list(TARGETS), base_model_name_or_path=str(base)).save_pretrained(folder)
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, shape in found.items():
        path = name.removesuffix(".weight")
        if path.endswith(TARGETS):
            out, in_ = shape
            key = f"base_model.model.{path}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, in_, generator=generator).mul_(0.02)
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, RANK, generator=generator).mul_(0.02)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def measured(work: str, threads: int) -> dict[str, float]:
    """Peak bytes and seconds of a program; "wall" is from its start to its end, "processor" what all threads took."""
    os.sync()  # what others have written does not come in between
    begun = time.perf_counter()
    program = MEASURED.format(work=work, threads=threads)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr[-3000:])
    found: dict[str, float] = json.loads(run.stdout.strip().splitlines()[-1])
    return found | {"wall": time.perf_counter() - begun}


def difference(one: Path, other: Path) -> float:
    """The largest share of bfloat16 numbers in a tensor that differ, and no two of them by more than two units."""
    tensors = [{}, {}]  # type: list[dict[str, Path]]
    for folder, found in zip((one, other), tensors, strict=True):
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
    assert tensors[0].keys() == tensors[1].keys(), tensors[0].keys() ^ tensors[1].keys()
    worst = 0.0
    for name in tensors[0]:
        a, b = (_read(found[name], name).float() for found in tensors)
        torch.testing.assert_close(a, b, rtol=2**-6, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        worst = max(worst, float((a != b).float().mean()))
    return worst


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the model (default: 2.0)")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--folder", help="where the models are written (default: the system's temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-merge-") as place:
        folder = Path(place)
        base, adapter, ours, theirs = (folder / name for name in ("base", "adapter", "ours", "theirs"))
        make_adapter(adapter, make_base(base, args.gb), base)
        named = {"base": str(base), "adapter": str(adapter)}
        by_us, by_them = OURS.format(**named, out=str(ours)), THEIRS.format(**named, out=str(theirs))
        cases = {"lorafa": by_us, "peft": by_them, "peft, on the disk": by_them + SYNCED.format(out=str(theirs))}
        idle = measured(NOTHING, args.threads)["peak"]
        runs: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
        order = list(cases)
        for repeat in range(args.repeats):
            for case in order[repeat % len(order) :] + order[: repeat % len(order)]:  # none always follows the same one
                shutil.rmtree(ours if case == "lorafa" else theirs, ignore_errors=True)
                runs[case].append(measured(cases[case], args.threads))
        differs = difference(ours, theirs)
        sizes = [path.stat().st_size for path in base.glob("*.safetensors")]
        shard, size = max(sizes), sum(sizes)
        peaks = {case: max(run["peak"] for run in found) - idle for case, found in runs.items()}
        walls = {case: median([run["wall"] for run in found]) for case, found in runs.items()}
        processor = {case: median([run["processor"] for run in found]) for case, found in runs.items()}
        inner = {case: median([run["seconds"] for run in found]) for case, found in runs.items()}
        for case in cases:
            emit(
                benchmark=NAME, case=case, peak_mb=round(peaks[case] / 1e6, 1), wall_seconds=round(walls[case], 2),
                seconds_after_torch=round(inner[case], 2), processor_seconds=round(processor[case], 2),
                largest_shard_mb=round(shard / 1e6, 1), model_mb=round(size / 1e6, 1),
            )  # fmt: skip
        emit(benchmark=NAME, share_of_numbers_that_differ=differs)
        verdict(NAME, "peak of lorafa over PEFT's", peaks["lorafa"] / peaks["peft"], 0.4)
        verdict(NAME, "time of lorafa over PEFT's", walls["lorafa"] / walls["peft"], 0.7)
        verdict(NAME, "the same, both on the disk", walls["lorafa"] / walls["peft, on the disk"], 0.7)


if __name__ == "__main__":
    main()
