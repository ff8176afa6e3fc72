"""What users call those who answer."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Container, Sequence
from itertools import count

from lorafa.errors import ConfigError
from lorafa.runs import CONFIG
from lorafa.storage.paths import user_path

_NAME = re.compile(r"[\w.:+@-]+")
_UNFIT = re.compile(r"[^\w.:+@-]+")


def named(word: str) -> tuple[str | None, str]:
    """The name that a word gives to what it names, and the rest: ``german=runs/a`` -> ``("german", "runs/a")``.

    A path may have an equals sign itself (``runs/lr=1e-3``): what stands before the first one is a name if it has no
    slash, and the whole is no path that is there.

    Raises:
        ConfigError: there is nothing behind the sign, or the name has blanks or other signs that commands divide at.
    """
    name, sign, place = word.partition("=")
    if not sign or "/" in name or os.sep in name or os.path.lexists(user_path(word)):
        return None, word
    if not place or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{word!r} is to be name=path, with a name of letters, digits and . : + @ - _ alone. Write for example "
            "german=runs/german."
        )
    return name, place


def name_of(place: str) -> str:
    """What a run, an adapter or a model is called where no name is given: as its folder, or as on the Hub. The folder
    ``adapter`` of a run is called as the run is."""
    path = user_path(place)
    if os.path.isdir(path):
        path = path.resolve()
        if path.name in ("adapter", "model") and (path.parent / CONFIG).is_file():
            path = path.parent
    return _UNFIT.sub("-", path.name).strip("-") or "model"


def distinct(given: Sequence[tuple[str | None, str]], others: Collection[str] = ()) -> list[str]:
    """A name for each of (name or None, place), no two alike: those that are made here get a number where they have to.

    Args:
        others: names that are taken.

    Raises:
        ConfigError: a name is given twice.
    """
    said = [name for name, _ in given if name is not None]
    taken = {*said, *others}
    if len(taken) < len(said) + len({*others}):
        twice = next(name for name in said if said.count(name) > 1 or name in others)
        raise ConfigError(f"The name {twice!r} is given twice. Give each adapter a name of its own: name=path.")
    found: list[str] = []
    for name, place in given:
        found.append(_free(name_of(place), taken) if name is None else name)
        taken.add(found[-1])
    return found


def _free(name: str, taken: Container[str]) -> str:
    numbered = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return next(one for one in numbered if one not in taken)
