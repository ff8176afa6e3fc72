"""What a program that reads adapters is to an export: which it can hold, how they are written and read back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from lorafa.errors import CheckpointError, shorten
from lorafa.export.base import BaseFacts
from lorafa.export.update import PlainAdapter, Update


class Exporter(ABC):
    """One target. An adapter it cannot hold is refused by name, before anything is written."""

    words: ClassVar[str]
    """What the program is called."""
    asks_base: ClassVar[bool] = False
    """Whether it reads the base model's config: names of tensors, heads."""
    takes_merged: ClassVar[bool] = True
    """Whether the program runs a merged model in the form transformers writes it."""

    @abstractmethod
    def refusals(self, adapter: PlainAdapter, base: BaseFacts | None) -> Iterator[str]:
        """Everything of the adapter that the program cannot hold, each with its name; nothing where it can."""

    @abstractmethod
    def write(self, adapter: PlainAdapter, folder: Path, base: BaseFacts | None) -> list[str]:
        """Write the adapter's files into an empty folder, and return what to know of them, a sentence each."""

    @abstractmethod
    def read(self, folder: Path, adapter: PlainAdapter, base: BaseFacts | None) -> list[Update]:
        """The updates as the program reads them out of what was written, on the layers of ``adapter``."""

    def beside_merged(self, folder: Path, base: BaseFacts | None) -> list[str]:
        """Write what goes with a merged model that is in the folder already, and return what to know of it."""
        return []

    def check(self, adapter: PlainAdapter, base: BaseFacts | None) -> None:
        """Raises CheckpointError with everything that the program cannot hold."""
        found = list(self.refusals(adapter, base))
        if found:
            hint = " --merged writes the whole model with the updates in its weights." if self.takes_merged else ""
            raise CheckpointError(
                f"{adapter.source} cannot be exported for {self.words}: {'; '.join(found)}. Nothing was written.{hint}"
            )


def plain_layers_only(adapter: PlainAdapter, words: str, *, tables: bool) -> Iterator[str]:
    """What programs that add s B A to linear layers alone do not hold.

    Args:
        words: the program, for the message.
        tables: whether it adds it to rows of embedding tables, too.
    """
    odd = [u for u in adapter.updates if not (u.is_linear or (u.is_table and tables))]
    for what in dict.fromkeys(update.what for update in odd):
        paths = [update.path for update in odd if update.what == what]
        yield f"{words} reads no adapters of {what}: {shorten(paths, 3)}"
    if biased := [update.path for update in adapter.updates if update.bias is not None]:
        yield f"it reads no bias of B (lora_bias): {shorten(biased, 3)}"
    if adapter.config.layer_replication:
        yield "its base has no copies of layers (layer_replication)"
    yield from _trained_beside(adapter)


def _trained_beside(adapter: PlainAdapter) -> Iterator[str]:
    keys = list(adapter.beside)
    rows = [key for key in keys if ".token_adapter." in key]
    tables = [key for key in keys if ".base_layer.weight" in key and key not in rows]
    biases = [key for key in keys if key.endswith(".bias") and adapter.config.bias != "none"]
    others = [key for key in keys if key not in {*rows, *tables, *biases}]
    if rows:
        yield f"it reads no trained rows of a table (trainable_token_indices): {shorten(rows, 3)}"
    if tables:
        yield (
            f"it reads no whole table beside an adapter on it: {shorten(tables, 3)} (with the base model at hand, "
            "--base, a table that is the base's own is left out)"
        )
    if biases:
        yield f"it reads no biases of the base (bias={adapter.config.bias!r}): {shorten(biases, 3)}"
    if others:
        yield f"it reads no modules trained as a whole (modules_to_save): {shorten(others, 3)}"


def in_order(read: Sequence[Update], adapter: PlainAdapter) -> list[Update]:
    """What was read, in the order of the adapter's updates.

    Raises:
        CheckpointError: a layer is missing, or one too many is there.
    """
    by_path = {update.path: update for update in read}
    if by_path.keys() != {update.path for update in adapter.updates}:
        odd = sorted(by_path.keys() ^ {update.path for update in adapter.updates})
        raise CheckpointError(f"What was written does not have the adapter's layers: {shorten(odd, 3)}.")
    return [by_path[update.path] for update in adapter.updates]
