"""What the system refuses, as the libraries below say it.

A full disk is an OSError in Python; safetensors and tokenizers, which are written in Rust, and torch raise errors of
their own, whose texts say the same.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from lorafa.errors import first_line

_CODE = re.compile(r"\(os error (\d{1,5})\)")
_OF_TORCH = ("inline_container", "PytorchStreamWriter")
"""Names in what torch raises where its file cannot be written."""


def refusal(error: BaseException) -> OSError | None:
    """The error of the system that a library's error tells of; None where it tells of none."""
    if isinstance(error, OSError):
        return error
    if code := _CODE.search(str(error)):
        return OSError(int(code[1]), os.strerror(int(code[1])))
    if isinstance(error, RuntimeError) and any(mark in str(error) for mark in _OF_TORCH):
        return OSError(errno.EIO, first_line(error))
    return None


@contextmanager
def as_os_error() -> Iterator[None]:
    """What the system refuses inside the block is an OSError, whichever library was told."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if (refused := refusal(error)) is None:
            raise
        raise refused from error
