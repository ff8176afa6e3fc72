"""`lorafa train` under the launchers themselves; what two processes do is in test_train_in_processes.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorafa.cli.main import main
from toys.workplace import make_workplace, metrics, read, settings

ACCELERATE = ["accelerate.commands.launch", "--num_processes=2", "--num_machines=1", "--dynamo_backend=no"]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node=2"],
    "accelerate": [*ACCELERATE, "--mixed_precision=no", "--multi_gpu"],
    "fsdp2": [*ACCELERATE, "--mixed_precision=no", "--use_fsdp", "--fsdp_version=2"],
}
SHORT = ["train.steps=4", "peft.lora_dropout=0", "eval.size=0"]


@pytest.mark.slow
def test_launchers_start_one_run(tmp_path: Path) -> None:
    workplace = make_workplace(tmp_path)
    assert main(["train", *settings(workplace, tmp_path / "one"), *SHORT]) == 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for name, launcher in LAUNCHERS.items():
        command = ["train", *settings(workplace, tmp_path / name), *SHORT, "train.batch_size=2"]
        words = [sys.executable, "-m", *launcher, "-m", "lorafa.cli.main", *command]
        subprocess.run(words, env=environment, check=True, timeout=200)
        assert read(tmp_path / name / "environment.json")["processes"] == 2
        losses, wanted = ([row["loss"] for row in metrics(tmp_path / run)] for run in (name, "one"))
        assert losses == pytest.approx(wanted, rel=1e-5)
