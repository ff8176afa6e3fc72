"""Subjects side by side: what is in memory while they are measured."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from rich.console import Console

from lorafa.conf.compose import compose
from lorafa.data.records import Message, Record
from lorafa.evals import EVALS
from lorafa.runs import side_by_side
from lorafa.runs.side_by_side import Asked, Task, measured
from lorafa.runs.subjects import Named
from toys.language_models import byte_tokenizer, tiny_llama

TEXT = Record((Message("assistant", "a text to be read"),), plain=True, place="here")


@pytest.mark.parametrize("tasks", [1, 2])
def test_one_model_is_in_memory_at_a_time(tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    beside: list[int] = []

    def loaded(*_: Any) -> tuple[Any, Any]:
        gc.collect()
        beside.append(sum(one() is not None for one in made))
        model = tiny_llama().eval()
        made.append(weakref.ref(model))
        return model, byte_tokenizer()

    entry = EVALS.get("perplexity")
    assert entry.settings is not None
    asked = [Task(f"task {number}", entry, entry.settings()) for number in range(tasks)]
    monkeypatch.setattr(side_by_side, "_loaded", loaded)
    monkeypatch.setattr(side_by_side, "_items", lambda *_: {task.name: [TEXT] for task in asked})
    subjects = [Named("one"), Named("other"), Named("third")]
    found = measured(subjects, Asked(compose([]), asked, True, None, []), Console(quiet=True))
    assert beside == [0] * 2 * len(subjects)  # each is looked at first
    assert [len(scores) for scores in found.values()] == [len(subjects)] * tasks
