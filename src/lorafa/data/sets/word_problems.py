"""Grade-school word problems as a data set of the runner; :mod:`lorafa.data.sets.problems` makes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorafa.data.entry import DataSet, Wanted
from lorafa.data.records import Records
from lorafa.data.sets.problems import load_word_problems
from lorafa.errors import DataError
from lorafa.settings.checks import check_int


@dataclass(frozen=True, kw_only=True)
class WordProblemsSettings:
    """Which problems are made."""

    templates: int | None = None
    """Kinds of problems to use, those with the shortest text; null uses all."""
    cache_dir: str | None = None
    """Folder for what the problems are made from; null takes the user's cache."""

    def __post_init__(self) -> None:
        if self.templates is not None:
            check_int("templates", self.templates, at_least=1)


def _load(wanted: Wanted, settings: WordProblemsSettings) -> Records:
    if wanted.train_size is None:
        raise DataError(f"{wanted.name} are generated without limit. Set data.train_size.")
    return load_word_problems(
        train_size=wanted.train_size,
        eval_size=wanted.eval_size,
        seed=wanted.seed,
        templates=settings.templates,
        cache_dir=Path(settings.cache_dir) if settings.cache_dir else None,
    )


WORD_PROBLEMS = DataSet(load=_load, settings=WordProblemsSettings)
