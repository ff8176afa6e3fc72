"""Which checkpoints are complete, and by how many processes they can be continued."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lorafa.errors import CheckpointError
from lorafa.train import checkpoints
from lorafa.train.checkpoints import last_checkpoint, missing_files, require_same_processes


def checkpoint(folder: Path, *random_states: str) -> Path:
    """One of a version that wrote no sizes and digests."""
    folder.mkdir()
    for name in ("optimizer.pt", "scheduler.pt", *random_states):
        torch.save({"x": torch.zeros(100)}, folder / name)
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


def sealed(folder: Path, *random_states: str) -> Path:
    folder.mkdir(parents=True)
    checkpoints.begin(folder)
    assert missing_files(folder) == ["checkpoint.json"]
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", *(random_states or ["rng_state.pth"])):
        (folder / name).write_text(name)
    (folder / "second").mkdir()
    (folder / "second" / "adapter_model.safetensors").write_bytes(bytes(100))
    assert last_checkpoint(folder.parent) != folder
    checkpoints.seal(folder)
    return folder


FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "second/adapter_model.safetensors")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["empty", "cut", "zeroed", "one bit", "longer", "gone", "a folder"])
def test_every_file_is_what_was_written(tmp_path: Path, name: str, damage: str) -> None:
    earlier, made = sealed(tmp_path / "checkpoint-2"), sealed(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path) == made
    path = made / name
    was = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes({
            "empty": b"", "cut": was[:-3], "zeroed": bytes(len(was) - 1) + b"x", "longer": was + b"x",
            "one bit": was[:-1] + bytes([was[-1] ^ 1]),
        }[damage])  # fmt: skip
    assert missing_files(made) == [name]
    told: list[str] = []
    assert last_checkpoint(tmp_path, told.append) == earlier
    assert [text.partition("/checkpoint-10 ")[2] for text in told] == [
        f"is passed over, for it is not whole: {name} missing or damaged. The newest whole checkpoint before it is "
        "taken, if there is one."
    ]
    with pytest.warns(UserWarning, match="checkpoint-10 is passed over"):
        assert checkpoints.newest_whole(tmp_path) == earlier


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 5, "processes": 1}', '{"files": {}, "processes": 1}',
    '{"files": {}, "processes": true}', '{"files": {"optimizer.pt": null}, "processes": 1}'])  # fmt: skip
def test_a_damaged_list_of_contents_is_of_no_whole_checkpoint(tmp_path: Path, content: str) -> None:
    made = sealed(tmp_path / "checkpoint-2")
    (made / "checkpoint.json").write_text(content)
    assert missing_files(made)
    assert last_checkpoint(tmp_path) is None


def test_a_checkpoint_of_several_processes_has_the_states_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "world_size", lambda: 3)
    made = sealed(tmp_path / "checkpoint-2", "rng_state_0.pth", "rng_state_2.pth")
    assert missing_files(made) == ["rng_state_1.pth"]
    made = sealed(tmp_path / "checkpoint-4", *(f"rng_state_{number}.pth" for number in range(3)))
    assert missing_files(made) == []
    require_same_processes(made)
    (made / "rng_state_3.pth").touch()  # whatever else lies there
    require_same_processes(made)
    monkeypatch.setattr(checkpoints, "world_size", lambda: 4)
    with pytest.raises(CheckpointError, match="was written by 3 processes and there are 4 now"):
        require_same_processes(made)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("damage", ["empty", "cut", "zeroed", "one bit"])
def test_states_of_older_versions_are_read_through(tmp_path: Path, name: str, damage: str) -> None:
    made = checkpoint(tmp_path / "checkpoint-4", "rng_state.pth")
    was = (made / name).read_bytes()
    at = was.index(bytes(200)) + 10
    (made / name).write_bytes({
        "empty": b"", "cut": was[:-3], "zeroed": bytes(len(was)), "one bit": was[:at] + b"\1" + was[at + 1 :],
    }[damage])  # fmt: skip
    assert missing_files(made) == [name]


def test_what_is_passed_over_gives_its_place_away(tmp_path: Path) -> None:
    kept, damaged, begun = (sealed(tmp_path / f"checkpoint-{step}") for step in (2, 4, 6))
    (damaged / "optimizer.pt").unlink()
    checkpoints.begin(begun)
    (tmp_path / "checkpoint-8").mkdir()  # by a version that wrote no list, killed
    sealed(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "checkpoint.json").write_text("{")
    (tmp_path / "damaged-checkpoint-4").mkdir()
    checkpoints.put_aside_after(tmp_path, kept)
    names = ["checkpoint-2", "damaged-checkpoint-10", "damaged-checkpoint-4", "damaged-checkpoint-4-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert last_checkpoint(tmp_path) == kept
    (kept / "scheduler.pt").unlink()
    checkpoints.put_aside_after(tmp_path, None)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == []


def test_older_ones_are_removed_by_age_but_not_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        sealed(tmp_path / f"checkpoint-{step}")
        os.utime(tmp_path / f"checkpoint-{step}", (1000 + step, 1000 + step))
    os.utime(tmp_path / "checkpoint-8", (0, 0))  # of an earlier training
    newest = tmp_path / "checkpoint-6"

    def left(limit: int | None, best: str | None = None) -> list[int]:
        checkpoints.drop_oldest(tmp_path, limit, newest, best)
        return sorted(int(path.name[11:]) for path in tmp_path.iterdir())

    assert left(None) == left(0) == left(4) == [2, 4, 6, 8]
    assert left(3) == [2, 4, 6]
    assert left(1, "elsewhere/checkpoint-2") == [2, 6]
    assert left(1) == [6]
