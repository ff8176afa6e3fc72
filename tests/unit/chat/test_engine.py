"""Jobs that wait share a batch, get their own answers, and are told when something goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from lorafa.chat import engine as engines
from lorafa.chat.decoding import Answer, write
from lorafa.chat.engine import MOST_ROWS, MOST_WAITING, BusyError, Engine, Job
from lorafa.chat.options import Options
from lorafa.chat.speakers import Row
from toys.speakers import make_speakers

SPEAKERS, ALONE = make_speakers(ends=()), make_speakers(ends=())
"""The same model again: one thread alone may use a model, and that is the engine's."""


def row(name: str, new: int = 6, number: int = 0, **sampling: Any) -> Row:
    return Row(SPEAKERS.find(name), [5, 6, 7, 20 + number], new, Options(**sampling).sampling())


def alone(one: Row) -> list[int]:
    answer = Answer(ALONE, one)
    write(ALONE.model, [answer])
    return answer.ids


class Held:
    """Holds the engine's first batch until it is let go, and counts the rows of every batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go, self.batches = threading.Event(), threading.Event(), []

        def held(model: Any, answers: Any) -> None:
            answers = list(answers)
            self.batches.append(len(answers))
            self.begun.set()
            assert self.go.wait(20)
            write(model, answers)

        monkeypatch.setattr(engines, "write", held)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(SPEAKERS) as running:
        yield running


def ended(job: Job) -> list[list[int]]:
    texts = [""] * len(job.answers)
    for place, text, _ in job:
        texts[place] += text
    assert texts == [answer.text for answer in job.answers]
    return [answer.ids for answer in job.answers]


def test_jobs_that_wait_at_the_same_time_share_a_batch_and_get_their_own_answers(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    first = engine.submit([row("tiny")])
    assert held.begun.wait(20)
    rows = [[row("german", number=1), row("french", 3)], [row("german", 9, temperature=1.0, seed=4)], [row("tiny", 2)]]
    jobs = [engine.submit(each) for each in rows]
    held.go.set()
    assert [ended(job) for job in jobs] == [[alone(one) for one in each] for each in rows]
    assert ended(first) == [alone(row("tiny"))]
    assert held.batches == [1, 4]


def test_who_listens_late_hears_the_end_of_an_answer_with_its_last_piece(engine: Engine) -> None:
    job = engine.submit([row("german", 6), row("french", 4)])
    while any(answer.finish is None for answer in job.answers):
        threading.Event().wait(0.005)
    heard = list(job)
    for place, count in enumerate((6, 4)):
        own = [(text, finish) for at, text, finish in heard if at == place]
        assert "".join(text for text, _ in own) == job.answers[place].text
        assert [finish for _, finish in own] == [None] * (count - 1) + ["length"]


def test_a_batch_has_a_size_and_jobs_are_not_cut(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    jobs = [engine.submit([row("tiny", 1)])]
    assert held.begun.wait(20)
    jobs += [engine.submit([row("tiny", 1)] * count) for count in (MOST_ROWS - 1, 2, MOST_ROWS + 3)]
    held.go.set()
    for job in jobs:
        ended(job)
    assert held.batches == [1, MOST_ROWS - 1, 2, MOST_ROWS + 3]


def test_what_waits_is_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    first = engine.submit([row("tiny", 1)])
    assert held.begun.wait(20)
    waiting = engine.submit([row("tiny", 1)] * MOST_WAITING)
    with pytest.raises(BusyError, match=f"{MOST_WAITING} answers wait to be written already"):
        engine.submit([row("tiny", 1)])
    for answer in waiting.answers:
        answer.cancelled = True
    held.go.set()
    ended(first)
    assert {len(ids) for ids in ended(waiting)} == {0}
    assert {answer.finish for answer in waiting.answers} == {"cancelled"}
    assert held.batches == [1]  # those that nobody waits for are not written


def test_an_error_reaches_who_waits_and_the_next_job_is_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engines, "write", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError, match="no room"):
            ended(engine.submit([row("german")]))
    assert ended(engine.submit([row("german")])) == [alone(row("german"))]


def test_a_stopped_job_ends_and_keeps_what_was_written(engine: Engine) -> None:
    job = engine.submit([row("german", 400), row("french", 400)])
    for heard, _ in enumerate(job):
        if heard == 5:
            job.stop()
    assert {answer.finish for answer in job.answers} == {"cancelled"}
    for answer, one in zip(job.answers, ("german", "french"), strict=True):
        assert 3 <= len(answer.ids) < 400
        assert answer.ids == alone(row(one, len(answer.ids)))


def test_at_the_end_of_the_block_the_thread_is_gone_and_nobody_waits_for_ever() -> None:
    with Engine(SPEAKERS) as engine:
        job = engine.submit([row("german", 490)])
        next(iter(job))
    assert not engine._thread.is_alive()
    assert job.answers[0].finish == "cancelled"
    with pytest.raises(BusyError, match="shutting down"):
        engine.submit([row("german")])
