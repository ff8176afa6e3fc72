"""What a run keeps: where its numbers go, the adapter or the whole model, and the merged one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from lorafa.data.classes import write_classes
from lorafa.errors import CheckpointError, first_line
from lorafa.models.kinds.entry import Kind
from lorafa.peft_model import PeftModel
from lorafa.processes import is_main
from lorafa.storage.folders import folder_written_whole
from lorafa.storage.refusals import as_os_error
from lorafa.storage.tensors import can_be_gathered
from lorafa.storage.together import written_together
from lorafa.surgery.dequantize import Lost, has_codes, merge_into_dense
from lorafa.train.base_model import load_base, trained_whole
from lorafa.train.settings.run import RunConfig


class Recorder(Protocol):
    """Where a training puts what it measures; `lorafa.runs.record.RunDirectory` is one."""

    path: Path
    adapter: Path
    model: Path
    checkpoints: Path
    merged: Path

    def add_metrics(self, row: Mapping[str, Any], /) -> None: ...
    def metrics(self) -> list[dict[str, Any]]: ...
    def update_result(self, **entries: Any) -> None: ...
    def result(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Trained:
    """What a training leaves."""

    model: Any
    """A PeftModel, or with ``peft.full`` a model of transformers."""
    tokenizer: Any
    kind: Kind


def save(trained: Trained, config: RunConfig, run: Recorder) -> dict[str, str]:
    """Write what was trained; its name in the run's result."""
    model, tokenizer = trained.model, trained.tokenizer
    if not config.peft.full:
        model.save_pretrained(str(run.adapter), is_main_process=is_main())
        if config.model.add_tokens and is_main():
            _put_tokenizer(tokenizer, run.adapter)
        if (classes := trained.kind.classes_in(model)) and is_main():
            write_classes(run.adapter, classes)
        return {"adapter": run.adapter.name}
    if is_main():
        with folder_written_whole(run.model, overwrite=True) as folder, as_os_error():
            model.save_pretrained(str(folder))
            tokenizer.save_pretrained(str(folder))
    return {"model": run.model.name}


def save_merged(trained: Trained, config: RunConfig, run: Recorder) -> Lost | None:
    """The whole model with the adapter in its weights; the adapter is off the model then, so this comes last.

    Layers that are quantized become dense ones, in the dtype of the model: the folder is that of an ordinary model.

    Returns:
        What this has lost; None where nothing was quantized, and in other processes than the first.

    The first of several processes does it. Where the base is spread over them it reads the base, and the adapter that
    is saved, anew: a part of a weight takes no update in.

    Raises:
        BackendError: the base cannot take the update in.
        CheckpointError: the folder cannot be written to.
    """
    if not is_main():
        return None
    model = trained.model
    if any(map(can_be_gathered, model.parameters())):
        model = PeftModel.from_pretrained(_base_again(trained, config, run.adapter), run.adapter)
    lost: Lost | None = None
    merged: Any
    if has_codes(model):
        merged, lost = merge_into_dense(model)
    else:
        merged = model.merge_and_unload()
    with folder_written_whole(run.merged, overwrite=True) as folder:
        try:
            with as_os_error():
                merged.save_pretrained(str(folder))
                trained.tokenizer.save_pretrained(str(folder))
        except OSError as error:
            raise CheckpointError(
                f"The merged model could not be written to {str(run.merged)!r}: {first_line(error)}. The adapter is "
                "saved. Make room, or set train.save_merged=false."
            ) from error
    return lost


def _put_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer beside an adapter, all of its files or none: the one that tells others of it comes last."""
    several = isinstance(getattr(tokenizer, "chat_template", None), dict)  # which would be files in a folder of its own
    with written_together() as together, as_os_error():
        tokenizer.save_pretrained(str(together.stage(folder, TELLS)), save_jinja_files=not several)


TELLS = "tokenizer_config.json"
"""The file by which a tokenizer is known to be there."""


def _base_again(trained: Trained, config: RunConfig, folder: Path) -> Any:
    named, classes = replace(config.model, kind=trained.kind.name), trained.kind.classes_in(trained.model)
    whole = trained_whole(folder)
    return load_base(named, config.train.seed, classes=classes, whole=whole).model
