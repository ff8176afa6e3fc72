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
import sys
import warnings
from collections.abc import Iterable
from types import FrameType


class LoraError(Exception):
    """Base class: catch this to catch everything the library raises on purpose."""


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
    warnings.warn(message, stacklevel=level)


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] in ("lorafa", "torch", "contextlib")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


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
