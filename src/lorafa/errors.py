"""Every error the library raises on purpose, and how it warns.

LoraError
  ConfigError         a setting is wrong before any work started       (also a ValueError)
  NotAvailableError   a documented feature this version does not have  (also a NotImplementedError)
  TargetError         no layer, or the wrong layer, was matched        (also a ValueError)
  AdapterError        an adapter name is unknown, taken or unusable    (also a ValueError)
  CalibrationError    statistics are missing or unusable               (also a RuntimeError)
  CheckpointError     a file does not fit the model, or is damaged     (also a RuntimeError)
  BackendError        a base layer cannot do what was asked of it      (also a TypeError)
  TrainingError       training cannot go on                            (also a RuntimeError)
    DivergedError     its loss, gradients or weights are not finite
  DataError           a dataset or a sample cannot be used             (also a ValueError)
  SourceError         a model or dataset could not be fetched          (also an OSError)
"""

from __future__ import annotations

import difflib
import heapq
import sys
import warnings
from collections.abc import Iterable
from itertools import islice
from types import FrameType

TEXT = 4000
"""Characters of an error's text, about a screen: what it shows of values and files may be of any length."""
_NOTHING_DONE = ("Nothing was loaded.", "Nothing was changed.")
"""What errors end in, and is not true of one that is only warned of."""
_LOOKED_AT, _CHOICES, _WORD = 4000, 100, 200
"""How many known words are looked at, how many are compared letter by letter, and of which length at most."""


class LoraError(Exception):
    """Base class: catch this to catch everything the library raises on purpose.

    Of a text of more than 4,000 characters the middle is left out.
    """

    def __init__(self, *values: object) -> None:
        super().__init__(*(bounded(value) if isinstance(value, str) else value for value in values))


class ConfigError(LoraError, ValueError):
    """A setting is wrong; nothing was changed."""


class NotAvailableError(LoraError, NotImplementedError):
    """The feature is documented, but this version does not have it; nothing was changed."""


class TargetError(LoraError, ValueError):
    """A pattern matches no layer, or a layer no adapter can be put on."""


class AdapterError(LoraError, ValueError):
    """An adapter name is unknown, already taken, or not usable as a name."""


class CalibrationError(LoraError, RuntimeError):
    """Statistics an initializer needs are missing or unusable."""


class CheckpointError(LoraError, RuntimeError):
    """A file does not fit the model, is damaged, or could not be written."""


class BackendError(LoraError, TypeError):
    """A base layer cannot do what was asked of it."""


class TrainingError(LoraError, RuntimeError):
    """Training cannot go on: it diverged, or gradients never arrive."""


class DivergedError(TrainingError):
    """Loss, gradients or trained weights are not finite: the learning rate is too high, not the wiring wrong."""


class DataError(LoraError, ValueError):
    """A dataset or a sample cannot be used for training or evaluation."""


class SourceError(LoraError, OSError):
    """A model or dataset could not be fetched, or is not what it should be."""


def warn(message: str) -> None:
    """A UserWarning at the caller's line: the nearest one outside of lorafa, and of torch, through which it calls."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_ours(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(bounded(message), stacklevel=level)


def refuse(error: LoraError, instead: str) -> None:
    """Raise an error that PEFT does not have; where scripts use lorafa by PEFT's name, warn of it and go on.

    Only for what leaves numbers right: that name is served by ``lorafa.compat``, whose finder says whether to warn.

    Args:
        instead: what is done after the warning, a sentence.
    """
    if not any(getattr(finder, "lenient", False) for finder in sys.meta_path):
        raise error
    said = str(error)
    for end in _NOTHING_DONE:
        said = said.removesuffix(end).rstrip()
    warn(f"{said} {instead} (PEFT does not refuse it; LORAFA_STRICT=1 makes it an error.)")


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] in ("lorafa", "torch", "contextlib")


def bounded(text: str, limit: int = TEXT) -> str:
    """The text, without its middle where it is longer than ``limit`` characters."""
    if len(text) <= limit:
        return text
    start, end = limit * 3 // 4, limit // 5
    return f"{text[:start]} ... ({len(text) - start - end} characters left out) ... {text[-end:]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest known word, or an empty string."""
    close = nearest(word, known)
    return "" if close is None else f" Did you mean {close!r}?"


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that is most like one, or None.

    Of many the hundred are compared, out of the first thousands, that have most at their start and end in common with
    it: comparing two names takes a tenth of a millisecond, and a file may bring any number.
    """
    listed = [other for other in islice(known, _LOOKED_AT) if isinstance(other, str) and len(other) <= _WORD]
    if len(word) > _WORD:
        return None
    if len(listed) > _CHOICES:
        listed = heapq.nlargest(_CHOICES, listed, key=lambda other: _in_common(word, other))
    close = difflib.get_close_matches(word, listed, n=1, cutoff=cutoff)
    return close[0] if close else None


def _in_common(one: str, other: str) -> int:
    """How many letters two words have in common at their start and at their end."""
    start = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
    end = next((at for at, (a, b) in enumerate(zip(one[::-1], other[::-1], strict=False)) if a != b), len(one))
    return start + end


def first_line(error: BaseException) -> str:
    """The first line of another library's error text without its full stop; the kind of error where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")


def shorten(items: Iterable[str], limit: int = 5) -> str:
    """Join the first ``limit`` items with commas and say how many more there are."""
    listed = list(items)
    more = f" ... and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def shape_text(shape: Iterable[int]) -> str:
    """ "8x32", or "one number" of a shape without dimensions."""
    return "x".join(map(str, shape)) or "one number"
