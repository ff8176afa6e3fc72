"""Records by name, what of them is held out, and the rows of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lorafa.data import DATASETS, data_set_names, data_set_of
from lorafa.data.entry import Wanted
from lorafa.data.heldout import USUAL, check_size, split_records, with_heldout_of
from lorafa.data.records import Records
from lorafa.data.rows import ACCEPTED, Row, converter, parsed
from lorafa.errors import DataError, SourceError, did_you_mean
from lorafa.settings.checks import check_keys


def load_records(
    name: str,
    *,
    train_size: int | None,
    eval_size: int | float | None,
    seed: int,
    eval_file: str | None = None,
    **settings: Any,
) -> Records:
    """Load ``eval_size`` held-out rows and ``train_size`` training rows (None: all that are left).

    Args:
        name: a line of ``DATASETS`` (``word_problems``), a path ending in .jsonl or .json (one object a row), or a Hub
            id ``owner/name``.
        eval_size: a number of rows, a share of them below 1, or None for 100, but at most a tenth of all rows.
        eval_file: a file of its own in any accepted form, whose rows are all held out in place of ``eval_size``.
        seed: decides which rows are held out and the order of the rest. The held-out rows do not depend on
            ``train_size``.
        settings: the data set's own: ``prompt_column`` and ``completion_column`` of a file or a Hub dataset, by
            default the first of ``ACCEPTED`` that is there; ``subset``, ``split`` and ``revision`` of a Hub dataset;
            ``templates`` and ``cache_dir`` of ``word_problems``.

    Training rows that answer what a held-out row asks, be it as an earlier turn, and those that a held-out row
    continues are left out and counted in ``Records.repeated``. ``Record.answer`` is set where the last assistant turn
    ends in ``#### N`` or "The answer is N".

    Raises:
        SourceError: the file or dataset cannot be found or fetched.
        ConfigError: a setting is given that this data set does not read, or a value is not allowed.
        DataError: a row is broken, columns are missing, or there are fewer rows than asked for.
    """
    if isinstance(eval_size, float):
        check_size("data.eval_size", eval_size)
    for setting, size in (("train_size", train_size), ("eval_size", eval_size)):
        if size is not None and size < 0:
            raise DataError(f"data.{setting} counts rows, found {size}. Give 0 or more.")
    data_set = data_set_of(name)
    if data_set is None:
        raise no_such_data_set(name)
    kind = data_set.settings
    check_keys(f"data={name}", settings, [] if kind is None else [field.name for field in fields(kind)])
    own = None if kind is None else kind(**settings)
    if eval_file is not None:
        whole = train_size if data_set.takes is None else None  # a row that is left out has another in its place
        trained = data_set.load(Wanted(name, whole, 0, seed), own)
        return with_heldout_of(trained, _all_of(eval_file, seed, own), train_size)
    if not data_set.counts and not isinstance(eval_size, int):
        if eval_size is not None:
            raise DataError(
                f"data.eval_size={eval_size} is a share of the rows, and {name} does not say how many there are. Give "
                "a number of rows."
            )
        eval_size = USUAL
    return data_set.load(Wanted(name, train_size, eval_size, seed), own)


def _all_of(file: str, seed: int, own: Any) -> Records:
    """The rows of a file, read by the columns that the settings of another one name."""
    source = DATASETS.get("file")
    if source.takes is None or not source.takes(file):
        raise SourceError(f"data.eval_file={file} is no file of rows. Give one that data= takes: .jsonl or .json.")
    kind = source.settings
    columns = {} if kind is None else {one.name: getattr(own, one.name, one.default) for one in fields(kind)}
    return source.load(Wanted(file, None, 0, seed), None if kind is None else kind(**columns))


def no_such_data_set(name: str) -> SourceError:
    """The error for a name that is none."""
    known = data_set_names()
    return SourceError(
        f"No dataset {name!r}{_what_it_is(Path(name).expanduser())}.{did_you_mean(name, known)} Give "
        f"{', '.join(known)}, a file ending in .jsonl or .json, or a Hub id of the form owner/name."
    )


def records_of(
    rows: Sequence[tuple[str, Row]], wanted: Wanted, prompt_column: str | None, completion_column: str | None
) -> Records:
    """Rows, each with where it stands, as records, some of them held out.

    Raises:
        DataError: there are none, or fewer than wanted; columns are missing; a row is broken.
    """
    if not rows:
        raise DataError(
            f"{wanted.name} holds no rows. Each row is a JSON object with one of these sets of columns: {ACCEPTED}."
        )
    convert = converter(wanted.name, rows[0][1], prompt_column, completion_column)
    records = [convert(row, place) for place, row in rows]
    return split_records(records, wanted.train_size, wanted.eval_size, wanted.seed, wanted.name)


def read_rows(path: Path) -> list[tuple[str, Row]]:
    """Read a .jsonl file (an object a line) or a .json file (a list of objects) as (where, row) pairs.

    Raises:
        SourceError: no such file.
        DataError: the file is not UTF-8; a line is not JSON, or not an object.
    """
    if not path.is_file():
        near = [p.name for p in path.parent.iterdir() if p.name != path.name] if path.parent.is_dir() else []
        raise SourceError(
            f"No file {str(path)!r}{_what_it_is(path)}.{did_you_mean(path.name, near)} Check data=, it is a path to a "
            "file."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start + 1}. Convert it to UTF-8."
        ) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error
    if path.suffix.lower() == ".json":
        advice = "If it holds one object a line, name it .jsonl; else mend it."
        whole = parsed(text, str(path), advice)
        if not isinstance(whole, list):
            raise DataError(f"{path} holds one {type(whole).__name__}, expected a list of objects, one a row. {advice}")
        values = [(f"{path}, row {number}", value) for number, value in enumerate(whole, 1)]
    else:
        one_list = "It starts like one list of all rows: name the file .json." if text.lstrip().startswith("[") else ""
        # Not str.splitlines: JSON strings may hold U+2028 and its like unescaped.
        lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1)]
        advice = one_list or "Mend or delete it; nothing was loaded."
        values = [(place, parsed(line, place, advice)) for place, line in lines if line.strip()]
    for place, value in values:
        if not isinstance(value, dict):
            raise DataError(
                f'{place}: found a {type(value).__name__}, expected an object such as {{"prompt": ...}}. {advice}'
            )
    return values


def _what_it_is(path: Path) -> str:
    """Why a path that is there is no file of rows."""
    if path.is_dir():
        return ": it is a folder"
    if path.is_symlink() and not path.exists():
        return ": it is a link to nothing"
    return ": a file of another kind" if path.exists() else ""
