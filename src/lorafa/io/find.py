"""Where the files of an adapter are, in a folder or on the Hub, whichever program wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorafa.config import CONFIG_NAME, LoraConfig, read_config
from lorafa.errors import ConfigError, SourceError, shorten
from lorafa.io.belonging import config_left
from lorafa.io.layouts import LAYOUTS
from lorafa.storage.hub import HubOptions, locate
from lorafa.storage.paths import user_path
from lorafa.storage.tensors import PICKLE_SUFFIXES
from lorafa.storage.whole import read_json

if TYPE_CHECKING:
    from typing_extensions import Unpack

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
_NAMES = {None: [WEIGHTS_NAME, PICKLE_NAME], True: [WEIGHTS_NAME], False: [PICKLE_NAME]}
_LOOKS = 3
"""How often a config is looked for that another process may just be replacing."""
_WITH_CONFIG = (WEIGHTS_NAME, PICKLE_NAME, "adapters.safetensors")
"""Ends of files that have an ``adapter_config.json`` beside them; MLX puts a step before its own."""
_ENDS = {True: ".safetensors", False: ".bin"}


@dataclass(frozen=True)
class AdapterFiles:
    """Where the files of an adapter are."""

    config: Path | None
    """None where the program that wrote the adapter writes none."""
    weights: Path
    left: bool = False
    """Whether the config is what a save has left that was killed (:func:`lorafa.io.belonging.config_left`)."""

    def stamp(self) -> list[tuple[int, int, int] | None]:
        """What changes when a file is written anew."""
        return [_stamp(path) for path in (self.config, self.weights) if path is not None]

    def require_config(self) -> Path:
        """The file of the config.

        Raises:
            ConfigError: there is none, so nothing says rank and alpha.
        """
        if self.config is None:
            raise ConfigError(
                f"{self.weights} has no {CONFIG_NAME} beside it, which says rank and alpha. Pass "
                "config=LoraConfig(...), or load it on its base and save it."
            )
        return self.config

    def peft_config(self) -> LoraConfig | None:
        """The config; None where another program wrote the adapter in a layout of its own, and PEFT's config is not
        there.

        Raises:
            ConfigError: the config is PEFT's and cannot be used.
            CheckpointError: the file is no json.
        """
        if self.config is None or "peft_type" not in read_json(self.config):
            return None
        return read_config(self.config)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def find_adapter_files(
    source: str | Path,
    *,
    subfolder: str | None = None,
    use_safetensors: bool | None = None,
    weight_name: str | None = None,
    **hub: Unpack[HubOptions],
) -> AdapterFiles:
    """The files of an adapter in a local folder or a Hub repository; safetensors before ``.bin``, PEFT's before those
    of other programs (``LAYOUTS``).

    Args:
        source: folder, Hub id such as "owner/name", or a single file of tensors.
        subfolder: where in it to look; adapters not called "default" are in a subfolder of their name.
        use_safetensors: look for safetensors only (True) or for ``.bin`` only (False).
        weight_name: what the file of tensors is called, where it is not called as usual.
        hub: as :class:`lorafa.storage.hub.HubOptions`.

    Raises:
        SourceError: the folder, repository or one of the files does not exist, or the Hub cannot be reached.
    """
    path = user_path(source)
    if path.suffix in (_ENDS[True], *PICKLE_SUFFIXES) and path.is_file() and weight_name is None:
        beside = path.with_name(CONFIG_NAME)
        if not path.name.endswith(_WITH_CONFIG):
            return AdapterFiles(None, path)
        return AdapterFiles(beside, path) if beside.is_file() else _with_left(path.parent, path)
    if weight_name is not None:
        config = _config_beside(source, weight_name, subfolder, hub)
        return AdapterFiles(config, locate(source, [weight_name], subfolder=subfolder, **hub))
    try:
        config = locate(source, [CONFIG_NAME], subfolder=subfolder, **hub)
    except SourceError as error:
        folder = path / (subfolder or "")
        if folder.is_dir() and (weights := _weights_in(folder, use_safetensors)) is not None:
            found = _with_left(folder, weights)
            if found.config is not None:
                return found
        return AdapterFiles(None, _of_others(source, subfolder, use_safetensors, hub, error))
    try:
        weights = find_weights(source, subfolder=subfolder, use_safetensors=use_safetensors, **hub)
    except SourceError as error:
        weights = _of_others(source, subfolder, use_safetensors, hub, error)
    return AdapterFiles(config, weights)


def _weights_in(folder: Path, use_safetensors: bool | None) -> Path | None:
    return next((folder / name for name in _NAMES[use_safetensors] if (folder / name).is_file()), None)


def _with_left(folder: Path, weights: Path) -> AdapterFiles:
    """Tensors without a config beside them, with the one that a killed save has left."""
    for _ in range(_LOOKS):
        if (left := config_left(folder, weights)) is not None:
            return AdapterFiles(left, weights, True)
        if (folder / CONFIG_NAME).is_file():  # a save has ended meanwhile
            return AdapterFiles(folder / CONFIG_NAME, weights)
    return AdapterFiles(None, weights)


def _config_beside(source: str | Path, weight_name: str, subfolder: str | None, hub: HubOptions) -> Path | None:
    try:
        return locate(source, [CONFIG_NAME], subfolder=subfolder, **hub) if weight_name.endswith(_WITH_CONFIG) else None
    except SourceError as error:
        if error.__cause__ is not None:
            raise
        return None


def _of_others(
    source: str | Path, subfolder: str | None, use_safetensors: bool | None, hub: HubOptions, error: SourceError
) -> Path:
    """The file of another program; raises ``error``, which said that PEFT's is not there, if there is none."""
    every = [name for layout in LAYOUTS.names() for name in LAYOUTS.get(layout).weights]
    names = [name for name in every if use_safetensors is None or name.endswith(_ENDS[use_safetensors])]
    folder = user_path(source) / (subfolder or "")
    if error.__cause__ is not None or not names or (not folder.is_dir() and user_path(source).exists()):
        raise error
    try:
        return locate(source, names, subfolder=subfolder, **hub)
    except SourceError:
        checkpoints = sorted(path.parent.name for path in folder.glob(f"checkpoint-*/{CONFIG_NAME}"))
        if checkpoints:
            raise SourceError(
                f"The folder {str(folder)!r} is no adapter; it holds checkpoints of a training that are: "
                f"{shorten(checkpoints, 8)}. Name one of them."
            ) from None
        raise error from None


def find_weights(
    source: str | Path,
    *,
    subfolder: str | None = None,
    use_safetensors: bool | None = None,
    **hub: Unpack[HubOptions],
) -> Path:
    """The file of an adapter's tensors; arguments and errors are those of :func:`find_adapter_files`."""
    return locate(source, _NAMES[use_safetensors], subfolder=subfolder, **hub)


def require_once(weights: Sequence[Path]) -> None:
    """Raises ConfigError where the files of one adapter are given twice: its update would be added twice."""
    real = [file.resolve() for file in weights]
    if twice := next((file for file, place in zip(weights, real, strict=True) if real.count(place) > 1), None):
        raise ConfigError(f"{twice.parent} is given twice, and its update would count twice. Name it once.")
