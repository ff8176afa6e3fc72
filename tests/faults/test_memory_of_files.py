"""A hostile megabyte is read or refused in two seconds and 200 MB, whatever it holds: each file in its own process.

Memory is the peak of a process that reads it above the peak of the one it was forked from, which has read a whole one.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from lorafa import LoraConfig, get_peft_model
from toys.fuzzing import SECONDS
from toys.places import ROOT
from toys.runs import make_run

MB, LIMIT = 1_000_000, 200
MEASURE = """
import os, resource, sys, time, warnings
from contextlib import suppress
from pathlib import Path
import torch
from torch import nn
from lorafa import PeftModel
from lorafa.errors import LoraError
from lorafa.report.entries import read_all
from lorafa.runs.plan import Plan
from lorafa.runs.record import RunDirectory
from lorafa.train.checkpoints import last_checkpoint
warnings.simplefilter("ignore")

def adapter(path):
    PeftModel.from_pretrained(nn.ModuleDict({"first": nn.Linear(4, 4)}), path)

def run(path):
    record = RunDirectory.open(path)
    for read in (record.config, record.metrics, record.result, record.environment):
        with suppress(LoraError):
            read()

def plan(path):
    Plan.read(path / "plan.yaml")

def checkpoints(path):
    last_checkpoint(path)

for line in sys.stdin.read().splitlines():
    kind, path = line.split(" ", 1)
    read, ends = globals()[kind], os.pipe()
    if not os.fork():
        start, before, said = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, ""
        try:
            read(Path(path))
        except LoraError:
            pass
        except BaseException as error:
            said = type(error).__name__
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        os.write(ends[1], f"{grown} {time.process_time() - start:.2f} {said}".encode())
        os._exit(0)
    os.wait()
    os.close(ends[1])
    print(os.read(ends[0], 1000).decode())
    if line.endswith("whole"):
        with suppress(LoraError):
            read(Path(path))
"""
DEEP, EMPTY = "[" * MB, "[" + "[]," * (MB // 3) + "[]]"
KEYS = "{" + ",".join(f'"{number:x}":0' for number in range(MB // 9)) + "}"
LISTS = {
    "deep": DEEP, "deep objects": '{"a":' * (MB // 5), "empty lists": EMPTY, "zeros": "[" + "0," * (MB // 2) + "0]",
    "keys": KEYS, "digits": "1" * MB, "escapes": '"' + r"\ud800" * (MB // 6) + '"',
    "numbers": "[" + "1e9," * (MB // 4) + "1]",
    "texts": "[" + '"a",' * (MB // 4) + '"b"]', "names": json.dumps([f"m.{number:x}" for number in range(MB // 12)]),
}  # fmt: skip
"""Json texts of a megabyte."""
YAML = {
    "items": "- a\n" * (MB // 4), "empty lists": EMPTY, "deep": DEEP,
    "indented": "\n".join(" " * i + "a:" for i in range(1400)),
    "aliases": "a: &a [1]\nb: [" + "*a," * (MB // 3) + "*a]",
    "doubled": "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30000)),
    "merged": "a: &a {x: 1}\nb:\n" + "  - <<: *a\n" * (MB // 12),
    "anchors": "".join(f"k{i}: &k{i} x\n" for i in range(60000)),
    "one text": "a: " + "x " * (MB // 2), "keys": KEYS.replace('":0', '": 0'), "tags": "- !!float 1\n" * (MB // 12),
}  # fmt: skip
FIELDS = ("target_modules", "exclude_modules", "rank_pattern", "r", "layers_to_transform", "modules_to_save", "unknown")


def cases(place: Path) -> dict[str, str]:
    """Name -> kind and folder."""
    made: dict[str, str] = {}

    def case(kind: str, name: str, make: Callable[[Path], None]) -> None:
        folder = place / str(len(made))
        base_of[kind](folder)
        make(folder)
        made[f"{kind} {name}"] = f"{kind} {folder}"

    def adapter(folder: Path) -> None:
        model = get_peft_model(nn.ModuleDict({"first": nn.Linear(4, 4)}), LoraConfig(r=2, target_modules=["first"]))
        model.save_pretrained(folder)

    def run(folder: Path) -> None:
        make_run(folder, loss=1.0, steps=4)

    def checkpoints(folder: Path) -> None:
        (folder / "checkpoint-2").mkdir(parents=True)

    base_of = {"adapter": adapter, "run": run, "plan": Path.mkdir, "checkpoints": checkpoints}
    for kind in base_of:
        (place / kind / "whole").parent.mkdir()
        base_of[kind](place / kind / "whole")
        made[f"{kind} whole"] = f"{kind} {place / kind / 'whole'}"
    for what, text in LISTS.items():
        case("adapter", f"config {what}", lambda folder, text=text: put(folder / "adapter_config.json", text))
        case("adapter", f"header {what}", lambda folder, text=text: put_header(folder, text))
        case("adapter", f"own entry {what}", lambda folder, text=text: put_own(folder, text))
        for field in FIELDS:
            case("adapter", f"{field} {what}", lambda folder, text=text, field=field: put_field(folder, field, text))
        for name in ("result.json", "environment.json", "metrics.jsonl"):
            case("run", f"{name} {what}", lambda folder, text=text, name=name: put(folder / name, text))
        for name in ("checkpoint-2/checkpoint.json", "checkpoint-2/trainer_state.json"):
            case("checkpoints", f"{name} {what}", lambda folder, text=text, name=name: put(folder / name, text))
    case("run", "metrics.jsonl lines", lambda folder: put(folder / "metrics.jsonl", '{"step":1}\n' * (MB // 11)))
    case("run", "metrics.jsonl empty lines", lambda folder: put(folder / "metrics.jsonl", "\n" * MB))
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    entries = {f"base_model.model.{number}.lora_A.weight": entry for number in range(9000)}
    case("adapter", "header entries", lambda folder: put_header(folder, json.dumps(entries)))
    for what, text in YAML.items():
        case("run", f"config.yaml {what}", lambda folder, text=text: put(folder / "config.yaml", text))
        case("plan", what, lambda folder, text=text: put(folder / "plan.yaml", text))
    return made


def put(path: Path, text: str) -> None:
    path.write_text(text)


def put_header(folder: Path, text: str) -> None:
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text.encode())


def put_own(folder: Path, text: str) -> None:
    data = (folder / "adapter_model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["lorafa"] = text
    put_header(folder, json.dumps(header))


def put_field(folder: Path, field: str, text: str) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {field: "HERE"}
    put(path, json.dumps(config).replace('"HERE"', text))


@pytest.mark.slow
def test_a_hostile_megabyte_takes_two_seconds_and_200_mb_at_most(tmp_path: Path) -> None:
    asked = cases(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], input="\n".join(asked.values()), capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = dict(zip(asked, (line.split(" ") for line in done.stdout.splitlines()), strict=True))
    most = sorted(found.items(), key=lambda one: int(one[1][0]), reverse=True)[:10]
    print("\n".join(f"{mb} MB {seconds} s {name}" for name, (mb, seconds, _) in most))
    assert {name: said for name, (_, _, said) in found.items() if said} == {}
    assert {name: mb for name, (mb, _, _) in found.items() if int(mb) >= LIMIT} == {}
    assert {name: seconds for name, (_, seconds, _) in found.items() if float(seconds) >= SECONDS} == {}
