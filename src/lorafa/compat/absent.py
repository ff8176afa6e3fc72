"""Names of PEFT that lorafa has nothing for: scripts may import them, compare with them, and are told on use."""

from __future__ import annotations

from functools import cache
from typing import Any

from lorafa.errors import NotAvailableError


class _Untold(type):
    """A class all of whose public attributes say that there is nothing behind it."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")
        raise _not_here(cls)


class Absent(metaclass=_Untold):
    """Base class of what stands for a class or a function of PEFT without a counterpart.

    No object is an instance of it, so ``isinstance(config, PromptLearningConfig)`` is False, as it should be.
    """

    subject = ""
    """What it belongs to, in words."""

    def __init__(self, *values: object, **settings: object) -> None:
        raise _not_here(type(self))


def _not_here(cls: type) -> NotAvailableError:
    subject: str = type.__getattribute__(cls, "subject")
    return NotAvailableError(
        f"peft.{cls.__name__} belongs to {subject}, which lorafa does not have: it has LoRA and its family. Run the "
        "script with PEFT itself, without lorafa.compat, or use a LoraConfig."
    )


@cache  # one class, in whichever module it is asked for
def absent(name: str, subject: str) -> type[Absent]:
    """A class called ``name`` that raises NotAvailableError when it is made, called, or asked for an attribute."""
    return type(name, (Absent,), {"subject": subject, "__module__": "peft", "__doc__": f"Not in lorafa: {subject}."})
