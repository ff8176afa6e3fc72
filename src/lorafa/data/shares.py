"""What is asked of several sources: their names, and the share of each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import permutations

from lorafa.errors import ConfigError
from lorafa.settings.checks import repeated
from lorafa.storage.paths import user_path

MOST = 1e100
"""The largest weight: products with numbers of rows stay finite."""


def names_of(name: str | Sequence[str]) -> tuple[str, ...]:
    """The sources, one or several."""
    return (name,) if isinstance(name, str) else tuple(name)


def apportioned(total: int, counts: Sequence[int]) -> list[int]:
    """``total`` rows shared out among sources in proportion to how many they have, by largest remainders."""
    whole = max(sum(counts), 1)
    shares = [total * count // whole for count in counts]
    rest = sorted(range(len(counts)), key=lambda at: (-(total * counts[at] % whole), at))
    for at in rest[: total - sum(shares)]:
        shares[at] += 1
    return shares


def check_weights(names: Sequence[str], weights: Sequence[float] | None) -> None:
    """Raises ConfigError for sources that are named twice, be it in two ways, and for weights that are not one number
    > 0 for each."""
    if twice := repeated(names):
        raise ConfigError(
            f"data= names {twice[0]!r} twice. Name it once; data.weights with data.train_size repeats its rows."
        )
    for one, other in permutations(names, 2):
        place, folder = user_path(one), user_path(other)
        if os.path.exists(place) and folder.resolve() in (place.resolve(), place.resolve().parent):
            raise ConfigError(
                f"data= names {one!r}, which {other!r} {'is' if os.path.samefile(place, folder) else 'holds'} as well. "
                "Name it once; data.weights with data.train_size repeats its rows."
            )
    if weights is None:
        return
    if len(names) < 2:
        raise ConfigError("data.weights are shares of several sources. Give data=[a.jsonl,b.jsonl], or leave it out.")
    if len(weights) != len(names) or not all(0 < weight < float("inf") for weight in weights):
        raise ConfigError(
            f"data.weights is a number above 0 for each of the {len(names)} sources, found {list(weights)}. Give "
            f"data.weights=[{','.join('1' * len(names))}] for equal shares."
        )
    if max(weights) > MOST:
        raise ConfigError(f"data.weights goes up to {MOST:g}, found {max(weights):g}. Give shares such as [3,1].")
