"""Commands that are no work for several processes are refused where a launcher starts several of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafa.cli.main import COMMANDS, TOGETHER, main, parse

WORDS = {
    "chat": ["a"], "report": ["a"], "compare": ["plan.yaml", "out"], "merge": ["a", "--out", "out"],
    "export": ["a", "--for", "peft", "--out", "out"], "inspect": ["a"], "params": [], "plan": [],
    "combine": ["a", "b", "--out", "out"], "doctor": ["--quick"],
}  # fmt: skip


LAUNCHES = {
    "torchrun": {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
    "srun": {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    "mpirun": {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
}


@pytest.mark.parametrize("launcher", LAUNCHES)
@pytest.mark.parametrize("name", WORDS)
def test_one_of_two_is_refused(
    name: str, launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for variable, value in LAUNCHES[launcher].items():
        monkeypatch.setenv(variable, value)
    for variable in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(variable, "1")
    try:
        status = main([name, *WORDS[name]])
    except SystemExit:  # other words than these
        pytest.fail(f"{name}: {capsys.readouterr().err}")
    said = " ".join(capsys.readouterr().err.split())
    refusal = f"lorafa {name} is no work for a group of processes, and {launcher} has started 2 processes, each of whic"
    shared = (name, launcher) == ("compare", "srun")  # whose processes share the runs out: it fails for its plan
    assert (status, refusal in said) == (2, not shared), said
    assert list(tmp_path.iterdir()) == []


def test_every_other_command_says_that_it_takes_several() -> None:
    names = {module.__name__.rpartition(".")[2] for module in COMMANDS}
    assert names - WORDS.keys() == {module.__name__.rpartition(".")[2] for module in TOGETHER}
    assert parse(["train"]).alone is None
