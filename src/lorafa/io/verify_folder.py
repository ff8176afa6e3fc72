"""Load a merged model and the adapted one it came from, and compare what they compute."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lorafa.io.adapter_files import read_adapter
from lorafa.io.attached import class_of
from lorafa.io.load import take_in
from lorafa.io.stream import base_of, one_or_more
from lorafa.models.carried import read_config
from lorafa.models.sourced import as_source_error
from lorafa.settings.checks import check_arguments
from lorafa.storage.hub import HubOptions
from lorafa.storage.paths import user_path
from lorafa.surgery.activate import set_adapter
from lorafa.surgery.build import Options
from lorafa.surgery.lora_model import LoraModel
from lorafa.surgery.verify import MergeCheck, compared, made_inputs, measured, outputs_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


def check_merged_folder(
    folder: str | Path,
    adapter: str | Path | Sequence[str | Path],
    *,
    base: str | Path | None = None,
    inputs: Mapping[str, Any] | None = None,
    ignore_base_mismatch: bool = False,
    trust_remote_code: bool = False,
    **hub: Unpack[HubOptions],
) -> MergeCheck:
    """Compare a folder of :func:`~lorafa.io.stream.merge_to_folder` with the base and the adapter it was made of.

    Both models are loaded, one after the other, in the dtype of the folder, on the CPU.

    Args:
        folder: the merged model.
        adapter, base, ignore_base_mismatch, trust_remote_code, hub: as :func:`~lorafa.io.stream.merge_to_folder` was
            given them.
        inputs: arguments of the models' forward; None makes token ids.

    Raises:
        SourceError, CheckpointError: something cannot be found or read.
        AdapterError: the outputs have other shapes, or are not finite.
        ConfigError: no inputs are given, and none can be made.
    """
    check_arguments("check_merged_folder", hub, HubOptions.__optional_keys__)
    stored = [read_adapter(name, **hub) for name in one_or_more("check_merged_folder", adapter)]
    _, place = base_of(base, [one.config for one in stored], hub)
    kind, config = class_of(place, stored, trust_remote_code=trust_remote_code)
    merged_config = read_config(user_path(folder))
    dtype = merged_config.get("dtype", merged_config.get("torch_dtype", "auto"))
    model = _loaded(kind, place, dtype, config=config, ignore_mismatched_sizes=True)
    tuner = LoraModel(model)
    called = [f"adapter_{i}" for i in range(1, len(stored) + 1)]
    for name, one in zip(called, stored, strict=True):
        take_in(tuner, one, name, Options(), {"ignore_base_mismatch": ignore_base_mismatch})
    set_adapter(model, called, inference_mode=True)
    given = made_inputs(model) if inputs is None else inputs
    adapted, in_memory, moved = measured(model, inputs, None)
    del model, tuner
    merged = outputs_of(_loaded(kind, user_path(folder), dtype), given)
    return compared(adapted, merged, None if moved is None else moved - in_memory)


def _loaded(kind: type[nn.Module], place: Path, dtype: Any, **options: Any) -> Any:
    loading: Any = kind
    with as_source_error(f"Could not load {str(place)!r}", "look at its files."), _unreported():
        return loading.from_pretrained(place, dtype=dtype, **options)


@contextmanager
def _unreported() -> Iterator[None]:
    """Loading without what transformers says of weights that the adapter brings."""
    from transformers.utils import logging as of_transformers

    log, bars = logging.getLogger("transformers"), of_transformers.is_progress_bar_enabled()
    level = log.level
    log.setLevel(logging.ERROR)
    of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        log.setLevel(level)
        if bars:
            of_transformers.enable_progress_bar()
