"""Records that somebody else has written or edited: what cannot be drawn of them is an error of the record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorafa.errors import CheckpointError, LoraError, first_line

_ODD = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


@contextmanager
def drawn_from(path: Path) -> Iterator[None]:
    """What stands in a record is drawn inside the block.

    Raises:
        CheckpointError: it holds values that no run writes; every file was readable as such.
    """
    from jinja2.exceptions import TemplateError

    try:
        yield
    except LoraError:  # some are ValueErrors too
        raise
    except (*_ODD, TemplateError) as error:
        raise CheckpointError(
            f"{path} holds what no run writes, and cannot be drawn: {type(error).__name__}, {first_line(error):.300}. "
            "Restore its files, or leave it out."
        ) from error
