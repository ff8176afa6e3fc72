"""HumanEval (Chen et al. 2021, arXiv:2107.03374): functions written to their docstrings, and run against tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lorafa.data.cells import Row, text_of
from lorafa.data.chat import encode_prompts
from lorafa.data.records import Message, Record
from lorafa.errors import ConfigError, warn
from lorafa.evals.benchmark import Official, asks_nothing, refuse_heldout, require_columns
from lorafa.evals.by_length import Progress
from lorafa.evals.code_answers import program_of
from lorafa.evals.entry import Evaluation, Measured, Scores, Source, Subject
from lorafa.evals.generation import check_prompts, generate_greedy
from lorafa.evals.sandbox import Limits, Outcome, require_system, run_all
from lorafa.evals.shares import in_words, share
from lorafa.processes import by_turns
from lorafa.settings.checks import check_int, check_number

OFFICIAL = Official("the problems of HumanEval", "openai/openai_humaneval", None, "test", "a copy of the official file")
COLUMNS = ("task_id", "prompt", "entry_point", "test")
ASKS = (
    "Complete the Python function below. Answer with the whole function and nothing else: no explanation, no tests. "
    "Indent by four blanks."
)
REASONS = ("failed", "error", "timeout")
"""Why an answer is wrong: a test did not hold, something else was raised, or it was still running."""
RUN_TOGETHER = 16
"""Programs between two signs of progress."""


@dataclass(frozen=True, kw_only=True)
class HumanEvalSettings:
    """How functions are asked for and run."""

    size: int | None = None
    """Problems asked, at most; null all of them."""
    max_new_tokens: int = 512
    """Longest answer, in tokens."""
    run_code: bool = False
    """Run the code that the model writes. It is run with limits and without a network, but nobody has read it."""
    timeout: float = 5.0
    """Seconds that a function and its tests may take."""

    def __post_init__(self) -> None:
        if self.size is not None:
            check_int("eval.size", self.size, at_least=1)
        check_int("eval.max_new_tokens", self.max_new_tokens, at_least=1)
        check_number("eval.timeout", self.timeout, "a number of seconds > 0", 0)


@dataclass(frozen=True)
class Problem:
    """A function to be written."""

    task_id: str
    prompt: str
    """Imports, signature and docstring."""
    entry_point: str
    """Name of the function."""
    test: str
    """Defines ``check(candidate)``, whose assertions hold."""
    solution: str
    """A body that is right; empty where the file gives none."""

    def record(self) -> Record:
        """What is asked, as a conversation."""
        asked = f"{ASKS}\n\n```python\n{self.prompt.rstrip()}\n```"
        return Record((Message("user", asked), Message("assistant", self.solution)), place=self.task_id)

    def program(self, answer: str) -> str:
        """The answer's code with the tests behind it."""
        code = program_of(answer, self.prompt, self.entry_point)
        return f"{code}\n\n{self.test}\n\ncheck({self.entry_point})\n"


def _problem(place: str, row: Row) -> Problem:
    texts = {column: text_of(row, place, column) for column in COLUMNS}
    return Problem(**texts, solution=str(row.get("canonical_solution") or ""))


def _read(source: Source, settings: HumanEvalSettings) -> list[Problem]:
    rows = OFFICIAL.rows(source.name, "data=HumanEval.jsonl.gz")
    require_columns(rows, COLUMNS, f"the official form: {', '.join(COLUMNS)}")
    return [_problem(place, row) for place, row in rows[: settings.size]]


def _check(subject: Subject, problems: Sequence[Problem], settings: HumanEvalSettings) -> None:
    if not problems:
        refuse_heldout("humaneval")
    if not settings.run_code:
        raise ConfigError(
            "task=humaneval runs Python code that the model writes and that nobody has read: in a process of its own "
            "with limits on time, memory, files and processes and without a network, which stops mistakes and not "
            "every attack. If that is meant, give eval.run_code=true."
        )
    require_system()
    check_prompts(subject.model, _prompts(subject, problems), settings.max_new_tokens)


def _prompts(subject: Subject, problems: Sequence[Problem]) -> list[list[int]]:
    return encode_prompts([problem.record() for problem in problems], subject.tokenizer)


def _measure(
    subject: Subject, problems: Sequence[Problem], settings: HumanEvalSettings, batch_size: int, progress: Progress
) -> Scores:
    written = generate_greedy(
        subject.model,
        subject.tokenizer,
        _prompts(subject, problems),
        batch_size=batch_size,
        max_new_tokens=settings.max_new_tokens,
        ends=subject.ends,
        progress=progress,
    )
    outputs = [subject.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    cut = sum(len(ids) >= settings.max_new_tokens for ids in written)
    return scored(problems, outputs, settings, cut)


def scored(problems: Sequence[Problem], outputs: Sequence[str], settings: HumanEvalSettings, cut: int = 0) -> Scores:
    """pass@1 of one answer a problem; every answer is run.

    Args:
        cut: answers that were still going on when their length was reached.
    """
    programs = [problem.program(output) for problem, output in zip(problems, outputs, strict=True)]
    limits = Limits(seconds=settings.timeout)
    parts = [programs[first : first + RUN_TOGETHER] for first in range(0, len(programs), RUN_TOGETHER)]
    outcomes = [one for part in by_turns(lambda some: run_all(some, limits), parts) for one in part]
    _say_how(outcomes)
    right = [one.reason == "passed" for one in outcomes]
    reasons = Counter(one.reason for one in outcomes)
    answers = [
        {
            "question": problem.task_id, "gold": problem.solution, "output": output, "correct": passed,
            "reason": one.reason, "error": one.text,
        }
        for problem, output, passed, one in zip(problems, outputs, right, outcomes, strict=True)
    ]  # fmt: skip
    numbers = {
        **share(right),
        **{reason: reasons[reason] for reason in REASONS},
        "cut": cut,
        "max_new_tokens": settings.max_new_tokens,
    }
    words = in_words(right, "pass")
    words += "".join(f", {reasons[reason]} {reason}" for reason in REASONS if reasons[reason])
    if cut:
        words += f", {cut} answers cut at {settings.max_new_tokens} tokens"
    return Scores(words, numbers, answers, Measured("pass@1", list(map(float, right))))


def _say_how(outcomes: Sequence[Outcome]) -> None:
    if not all(one.apart for one in outcomes):
        warn(
            "This system gives a process no network and process namespaces of its own, so the programs were kept from "
            "sockets and from other processes by their interpreter alone."
        )


HUMANEVAL = Evaluation(
    asks=asks_nothing, of_run=False, check=_check, measure=_measure, read=_read, settings=HumanEvalSettings
)  # fmt: skip
"""Python functions written to their docstrings and run against tests: pass@1."""
