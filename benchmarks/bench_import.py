"""What does importing the library cost a program that has torch already?

    python benchmarks/bench_import.py

Each import in a new process, torch imported before the clock starts; PEFT brings transformers with it.
"""

from __future__ import annotations

import subprocess
import sys

from harness import emit, median, verdict

NAME = "import"
PROGRAM = "import time, torch; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"


def seconds(module: str, repeats: int) -> float:
    command = [sys.executable, "-c", PROGRAM.format(module)]
    return median([float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(repeats)])


def main() -> None:
    ours, theirs = seconds("lorafa", 7), seconds("peft", 3)
    emit(benchmark=NAME, lorafa_seconds=round(ours, 3), peft_seconds=round(theirs, 3))
    verdict(NAME, "import lorafa after torch, seconds", ours, 0.1)


if __name__ == "__main__":
    main()
