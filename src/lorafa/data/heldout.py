"""Which rows are held out, and which of the others must not be trained on."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from random import Random

from lorafa.data.records import Message, Record, Records
from lorafa.errors import ConfigError, DataError
from lorafa.settings.checks import check_int, check_number

USUAL = 100
"""Rows held out where nothing is said, but no more than a tenth of those there are."""


def check_size(name: str, size: int | float | None) -> None:
    """A number of rows, a share of them below 1, or None.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(size, float):
        if size >= 1:
            raise ConfigError(
                f"{name} is a number of rows or a share of them below 1, found {size!r}. Write {name}={size:.0f} for "
                f"rows, {name}=0.1 for a tenth."
            )
        check_number(name, size, "a share in (0, 1)", 0, 1)
    elif size is not None:
        check_int(name, size, at_least=0)


def rows_of(size: int | float | None, count: int) -> int:
    """A number of held-out rows, a share of the rows, or None for the usual number, as a number.

    A share is rounded to the nearest number; of two rows and more it holds out one at least, and so does None.
    """
    if isinstance(size, int):
        return size
    rows = min(USUAL, count // 10) if size is None else round(size * count)
    return rows or int(count > 1)


class Overlap:
    """What held-out rows ask: rows that answer it must not be trained on.

    These are rows in which what stands before the last answer of a held-out row is answered, at their end or as an
    earlier turn, and rows that a held-out row continues: conversations are often given turn by turn.
    """

    def __init__(self, heldout: Iterable[Record]) -> None:
        self._asked: set[tuple[Message, ...]] = set()
        self._continued: set[tuple[Message, ...]] = set()
        for record in heldout:
            self._asked.add(record.question or record.messages)
            self._continued.update(_through_answers(record))

    def __contains__(self, record: Record) -> bool:
        return bool(self._asked) and (
            record.messages in self._continued
            or (record.question or record.messages) in self._asked
            or not self._asked.isdisjoint(_before_answers(record))
        )


def without_heldout(records: Iterable[Record], heldout: Iterable[Record]) -> list[Record]:
    """The rows that answer nothing a held-out row asks (:class:`Overlap`)."""
    overlap = Overlap(heldout)
    return [record for record in records if record not in overlap]


def check_enough(source: str, count: int, repeated: int, held: int, left: int, train_size: int | None) -> None:
    """Raises DataError where ``left`` rows, of ``count`` with ``held`` to hold out, are fewer than are asked for.

    Args:
        repeated: rows that repeat a held-out question, which are not left.
    """
    wanted = 1 if train_size is None else train_size
    if count < held or left < wanted:
        advice = "Lower data.eval_size or data.train_size."
        if count - repeated < held + wanted <= count:
            advice = "Remove the rows that ask the same again, or lower data.eval_size or data.train_size."
        raise DataError(
            f"{source} holds {count} rows ({repeated} of them repeat a held-out question), asked for "
            f"{held} to evaluate and {wanted} to train on. {advice}"
        )


def check_enough_beside(
    source: str, count: int, repeated: int, heldout: str, left: int, train_size: int | None
) -> None:
    """The same where the rows of another source are held out."""
    wanted = 1 if train_size is None else train_size
    if left < wanted:
        raise DataError(
            f"{source} holds {count} rows ({repeated} of them repeat one of {heldout}), "
            f"asked for {wanted} to train on. Lower data.train_size, or check that data.eval_file is another file."
        )


def split_records(
    records: Sequence[Record], train_size: int | None, eval_size: int | float | None, seed: int, source: str
) -> Records:
    """Hold out ``eval_size`` rows (see :func:`rows_of`), then take ``train_size`` of the others that may be trained on.

    Raises:
        DataError: there are not that many rows.
    """
    held = rows_of(eval_size, len(records))
    mixed = [records[number] for number in shuffled(len(records), seed)]
    heldout = mixed[:held]
    rest = without_heldout(mixed[held:], heldout)
    repeated = max(len(records) - held, 0) - len(rest)
    check_enough(source, len(records), repeated, held, len(rest), train_size)
    return Records(rest[:train_size], heldout, source, repeated)


def with_heldout_of(records: Records, heldout: Records, train_size: int | None) -> Records:
    """Rows to train on, and rows of another source that are all held out.

    Raises:
        DataError: not enough of the first are left.
    """
    held = [*heldout.heldout, *heldout.train]
    rest = without_heldout(records.train, held)
    repeated = len(records.train) - len(rest)
    check_enough_beside(records.source, len(records.train), repeated, heldout.source, len(rest), train_size)
    return Records(rest[:train_size], held, f"{records.source}, held out {heldout.source}", repeated)


def shuffled(count: int, seed: int) -> array[int]:
    """The numbers below ``count`` in the order of ``Random(seed).sample(range(count), count)``, in 4 bytes each."""
    draw, pool = Random(seed).randrange, array("i", range(count))
    for last in range(count - 1, -1, -1):
        at = draw(last + 1)
        pool[at], pool[last] = pool[last], pool[at]
    pool.reverse()
    return pool


def _before_answers(record: Record) -> list[tuple[Message, ...]]:
    """What stands before each assistant turn, whether it is trained or only read."""
    return [record.messages[:at] for at, message in enumerate(record.messages) if message.role == "assistant"]


def _through_answers(record: Record) -> list[tuple[Message, ...]]:
    return [record.messages[: at + 1] for at, message in enumerate(record.messages) if message.role == "assistant"]
