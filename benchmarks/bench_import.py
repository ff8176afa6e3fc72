"""What does a program that has torch already wait for to use the library, and a user for a command to answer?

    python benchmarks/bench_import.py

Each time in a new process. Imports: torch imported before the clock starts; PEFT brings transformers with it. Commands:
from the start of Python to its end.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import emit, median, verdict

NAME = "import"
PROGRAM = """
import time, torch
begun = time.perf_counter()
from {} import LoraConfig, get_peft_model
print(time.perf_counter() - begun)
"""
COMMANDS = {"--help": 0.3, "train --help": 1.0, "report": 1.5}
"""Arguments -> seconds wanted at most."""


def seconds(module: str, repeats: int) -> float:
    command = [sys.executable, "-c", PROGRAM.format(module)]
    return median([float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(repeats)])


def answered(arguments: list[str], repeats: int) -> float:
    command, times = [sys.executable, "-m", "lorafa.cli.main", *arguments], []
    for _ in range(repeats):
        begun = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - begun)
    return median(times)


def main() -> None:
    ours, theirs = seconds("lorafa", 7), seconds("peft", 3)
    emit(benchmark=NAME, lorafa_seconds=round(ours, 3), peft_seconds=round(theirs, 3))
    verdict(NAME, "LoraConfig and get_peft_model after torch, seconds", ours, 0.1)
    with tempfile.TemporaryDirectory() as run:
        Path(run, "config.yaml").write_text("peft: {r: 8}", encoding="utf-8")
        Path(run, "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
        for command, wanted in COMMANDS.items():
            arguments = ["report", run] if command == "report" else command.split()
            took = answered(arguments, 5)
            emit(benchmark=NAME, command=command, seconds=round(took, 3))
            verdict(NAME, f"lorafa {command}, seconds", took, wanted)


if __name__ == "__main__":
    main()
