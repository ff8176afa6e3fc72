"""Which rows are held out, and which of the others must not be trained on."""

from __future__ import annotations

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


def split_records(
    records: list[Record], train_size: int | None, eval_size: int | float | None, seed: int, source: str
) -> Records:
    """Hold out ``eval_size`` rows (see :func:`rows_of`), then take ``train_size`` of the others that may be trained on.

    Raises:
        DataError: there are not that many rows.
    """
    held = rows_of(eval_size, len(records))
    shuffled = Random(seed).sample(records, len(records))
    heldout = shuffled[:held]
    rest = without_heldout(shuffled[held:], heldout)
    repeated = max(len(shuffled) - held, 0) - len(rest)
    wanted = 1 if train_size is None else train_size
    if len(heldout) < held or len(rest) < wanted:
        advice = "Lower data.eval_size or data.train_size."
        if len(records) - repeated < held + wanted <= len(records):
            advice = "Remove the rows that ask the same again, or lower data.eval_size or data.train_size."
        raise DataError(
            f"{source} holds {len(records)} rows ({repeated} of them repeat a held-out question), asked for "
            f"{held} to evaluate and {wanted} to train on. {advice}"
        )
    return Records(rest[:train_size], heldout, source, repeated)


def with_heldout_of(records: Records, heldout: Records, train_size: int | None) -> Records:
    """Rows to train on, and rows of another source that are all held out.

    Raises:
        DataError: not enough of the first are left.
    """
    held = [*heldout.heldout, *heldout.train]
    rest = without_heldout(records.train, held)
    repeated, wanted = len(records.train) - len(rest), 1 if train_size is None else train_size
    if len(rest) < wanted:
        raise DataError(
            f"{records.source} holds {len(records.train)} rows ({repeated} of them repeat one of {heldout.source}), "
            f"asked for {wanted} to train on. Lower data.train_size, or check that data.eval_file is another file."
        )
    return Records(rest[:train_size], held, f"{records.source}, held out {heldout.source}", repeated)


def without_heldout(records: Iterable[Record], heldout: Sequence[Record]) -> list[Record]:
    """The rows that answer nothing a held-out row asks.

    Left out are rows in which what stands before the last answer of a held-out row is answered, at their end or as an
    earlier turn, and rows that a held-out row continues: conversations are often given turn by turn.
    """
    asked = {record.question or record.messages for record in heldout}
    continued = {part for record in heldout for part in _through_answers(record)}
    return [
        record
        for record in records
        if record.messages not in continued
        and (record.question or record.messages) not in asked
        and asked.isdisjoint(_before_answers(record))
    ]


def _before_answers(record: Record) -> list[tuple[Message, ...]]:
    """What stands before each assistant turn, whether it is trained or only read."""
    return [record.messages[:at] for at, message in enumerate(record.messages) if message.role == "assistant"]


def _through_answers(record: Record) -> list[tuple[Message, ...]]:
    return [record.messages[: at + 1] for at, message in enumerate(record.messages) if message.role == "assistant"]
