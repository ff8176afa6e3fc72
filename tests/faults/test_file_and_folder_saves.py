"""Each step of every other save is killed, cut short, refused or interrupted: all is whole, the old one or the new."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorafa import LoraConfig, export_adapter, merge_to_folder
from lorafa.data.classes import write_classes
from lorafa.data.token_cache import Contents, write_cache
from lorafa.io.card import update_card
from lorafa.io.combine_files import combine_files
from lorafa.runs.record import RunDirectory
from lorafa.starts.statistics import Statistics
from lorafa.storage import renames
from lorafa.storage.folders import folder_written_whole
from lorafa.storage.tensors import write_tensors
from lorafa.storage.whole import write_json
from lorafa.surgery.combining import Combining
from toys.data import some_tensors
from toys.faults import FAULTS, FEW, check_every_fault, files_in
from toys.language_models import llama
from toys.merging import place as base_and_adapter

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the harness looks descriptors up there")
LONG = pytest.param(FAULTS, id="all faults", marks=pytest.mark.slow)
SHORT = pytest.param(FEW, id="few faults")

Save = Callable[[Path, int], Any]
"""Writes into a folder what a number decides."""


def tokens(folder: Path, number: int) -> None:
    def fill(out: Any) -> Contents:
        out.write(bytes(8 * number))
        one = np.arange(number)
        return Contents(one, one, one, {"number": number})

    write_cache(folder / "a.tokens", fill)


def metrics(folder: Path, number: int) -> None:
    if not (folder / "metrics.jsonl").exists():
        (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(5)))
    RunDirectory(folder).drop_metrics_after(4 - number)


FILES: dict[str, Save] = {
    "json": lambda folder, number: write_json(folder / "a.json", {"number": number}),
    "tensors": lambda folder, number: write_tensors(folder / "a.safetensors", {"n": torch.full((number,), 1.0)}),
    "config": lambda folder, number: LoraConfig(r=number).save_pretrained(folder),
    "card": lambda folder, number: update_card(folder, LoraConfig(r=number, base_model_name_or_path=f"m{number}")),
    "statistics": lambda folder, number: Statistics({"a": some_tensors()}, {"key": number}).save(folder / "a.st"),
    "classes": lambda folder, number: write_classes(folder, ["a"] * number),
    "tokens": tokens,
    "result of a run": lambda folder, number: RunDirectory(folder).update_result(number=number),
    "metrics of a run": metrics,
}


@pytest.mark.parametrize("faults", [SHORT, LONG])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_the_old_one_or_the_new_one(kind: str, faults: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    FILES[kind](tmp_path / "old", 1)
    check_every_fault(tmp_path / "old", lambda folder: FILES[kind](folder, 2), tmp_path, faults)


def fill(folder: Path) -> None:
    (folder / "config.json").write_text("new")
    (folder / "deep").mkdir()
    (folder / "deep" / "file").write_text("new")


def old_model(folder: Path, kind: str) -> Path:
    if kind != "nothing":
        folder.mkdir()
    if kind == "a model":
        (folder / "config.json").write_text("old")
        (folder / "other").write_text("old")
    return folder


def save_model(folder: Path) -> None:
    with folder_written_whole(folder, overwrite=True) as stage:
        fill(stage)


@pytest.mark.parametrize("faults", [SHORT, LONG])
@pytest.mark.parametrize("kind", ["nothing", "an empty folder", "a model"])
def test_a_folder_is_the_old_one_or_the_new_one(kind: str, faults: tuple[str, ...], tmp_path: Path) -> None:
    check_every_fault(old_model(tmp_path / "old", kind), save_model, tmp_path, faults)


@pytest.mark.parametrize("faults", [SHORT, LONG])
def test_without_an_exchange_in_one_step_the_old_folder_is_there_or_beside_its_place(
    faults: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renames, "exchange", lambda one, other: False)
    old = old_model(tmp_path / "old", "a model")
    save_model(tmp_path / "new")
    before, wanted = files_in(old), files_in(tmp_path / "new")

    def look(place: Path) -> None:
        beside = [files_in(path) for path in place.parent.glob(".place.*.old")]
        assert files_in(place) in (before, wanted) or (not place.exists() and beside == [before])

    check_every_fault(old, save_model, tmp_path, faults, look)


@pytest.mark.parametrize(
    ("faults", "every"),
    [pytest.param(("cut", "full"), 15, id="some"), pytest.param(FAULTS, 1, id="all", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", ["merged", "exported", "combined"])
def test_what_is_made_of_adapters_is_there_whole_or_not_at_all(
    kind: str, faults: tuple[str, ...], every: int, tmp_path: Path
) -> None:
    made = base_and_adapter(tmp_path / "made", llama, target_modules=["q_proj"])
    adapter = made.adapter

    def save(folder: Path) -> None:
        if kind == "merged":
            merge_to_folder(adapter, folder, base=made.base, overwrite=True)
        elif kind == "exported":
            export_adapter(adapter, "vllm", folder, overwrite=True)
        elif not (folder / "adapter_config.json").exists():  # nothing is ever overwritten
            combine_files([adapter], [2.0], folder, Combining())

    check_every_fault(tmp_path / "nothing", save, tmp_path, faults, every=every)
