"""One thread that runs the model, and those who wait for its answers."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from queue import SimpleQueue

from lorafa.chat.decoding import Answer, Finish, write
from lorafa.chat.speakers import Row, Speakers
from lorafa.errors import LoraError

MOST_ROWS = 32
"""Rows that are answered together; a job that has more of its own is not cut."""
MOST_WAITING = 256
"""Rows that may wait for their turn."""


class BusyError(LoraError):
    """More is waiting than will be answered soon."""


class Job:
    """Rows that are answered together, and what is heard of them."""

    def __init__(self, speakers: Speakers, rows: Sequence[Row]) -> None:
        self.answers = [Answer(speakers, row, partial(self._hear, place)) for place, row in enumerate(rows)]
        self._heard: SimpleQueue[tuple[int, str, Finish | None] | BaseException] = SimpleQueue()

    def __iter__(self) -> Iterator[tuple[int, str, Finish | None]]:
        """(number of the answer, new text, why it is over with that), as the answers are written, until all have ended.

        The text may be empty. The answers themselves may be further than what was heard of them.

        Raises:
            What went wrong in the thread that runs the model.
        """
        ended: set[int] = set()
        while len(ended) < len(self.answers):
            heard = self._heard.get()
            if isinstance(heard, BaseException):
                raise heard
            if heard[2] is not None:
                ended.add(heard[0])
            yield heard

    def stop(self) -> None:
        """Let the answers end with their next token, or when their turn comes."""
        for answer in self.answers:
            answer.cancelled = True

    def fail(self, error: BaseException) -> None:
        """Tell who listens that nothing more comes."""
        self._heard.put(error)

    def _hear(self, place: int, text: str, finish: Finish | None) -> None:
        self._heard.put((place, text, finish))


class Engine:
    """Answers jobs in the order in which they come. Those that wait at the same time share a batch, whoever asks and
    however their tokens are drawn; one that comes while a batch runs waits for its end.

    Use it as a with-block: at its end the thread is gone, and what was being written is cut off.
    """

    def __init__(self, speakers: Speakers) -> None:
        self.speakers = speakers
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="lorafa-chat", daemon=True)

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            for job in (*self._running, *self._waiting):
                job.stop()
            self._changed.notify()
        self._thread.join()

    def submit(self, rows: Sequence[Row]) -> Job:
        """Have rows answered in one batch.

        Raises:
            BusyError: too many rows wait already, or the engine was closed.
        """
        job = Job(self.speakers, rows)
        with self._changed:
            waiting = sum(len(other.answers) for other in self._waiting)
            if self._closed or (waiting and waiting + len(rows) > MOST_WAITING):
                why = "It is shutting down" if self._closed else f"{waiting} answers wait to be written already"
                raise BusyError(f"{why}. Ask again later.")
            self._waiting.append(job)
            self._changed.notify()
        return job

    def _work(self) -> None:
        while jobs := self._next():
            answers = [answer for job in jobs for answer in job.answers]
            for answer in answers:
                if answer.cancelled:
                    answer.cancel()
            try:
                if begun := [answer for answer in answers if answer.finish is None]:
                    write(self.speakers.model, begun)
            except BaseException as error:
                for job in jobs:
                    job.fail(error)

    def _next(self) -> list[Job]:
        """The jobs of the next batch, when there are some; none when the engine was closed."""
        with self._changed:
            self._running = []
            self._changed.wait_for(lambda: self._waiting or self._closed)
            rows = 0
            while self._waiting and (not rows or rows + len(self._waiting[0].answers) <= MOST_ROWS):
                self._running.append(self._waiting.popleft())
                rows += len(self._running[-1].answers)
            return self._running
