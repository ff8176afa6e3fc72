"""The settings of the records of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from lorafa.data import DATASETS, data_set_names, data_set_of
from lorafa.data.heldout import check_size
from lorafa.data.shares import check_weights, names_of
from lorafa.errors import ConfigError
from lorafa.registry import Registry
from lorafa.settings.checks import check_int
from lorafa.settings.declared import declared
from lorafa.settings.groups import OpenGroup
from lorafa.settings.typed import Key


@dataclass(frozen=True, kw_only=True)
class DataConfig(OpenGroup):
    """The records to learn from and the ones held out."""

    group: ClassVar[str] = "data"
    opens: ClassVar[Mapping[str, str]] = {"name": "own"}
    lines: ClassVar[Mapping[str, Registry[Any]]] = {"name": DATASETS}
    any_name: ClassVar[str] = "a file, a folder, a Hub id, [several,of,them]"
    """What may stand after ``data=`` beside the names of ``DATASETS``."""
    several: ClassVar[bool] = True
    """Whether a list of names may stand there."""

    name: str | list[str] = "word_problems"
    """Task: one known by name, a file (.jsonl, .json, .csv, .tsv, .parquet), a folder of such files, a Hub data set id,
    or a list of files, folders and ids, which are mixed."""
    weights: list[float] | None = None
    """Shares of the training rows, [3,1] for example, of the sources that data= lists; null takes all rows of all."""
    train_size: int | None = None
    """Records to train on; null takes all that are left after the held-out ones."""
    eval_size: int | float | None = None
    """Records held out for evaluation, never trained on: how many, a share of them below 1, or 0. null is 100, but at
    most a tenth of the records there are; of a published data set all that its authors hold out."""
    eval_file: str | None = None
    """File in any form that data= takes, whose records are all held out, in place of eval_size."""
    max_length: int = 1024
    """Longest sample in tokens; what happens to a longer one is counted and printed."""
    template: str | None = None
    """Chat template: known by name (chatml, plain ...) or a file with one in Jinja; null takes the tokenizer's own."""
    seed: int = 0
    """Seed of the generated or shuffled records: decides which are held out."""
    cache: bool | None = None
    """Keep the tokens in the user's cache, for the next start with the same records; null keeps those of 10,000 records
    and more."""
    own: Any = None
    """The data set's own settings."""

    @classmethod
    def settings_of(cls, field: str, chosen: Any) -> type[Any] | None:
        """The settings of the data set that is chosen; of several, those of the one that has the most.

        A Hub data set reads all that a file does. A name that no data set takes has the settings of a file: what is
        wrong with it is said where it is loaded.
        """
        kinds = [(data_set_of(name) or DATASETS.get("file")).settings for name in names_of(chosen)]
        found = [kind for kind in kinds if kind is not None]
        return max(found, key=lambda kind: len(fields(kind)), default=None)

    @classmethod
    def entries(cls, field: str) -> list[str]:
        return data_set_names()

    @classmethod
    def own_keys(cls, field: str) -> dict[str, list[Key]]:
        """Sources of many data sets are named by what they are: ``data=<hub>``."""
        named = {name: f"<{name}>" if DATASETS.get(name).takes else name for name in DATASETS.names()}
        return {cls.words(field, named[name]): declared(DATASETS, name).settings for name in DATASETS.names()}

    def __post_init__(self) -> None:
        super().__post_init__()
        names = names_of(self.name)
        if not names:
            raise ConfigError("data=[] names no records. Give a file, or several.")
        check_weights(names, self.weights)
        if self.train_size is not None:
            check_int("data.train_size", self.train_size, at_least=1)
        check_size("data.eval_size", self.eval_size)
        if self.eval_file is not None and self.eval_size is not None:
            raise ConfigError(
                f"All records of data.eval_file={self.eval_file} are held out, found data.eval_size={self.eval_size} "
                "as well. Leave one of the two out."
            )
        check_int("data.max_length", self.max_length, at_least=2)
        check_int("data.seed", self.seed, at_least=0)
