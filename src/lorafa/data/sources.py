"""Records by name, and what of them is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from lorafa.data import DATASETS, data_set_of
from lorafa.data.entry import DataSet, Wanted
from lorafa.data.files import ENDINGS, no_such_data_set
from lorafa.data.heldout import USUAL, check_size, with_heldout_of
from lorafa.data.records import Record, Records
from lorafa.data.rows import ANSWERS, Reading
from lorafa.data.selection import Division, Selection, as_loaded, select
from lorafa.data.shares import check_weights, names_of
from lorafa.data.source import Source, digest_of
from lorafa.errors import ConfigError, DataError, SourceError
from lorafa.settings.checks import check_keys


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is asked for: the settings of ``data`` that say which records there are."""

    names: tuple[str, ...]
    division: Division
    eval_file: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    reading: Reading = ANSWERS
    """What the rows are read for."""


def load_records(
    name: str | Sequence[str],
    *,
    train_size: int | None,
    eval_size: int | float | None,
    seed: int,
    eval_file: str | None = None,
    weights: Sequence[float] | None = None,
    **settings: Any,
) -> Records:
    """Load ``eval_size`` held-out rows and ``train_size`` training rows (None: all that are left).

    Args:
        name: a line of ``DATASETS`` (``word_problems``), a file of rows (.jsonl, .json, .csv, .tsv, .parquet), a
            folder of such files, or a Hub id ``owner/name``; several files, folders and Hub ids are mixed.
        eval_size: a number of rows, a share of them below 1, or None for 100, but at most a tenth of all rows.
        eval_file: a file of its own in any accepted form, whose rows are all held out in place of ``eval_size``.
        seed: decides which rows are held out and the order of the rest. The held-out rows do not depend on
            ``train_size``.
        weights: of several, the shares of the training rows; see :func:`lorafa.data.mixing.mixed`.
        settings: the data set's own: ``prompt_column`` and ``completion_column`` of a file or a Hub dataset, by
            default the first of ``ACCEPTED`` that is there; ``subset``, ``split`` and ``revision`` of a Hub dataset;
            ``file`` and ``revision`` of a published data set; ``templates`` and ``cache_dir`` of ``word_problems``.

    Training rows that answer what a held-out row asks, be it as an earlier turn, and those that a held-out row
    continues are left out and counted in ``Records.repeated``. ``Record.answer`` is set where the last assistant turn
    ends in ``#### N`` or "The answer is N".

    Raises:
        SourceError: the file or dataset cannot be found or fetched.
        ConfigError: a setting is given that this data set does not read, or a value is not allowed.
        DataError: a row is broken, columns are missing, or there are fewer rows than asked for.
    """
    division = Division(train_size, eval_size, seed, None if weights is None else tuple(weights))
    choice = Choice(names=names_of(name), division=division, eval_file=eval_file, settings=settings)
    return open_data(choice).selection.records()


def records_to_measure(name: str, settings: dict[str, Any]) -> list[Record]:
    """Every record of a file, a folder or a Hub data set, in its order; of a published data set those that are held
    out there, and every one of a local copy that is named (``file``).

    Args:
        settings: as those of :func:`load_records`.

    Raises:
        SourceError, ConfigError, DataError: as :func:`load_records`.
    """
    entry = _entry(name)
    check_keys(f"data={name}", settings, _own_names(entry))
    if entry.load is not None and entry.counts:
        own = None if entry.settings is None else entry.settings(**settings)
        copy = getattr(own, "file", None)
        if copy is not None and entry.read_heldout is not None and (whole := entry.read_heldout(copy)) is not None:
            return whole.heldout
        return entry.load(Wanted(name, None, None, 0), own).heldout
    return [record for _, record in _opened(name, entry, settings).records()]


@dataclass(frozen=True)
class OpenData:
    """Records that are found and not yet read, where they can be read one after another."""

    choice: Choice
    sources: tuple[Source, ...]
    """Empty where a data set loads its records by itself."""
    heldout: Source | None

    @cached_property
    def selection(self) -> Selection:
        """The records to train on and those held out. All are read for it.

        Raises:
            SourceError, DataError: as :func:`load_records`.
        """
        if self.sources:
            return select(self.sources, self.choice.division, self.heldout)
        return _loaded(self.choice)

    def count(self) -> int:
        """How many records there are, held-out ones included."""
        if not self.sources:
            return len(self.selection) + len(self.selection.heldout)
        return sum(source.count() for source in self.sources)

    def digest(self) -> str:
        """What changes where any of the chosen records does, or their order."""
        if not self.sources:
            chosen = self.selection
            held = map(repr, chosen.heldout)
            return digest_of(iter((chosen.source, str(chosen.repeated), *held, *(s.digest() for s in chosen.sources))))
        all_of_them = [*self.sources, *([] if self.heldout is None else [self.heldout])]
        contents = (text for source in all_of_them for text in (source.name, source.digest()))
        return digest_of(iter((repr(self.choice), *contents)))


def open_data(choice: Choice) -> OpenData:
    """Find what is asked for.

    Raises:
        SourceError: it cannot be found or fetched.
        ConfigError: a setting is given that this data set does not read, or a value is not allowed.
    """
    division = choice.division
    if isinstance(division.eval_size, float):
        check_size("data.eval_size", division.eval_size)
    for setting, size in (("train_size", division.train_size), ("eval_size", division.eval_size)):
        if size is not None and size < 0:
            raise DataError(f"data.{setting} counts rows, found {size}. Give 0 or more.")
    if not choice.names:
        raise ConfigError("data=[] names no records. Give a file, or several.")
    check_weights(choice.names, division.weights)
    entries = {name: _entry(name) for name in choice.names}
    if len(choice.names) == 1:
        entry = entries[choice.names[0]]
        check_keys(f"data={choice.names[0]}", choice.settings, _own_names(entry))
        if entry.open is None:
            return OpenData(choice, (), None)
    else:
        check_keys("data=[...]", choice.settings, [name for entry in entries.values() for name in _own_names(entry)])
    sources = tuple(_opened(name, entry, choice.settings).read_for(choice.reading) for name, entry in entries.items())
    heldout = None if choice.eval_file is None else _of_file(choice.eval_file, choice.settings)
    return OpenData(choice, sources, heldout and heldout.read_for(choice.reading))


def _entry(name: str) -> DataSet:
    found = data_set_of(name)
    if found is None:
        raise no_such_data_set(name)
    return found


def _opened(name: str, entry: DataSet, settings: dict[str, Any]) -> Source:
    """The records of one of several, with those of the settings that it reads."""
    if entry.open is None:
        raise ConfigError(
            f"{name} cannot be mixed with others or read as it is: its records are made by number. Give files, folders "
            "or Hub data sets."
        )
    own = {key: value for key, value in settings.items() if key in _own_names(entry)}
    return entry.open(name, None if entry.settings is None else entry.settings(**own))


def _own_names(entry: DataSet) -> list[str]:
    return [] if entry.settings is None else [one.name for one in fields(entry.settings)]


def _of_file(file: str, settings: dict[str, Any]) -> Source:
    """The rows of a file, read by the columns that the settings of another one name."""
    entry = DATASETS.get("file")
    if entry.takes is None or not entry.takes(file):
        raise SourceError(f"data.eval_file={file} is no file of rows. Give one that data= takes: {ENDINGS}.")
    return _opened(file, entry, settings)


def _loaded(choice: Choice) -> Selection:
    """The records of a data set that loads them by itself."""
    (name,), division, eval_size = choice.names, choice.division, choice.division.eval_size
    entry = _entry(name)
    assert entry.load is not None
    own = None if entry.settings is None else entry.settings(**choice.settings)
    if choice.eval_file is not None:
        whole = None if entry.counts else division.train_size  # a row that is left out has another in its place
        trained = entry.load(Wanted(name, whole, 0, division.seed), own)
        held = None if entry.read_heldout is None else entry.read_heldout(choice.eval_file)
        if held is None:
            own_rows = _of_file(choice.eval_file, choice.settings).read_for(choice.reading)
            held = select([own_rows], Division(None, 0, division.seed)).records()
        return as_loaded(with_heldout_of(trained, held, division.train_size))
    if not entry.counts and not isinstance(eval_size, int):
        if eval_size is not None:
            raise DataError(
                f"data.eval_size={eval_size} is a share of the rows, and {name} does not say how many there are. Give "
                "a number of rows."
            )
        eval_size = USUAL
    return as_loaded(entry.load(Wanted(name, division.train_size, eval_size, division.seed), own))
