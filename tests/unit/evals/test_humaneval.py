"""HumanEval: answers become programs, right ones pass, wrong ones do not and the reason is said."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from lorafa.errors import ConfigError, DataError, SourceError
from lorafa.evals import humaneval
from lorafa.evals.code_answers import program_of
from lorafa.evals.entry import Source, Subject
from lorafa.evals.humaneval import HUMANEVAL, HumanEvalSettings, scored
from lorafa.evals.shares import wilson_interval
from toys.language_models import byte_tokenizer, tiny_llama

PROMPT = (
    "from typing import List\n\n\ndef add_all(xs: List[int], by: int = 1) -> List[int]:\n"
    '    """ Add a number to all.\n    >>> add_all([1, 2], 2)\n    [3, 4]\n    """\n'
)
ROW = {
    "task_id": "Test/0",
    "prompt": PROMPT,
    "entry_point": "add_all",
    "canonical_solution": "    return [x + by for x in xs]\n",
    "test": "def check(candidate):\n    assert candidate([1, 2], 2) == [3, 4]\n    assert candidate([]) == []\n",
}
BODY = "    found = []\n    for x in xs:\n        found.append(x + by)\n    return found"
WHOLE = f"def add_all(xs: List[int], by: int = 1) -> List[int]:\n{BODY}"
CALLING = (
    "```python\ndef add_all(xs: List[int], by: int = 1) -> List[int]:\n    return [_one(x, by) for x in xs]\n```\n"
)
"""A block that needs another one."""
HELPED = (
    "import math\n\n\ndef add_all(xs: List[int], by: int = 1) -> List[int]:\n"
    "    return [_one(x, by) for x in xs]\n\n\ndef _one(x, by):\n    return x + by"
)


def runs(program: str) -> None:
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["add_all"]([1, 2], 2) == [3, 4]


@pytest.mark.parametrize(
    "answer",
    [
        BODY,
        f"{BODY}\n",
        BODY.replace("    ", "\t"),
        BODY.replace("    ", "  "),
        BODY.removeprefix("    "),
        "\n".join(line[4:] for line in BODY.splitlines()),
        "return [x + by for x in xs]",
        f"```python\n{BODY}\n```",
        f"{BODY}\n\nThis adds `by` to each number.",
        f"{BODY}\n```\nThis adds `by` to each number.",
        WHOLE,
        f"```python\n{WHOLE}\n```",
        f"```\n{WHOLE}\n```\n",
        f"```python\n{WHOLE}",
        f"{WHOLE}\n```",
        f"Here is the function:\n\n```python\n{WHOLE}\n```\n\nIt adds. Try:\n\n```python\nadd_all([1])\n```",
        f"```python\n{WHOLE}\n\nif __name__ == '__main__':\n    print(add_all(input()))\n```",
        f"Here is the function:\n\n{WHOLE}\n\nIt goes through the list, from first to last.",
        f"Sure!\n{WHOLE}\n\nExample: add_all([1], 2) -> [3]",
        HELPED,
        f"I will\nimport nothing and write it so:\n{WHOLE}\n\nfrom top to bottom.",
        f"First the helper.\n```python\ndef _one(x, by):\n    return x + by\n```\nThen:\n```python\n{WHOLE}\n```",
        f"{CALLING}with\n```python\nimport operator\n\ndef _one(x, by):\n    return operator.add(x, by)\ninput()\n```",
        f"First:\n```python\nSTEP = 1\n\ndef _one(x, by):\n    return x + by * STEP\n```\nThen:\n{CALLING}",
        f"{CALLING}Its helper:\n```python\ndef _one(x: int, by: int) -> List[int]:\n    return x + by\n```",
        f"{CALLING}```python\ndef _one(x, by):\n    return x + by\n```\n```\nfound = [_one(1\n```",
        "```python\n    return [_one(x, by) for x in xs]\n```\n```python\ndef _one(x, by):\n    return x + by\n```",
        PROMPT + BODY,
        "    " + WHOLE.replace("\n", "\n    "),
    ],
)
def test_an_answer_becomes_the_program_that_is_meant(answer: str) -> None:
    runs(program_of(answer, PROMPT, "add_all"))


@pytest.mark.parametrize("answer", ["", "I do not know.", "```python\n```", "def add_all(xs", "(" * 5000, "\x00"])
def test_an_answer_without_code_is_a_program_all_the_same_and_wrong(answer: str) -> None:
    (found,) = problems_outcomes([answer])
    assert found["correct"] is False


def test_a_function_that_cannot_be_read_is_not_taken_for_a_body() -> None:
    for answer in ("```python\ndef add_all(xs, by:\n    return xs\n```", "def add_all(xs, by) -> [xs\n"):
        (found,) = problems_outcomes([answer])
        assert found["error"].startswith("SyntaxError")


def test_helpers_that_are_asked_with_are_there_for_a_whole_function() -> None:
    prompt = "def one(x):\n    return x + 1\n\n\ndef two(x):\n    '''Twice.'''\n"
    names: dict[str, Any] = {}
    exec(program_of("```python\ndef two(x):\n    return one(one(x))\n```", prompt, "two"), names)
    assert names["two"](1) == 3


def problems(rows: list[dict[str, Any]], folder: Path) -> list[humaneval.Problem]:
    file = folder / "problems.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    found = HUMANEVAL.read(Source(str(file)), HumanEvalSettings())
    assert len(found) == len(rows)
    return found


def problems_outcomes(answers: list[str]) -> list[dict[str, Any]]:
    one = humaneval._problem("here", ROW)
    return list(scored([one] * len(answers), answers, HumanEvalSettings(timeout=3.0)).answers)


def test_the_canonical_solution_passes_and_what_is_wrong_does_not_with_its_reason(tmp_path: Path) -> None:
    answers = [
        ROW["canonical_solution"],
        "    return xs",
        "    return undefined",
        "    while True:\n        pass",
        "import sys\nsys.exit(0)",
        "    print('passed')\n    return None",
    ]
    rows = [ROW | {"task_id": f"Test/{at}"} for at in range(len(answers))]
    scores = scored(problems(rows, tmp_path), answers, HumanEvalSettings(timeout=2.0))
    assert [one["reason"] for one in scores.answers] == ["passed", "failed", "error", "timeout", "error", "failed"]
    assert [one["question"] for one in scores.answers] == [row["task_id"] for row in rows]
    numbers = scores.numbers
    assert (numbers["correct"], numbers["total"], numbers["accuracy"]) == (1, 6, pytest.approx(1 / 6))
    assert (numbers["failed"], numbers["error"], numbers["timeout"]) == (2, 2, 1)
    assert scores.measured.values == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert numbers["interval"] == wilson_interval(1, 6)
    assert "1 of 6 pass (16.7%), 2 failed, 2 error, 1 timeout" in scores.words


def test_a_model_is_asked_and_its_answers_are_run(tmp_path: Path) -> None:
    settings = HumanEvalSettings(run_code=True, max_new_tokens=4)
    subject, items = Subject(tiny_llama().eval(), byte_tokenizer()), problems([ROW], tmp_path)
    HUMANEVAL.check(subject, items, settings)
    scores = HUMANEVAL.measure(subject, items, settings, 2, lambda *_: None)
    assert (scores.numbers["total"], scores.numbers["correct"], scores.numbers["max_new_tokens"]) == (1, 0, 4)


def test_code_is_not_run_unasked(tmp_path: Path) -> None:
    subject, items = Subject(tiny_llama(), byte_tokenizer()), problems([ROW], tmp_path)
    with pytest.raises(ConfigError, match=r"runs Python code that the model writes.*eval\.run_code=true"):
        HUMANEVAL.check(subject, items, HumanEvalSettings())
    with pytest.raises(DataError, match="exceeds the model's context of 512"):
        HUMANEVAL.check(subject, items, HumanEvalSettings(run_code=True))
    with pytest.raises(ConfigError, match=r"asks nothing of a run's held-out rows.*lorafa eval <run> task=humaneval"):
        HUMANEVAL.check(subject, HUMANEVAL.asks([], HumanEvalSettings()), HumanEvalSettings())


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([{"question": "?", "answer": "1"}], r"p\.jsonl, line 1: no column 'task_id'; this row has question, answer"),
        ([ROW, {k: v for k, v in ROW.items() if k != "test"}], "line 2: no column 'test'.*Give the official form"),
        ([ROW | {"prompt": " "}], "column 'prompt' holds ' ', expected text"),
        ([], "holds no rows"),
    ],
)
def test_a_file_of_another_form_is_an_error(rows: list[dict[str, Any]], text: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=text):
        HUMANEVAL.read(Source(str(tmp_path / "p.jsonl")), HumanEvalSettings())


def test_where_the_hub_cannot_be_reached_both_ways_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any) -> Any:
        raise SourceError("it cannot be reached")

    monkeypatch.setattr("lorafa.evals.benchmark.hub_rows", unreachable)
    with pytest.raises(SourceError, match=r"openai/openai_humaneval, from the Hub.*data=HumanEval\.jsonl\.gz"):
        HUMANEVAL.read(Source(None), HumanEvalSettings())
