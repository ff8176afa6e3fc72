"""Commands of the documents as runs of seconds."""

from __future__ import annotations

import re
from pathlib import Path

TINY = {
    "model": "path/to/model", "data": "mine.jsonl", "data.eval_size": "4", "eval.max_new_tokens": "4",
    "train.steps": "2", "train.batch_size": "4",
}  # fmt: skip
"""What a run of seconds needs, where the command does not say otherwise."""


def tiny(words: tuple[str, ...], run: Path) -> list[str]:
    """The words of a training behind `lorafa`, with what makes it short."""
    given = {word.lstrip("+").partition("=")[0] for word in words}
    if {"model=minilm-l6", "model.kind=classification"} & {*words}:
        given |= {"eval.max_new_tokens"}  # a classifier writes no answer
    if "objective=reward" in words:
        given |= {"eval.max_new_tokens"}  # nor does a model that scores them
    if "objective=grpo" in words:
        words = (*words, "objective.max_completion_length=8")
    said = given | ({"train.steps"} if "train=epoch" in words or "train.epochs" in given else set())
    phases: list[str] = []
    if "align.schedule=cyclic" in words:  # the shortest training that has room for one of the teacher
        said, phases = said | {"train.steps"}, ["train.steps=3"]
        words = tuple(re.sub(r"^(align\.(task|teacher)_steps)=.*", r"\1=1", word) for word in words)
    more = [f"{key}={value}" for key, value in TINY.items() if key not in said]
    return [*words[1:], *more, *phases, f"run_dir={run}"]
