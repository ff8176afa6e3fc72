"""Each step of a checkpoint of a trainer is killed, cut short or refused: the newest whole one is it or that before."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from lorafa.errors import CheckpointError
from lorafa.train.checkpoints import last_checkpoint
from toys.faults import FAULTS, FOR_GOOD, KILLS, REFUSALS, every_fault, files_in
from toys.training import trainer_for

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the harness looks descriptors up there")


@pytest.mark.parametrize(
    ("faults", "every"),
    [pytest.param(("cut", "full"), 3, id="some"), pytest.param(FAULTS, 1, id="all", marks=pytest.mark.slow)],
)
def test_the_newest_whole_checkpoint_is_the_new_one_or_the_one_before(
    faults: tuple[str, ...], every: int, tmp_path: Path
) -> None:
    trainer = trainer_for(tmp_path / "old", max_steps=4, save_steps=2, save_strategy="steps")
    trainer.train()
    wanted = files_in(tmp_path / "old" / "checkpoint-4")
    shutil.rmtree(tmp_path / "old" / "checkpoint-4")
    before = files_in(tmp_path / "old")

    def save(folder: Path) -> None:
        trainer.args.output_dir = str(folder)
        trainer._save_checkpoint(trainer.model, None)

    place = tmp_path / "work" / "place"
    place.parent.mkdir()
    for spoiled in every_fault(tmp_path / "old", place, save, faults, every):
        fault, what, raised = spoiled.fault, spoiled.what, spoiled.raised
        newest = last_checkpoint(place)
        assert newest is not None, what
        assert newest.name in ("checkpoint-2", "checkpoint-4"), what
        if newest.name == "checkpoint-4":
            assert files_in(newest).keys() == wanted.keys(), what
        assert files_in(place / "checkpoint-2") == {
            name.partition("/")[2]: content for name, content in before.items() if name.startswith("checkpoint-2/")
        }, what
        if fault in (*REFUSALS, FOR_GOOD):
            assert raised is None or type(raised) is CheckpointError, (what, raised)
        if fault in REFUSALS and raised is not None:
            assert files_in(place, leavings=True) == before, what
            assert os.strerror(REFUSALS[fault]) in str(raised), (what, raised)
        if fault in (*KILLS, FOR_GOOD):
            save(place)
            assert last_checkpoint(place) == place / "checkpoint-4", what
            assert files_in(place / "checkpoint-4", leavings=True).keys() == wanted.keys(), what
