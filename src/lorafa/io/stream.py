"""Merge adapters into a base model file by file: the model is never in memory, one layer of it is.

The base is a :class:`~lorafa.io.skeleton.Skeleton`, on which the adapters are put as on any model, so every formula,
back end and check is the one that merging in memory has. What would be written is known, name by name, before the first
byte is; the folder takes its place when all of it is on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorafa.config import LoraConfig
from lorafa.errors import ConfigError, shorten, warn
from lorafa.io.adapter_files import read_adapter
from lorafa.io.attached import Attached, attached
from lorafa.io.find import require_once
from lorafa.io.output import Output
from lorafa.models.carried import CONFIG, carried, carry, fetch_beside, fetched, read_config, with_settings
from lorafa.settings.checks import check_arguments
from lorafa.storage.folders import folder_written_whole, require_apart, require_free
from lorafa.storage.hub import HubOptions
from lorafa.storage.model_writer import ModelWriter
from lorafa.storage.paths import user_path
from lorafa.storage.whole import write_json

if TYPE_CHECKING:
    from typing_extensions import Unpack

Progress = Callable[[int, int], None]
"""(bytes written, bytes to be written)."""
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class MergedFiles:
    """What :func:`merge_to_folder` has written."""

    folder: Path
    base: str
    """The base model, as it was found: a folder or a Hub id."""
    files: int
    """Files of weights."""
    nbytes: int
    """Bytes of weights."""
    changed: int
    """Tensors that are not those of the base."""
    untied: bool
    """Whether head and embedding, which the base ties, have weights of their own now."""


def merge_to_folder(
    adapter: str | Path | Sequence[str | Path],
    folder: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    ignore_base_mismatch: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **hub: Unpack[HubOptions],
) -> MergedFiles:
    """Write the folder of a model into whose weights adapters are folded, without loading the model.

    Every adapted weight is read, gets the update in float32 and is rounded once; all other tensors are copied byte for
    byte. The result is, bit for bit, what ``merge_and_unload`` and ``save_pretrained`` give. Memory: one layer with its
    update, and the adapters. Config, generation config, tokenizer and chat template are carried along; where a
    tokenizer lies beside an adapter, that one.

    Args:
        adapter: folder or Hub id; of several the updates are summed, as ``merge_adapter`` does.
        folder: where to; it is made.
        base: folder or Hub id of the base model, in safetensors; default: the one that the adapter's config names.
        dtype: of floating-point weights in the folder, a ``torch.dtype`` or its name; None: each as it is in the base.
            The sum is rounded to it once, from float32.
        max_shard_size: split the weights anew, into files of so many bytes ("5GB"); None: the files of the base.
        overwrite: replace a folder that is there, if it is that of a model.
        ignore_base_mismatch: merge even if the base is not the one the adapter was made for.
        trust_remote_code: run code that comes with the base; without it one that needs such code is refused.
        progress: told how far it is.
        hub: as :class:`~lorafa.storage.hub.HubOptions`, for the base as well, but for ``revision``: that of the
            adapter; the base's is in the adapter's config.

    Raises:
        SourceError: adapter or base cannot be found, fetched or read.
        CheckpointError: a file is damaged or cut off, the adapter does not fit the base, or the folder cannot be
            written; nothing is left of it.
        AdapterError: a merged weight would not be finite, or two adapters want one place; nothing is left.
        BackendError: the adapter's update is no matrix, or the base is quantized; nothing was written.
        ConfigError: an argument is wrong, or the folder is not to be replaced.
    """
    check_arguments("merge_to_folder", hub, HubOptions.__optional_keys__)
    names = one_or_more("merge_to_folder", adapter)
    wanted, most, out = _dtype(dtype), _bytes(max_shard_size), user_path(folder)
    require_free(out, overwrite=overwrite)
    stored = [read_adapter(name, **hub) for name in names]
    require_once([one.path for one in stored])
    for name in names:
        fetch_beside(name, hub)
    named, place = base_of(base, [one.config for one in stored], hub)
    folders = [one.path.parent for one in stored]
    require_apart(out, {"the base model": [place], "an adapter": folders})
    on_base = attached(
        stored, place, wanted, ignore_base_mismatch=ignore_base_mismatch, trust_remote_code=trust_remote_code
    )
    del stored  # the tensors of the files: the adapters have their own by now
    output = Output(on_base, wanted, most)
    return _write(out, named, place, folders, on_base, output, overwrite=overwrite, progress=progress)


def _write(
    out: Path,
    named: str,
    place: Path,
    adapters: Sequence[Path],
    on_base: Attached,
    output: Output,
    *,
    overwrite: bool,
    progress: Progress | None,
) -> MergedFiles:
    total, done = output.nbytes, 0

    def said(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    with folder_written_whole(out, overwrite=overwrite) as temporary:
        with ModelWriter(temporary, output.files, said) as writer:
            output.write(writer)
        write_json(temporary / CONFIG, with_settings(read_config(place), output.settings))
        carry(carried(place, adapters), temporary)
    if output.untied:
        warn(
            "After merging, the output head and the input embedding hold different weights, so "
            "config.tie_word_embeddings was set to False: the folder holds both."
        )
    if output.dropped:
        warn(
            f"{len(output.dropped)} tensors of the base have no place in a {type(on_base.skeleton.model).__name__} and "
            f"were left out: {shorten(output.dropped, 3)}."
        )
    return MergedFiles(out, named, len(output.files), total, output.changed, output.untied)


def _dtype(given: str | torch.dtype | None) -> torch.dtype | None:
    from lorafa.models.load import DTYPES  # which brings rich

    if given is None or given == "auto":
        return None
    found = DTYPES.get(given.removeprefix("torch.")) if isinstance(given, str) else given
    if found not in DTYPES.values():
        raise ConfigError(f"dtype is one of {', '.join(DTYPES)} or None, found {given!r}.")
    return found


def _bytes(given: int | str | None) -> int | None:
    """Bytes of "5GB" (10^9) or "5GiB" (2^30)."""
    if given is None:
        return None
    number: float | int | str = given
    if isinstance(given, str):
        text = given.strip().upper()
        unit = next((unit for unit in _UNITS if text.endswith(unit)), "")
        try:
            number = float(text.removesuffix(unit)) * _UNITS.get(unit, 1)
        except ValueError:
            number = -1
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 1 <= number < 2**63:
        raise ConfigError(f"max_shard_size is a number of bytes such as '5GB', found {given!r}.")
    return int(number)


def one_or_more(method: str, adapter: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """The adapters given to ``method``, one or a list of them; raises ConfigError for an empty list."""
    names = [adapter] if isinstance(adapter, (str, Path)) else list(adapter)
    if not names:
        raise ConfigError(f"{method}: no adapter was given. Name one or more.")
    return names


def base_of(base: str | Path | None, configs: Sequence[LoraConfig], hub: HubOptions) -> tuple[str, Path]:
    """The name of the base model and its folder."""
    from lorafa.models.load import resolve_model

    revision = None
    if base is None:
        found = {(config.base_model_name_or_path, config.revision) for config in configs}
        if len(found) > 1:
            listed = ", ".join(sorted(str(name) for name, _ in found))
            raise ConfigError(f"The adapters name different base models: {listed}. Give the one that is meant: base=.")
        base, revision = next(iter(found))
        if base is None:
            raise ConfigError("The adapter does not name its base model. Give it: base=.")
    place = resolve_model(str(base))
    if isinstance(place, Path):
        return str(base), place
    options: HubOptions = {key: value for key, value in hub.items() if key != "revision"}  # type: ignore[assignment]
    return str(base), fetched(place, revision, options)
