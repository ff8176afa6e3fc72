"""Which checkpoints are complete, and by how many processes they can be continued."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafa.errors import CheckpointError
from lorafa.train import checkpoints
from lorafa.train.checkpoints import last_checkpoint, missing_files, require_same_processes


def checkpoint(folder: Path, *random_states: str) -> Path:
    folder.mkdir()
    for name in ("optimizer.pt", "scheduler.pt", *random_states):
        (folder / name).touch()
    (folder / "trainer_state.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("random_states", "missing"),
    [
        (["rng_state.pth"], []),
        (["rng_state_0.pth", "rng_state_1.pth"], []),
        ([], ["rng_state.pth"]),
        (["rng_state_1.pth", "rng_state_3.pth"], ["rng_state_0.pth", "rng_state_2.pth"]),
    ],
)
def test_a_checkpoint_has_the_random_state_of_every_process(
    tmp_path: Path, random_states: list[str], missing: list[str]
) -> None:
    made = checkpoint(tmp_path / "checkpoint-4", *random_states)
    assert missing_files(made) == missing
    assert last_checkpoint(tmp_path) == (None if missing else made)


@pytest.mark.parametrize(
    ("wrote", "now", "text"),
    [
        (2, 1, r"was written by 2 processes and there is 1 now, whose batches would be others\. Start 2 to cont"),
        (1, 2, r"was written by 1 process and there are 2 now, whose batches would be others\. Start 1 to continue it"),
        (2, 3, r"was written by 2 processes and there are 3 now, .* or a new run from its adapter \(peft\.adapter\)\."),
    ],
)
def test_another_number_of_processes_does_not_continue_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrote: int, now: int, text: str
) -> None:
    states = ["rng_state.pth"] if wrote == 1 else [f"rng_state_{number}.pth" for number in range(wrote)]
    made = checkpoint(tmp_path / "checkpoint-4", *states)
    monkeypatch.setattr(checkpoints, "world_size", lambda: wrote)
    require_same_processes(made)
    monkeypatch.setattr(checkpoints, "world_size", lambda: now)
    with pytest.raises(CheckpointError, match=text):
        require_same_processes(made)
