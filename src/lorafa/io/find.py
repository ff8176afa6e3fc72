"""Where the two files of an adapter are, in a folder or on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorafa.config import CONFIG_NAME
from lorafa.storage.hub import HubOptions, locate

if TYPE_CHECKING:
    from typing_extensions import Unpack

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"


@dataclass(frozen=True)
class AdapterFiles:
    """Where the two files of an adapter are."""

    config: Path
    weights: Path


def find_adapter_files(
    source: str | Path,
    *,
    subfolder: str | None = None,
    use_safetensors: bool | None = None,
    **hub: Unpack[HubOptions],
) -> AdapterFiles:
    """The files of an adapter in a local folder or a Hub repository; safetensors before ``.bin``.

    Args:
        source: folder, or Hub id such as "owner/name".
        subfolder: where in it to look; adapters not called "default" are in a subfolder of their name.
        use_safetensors: look for safetensors only (True) or for ``.bin`` only (False).
        hub: as :class:`lorafa.storage.hub.HubOptions`.

    Raises:
        SourceError: the folder, repository or one of the files does not exist, or the Hub cannot be reached.
    """
    config = locate(source, [CONFIG_NAME], subfolder=subfolder, **hub)
    return AdapterFiles(config, find_weights(source, subfolder=subfolder, use_safetensors=use_safetensors, **hub))


def find_weights(
    source: str | Path,
    *,
    subfolder: str | None = None,
    use_safetensors: bool | None = None,
    **hub: Unpack[HubOptions],
) -> Path:
    """The file of an adapter's tensors; arguments and errors are those of :func:`find_adapter_files`."""
    wanted = {None: [WEIGHTS_NAME, PICKLE_NAME], True: [WEIGHTS_NAME], False: [PICKLE_NAME]}[use_safetensors]
    return locate(source, wanted, subfolder=subfolder, **hub)
