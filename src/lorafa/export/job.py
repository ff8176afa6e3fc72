"""An export from beginning to end: read, convert, refuse, write, read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafa.config import LoraConfig
from lorafa.errors import ConfigError
from lorafa.export import EXPORTERS
from lorafa.export.base import BaseFacts, facts_of, load_adapted
from lorafa.export.entry import Exporter
from lorafa.export.proof import Proof, prove
from lorafa.export.source import of_files, of_model, require_matrix_formula
from lorafa.export.update import PlainAdapter
from lorafa.io.find import find_adapter_files
from lorafa.peft_model import PeftModel
from lorafa.runs.adapters import adapter_in
from lorafa.storage.folders import folder_written_whole, require_apart, require_free
from lorafa.storage.paths import user_path
from lorafa.storage.refusals import as_os_error
from lorafa.surgery.dequantize import has_codes, merge_into_dense
from lorafa.surgery.plain import Lost, check_rank
from lorafa.surgery.verify import made_inputs, outputs_of


@dataclass(frozen=True)
class Exported:
    """What was written, and what to know of it."""

    folder: Path
    files: tuple[str, ...]
    rank: int | None
    """The largest rank of a layer; None of a merged model."""
    notes: tuple[str, ...]
    """A sentence each: what was lost, what was made of ranks and scalings, how the program takes it."""
    proof: Proof | None = None
    lost: Lost | None = None
    """What another rank has lost of the update of each layer."""


def export_adapter(
    source: str | Path,
    target: str,
    out: str | Path,
    *,
    rank: int | float | None = None,
    base: str | Path | None = None,
    merged: bool = False,
    verify: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Exported:
    """Write an adapter in the form another program reads.

    Args:
        source: folder or Hub id of the adapter, or the directory of a run.
        target: "peft", "vllm", "sglang", "gguf" or "ollama".
        out: folder to make.
        rank: give every layer this rank, or the least that keeps this share of the energy of its update. An update
            that is no product of A and B (DoRA) needs one.
        base: the base model, a folder or a Hub id; read whole where the update is made with its weights. Default: the
            one the adapter names, of which the config alone is read where that is enough.
        merged: write the whole model, with the updates in its weights, in the form of transformers.
        verify: read back what was written by its reader's rules and compare the updates; with a base the logits, too.
        overwrite: take the place of a folder that is there, if it holds a model or an adapter.
        trust_remote_code: run code that comes with the base; without it one that needs such code is refused.

    Raises:
        ConfigError: an argument is wrong; the update needs a rank or the base; ``out`` is there already.
        CheckpointError: the program cannot hold the adapter, what was read back is not the adapter, or the files cannot
            be read or written.
        SourceError: the adapter or the base cannot be found.

    After any of them nothing was written.
    """
    trusted = trust_remote_code
    exporter, folder, place = EXPORTERS.get(target), require_free(out, overwrite=overwrite), adapter_in(source)
    if rank is not None:
        check_rank("rank", rank)
        if merged:
            raise ConfigError("A merged model has the whole update in its weights, so a rank changes nothing. Drop it.")
    config = _config_of(place, base)
    name = None if base is None else str(base)
    bases = [user_path(each) for each in (base, config.base_model_name_or_path) if each]
    require_apart(folder, {"the adapter": [user_path(place)], "its base model": bases})
    if merged:
        return _merged(exporter, place, config, name, folder, verify=verify, overwrite=overwrite, trusted=trusted)
    require_matrix_formula(config)
    facts = facts_of(config, name, trust_remote_code=trusted) if exporter.asks_base else None
    model = None if base is None else load_adapted(place, config, name, trust_remote_code=trusted)
    adapter = of_files(place, rank) if model is None else of_model(model, place, rank=rank)
    exporter.check(adapter, facts)
    with folder_written_whole(folder, overwrite=overwrite) as stage:
        notes = [*_lost(adapter), *exporter.write(adapter, stage, facts)]
        proof = prove(exporter, adapter, stage, facts, model) if verify else None
        files = _files(stage)
    return Exported(folder, files, adapter.rank, tuple(notes), proof, adapter.lost)


def _config_of(place: str, base: str | Path | None) -> LoraConfig:
    """The adapter's config; an empty one where another program wrote it in a layout of its own, to be read on the base.

    Raises:
        ConfigError: that base is not given.
    """
    files = find_adapter_files(place)
    if (config := files.peft_config()) is None and base is None:
        raise ConfigError(
            f"{files.weights} is in the layout of another program, which is read with the base model at hand. Give "
            "that: --base <folder or Hub id>."
        )
    return config or LoraConfig()


def _lost(adapter: PlainAdapter) -> list[str]:
    if adapter.lost is None:
        return []
    ranks = sorted({update.rank for update in adapter.updates})
    given = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks from {ranks[0]} to {ranks[-1]}"
    return [f"At {given}, {adapter.lost.in_words()}"]


def _merged(
    exporter: Exporter,
    place: str,
    config: LoraConfig,
    name: str | None,
    folder: Path,
    *,
    verify: bool,
    overwrite: bool,
    trusted: bool,
) -> Exported:
    """Write the base with the adapter in its weights, and its tokenizer."""
    if not exporter.takes_merged:
        raise ConfigError(
            f"A merged model is no adapter, and {exporter.words} reads models of its own: export with --for peft "
            "--merged, and convert that folder with llama.cpp's convert_hf_to_gguf.py."
        )
    facts: BaseFacts = facts_of(config, name, trust_remote_code=trusted)
    model = load_adapted(place, config, name, trust_remote_code=trusted)
    inputs = made_inputs(model.get_base_model()) if verify else {}
    wanted = outputs_of(model, inputs) if verify else None
    with model.disable_adapter():
        without = outputs_of(model, inputs) if verify else None
    whole, notes = _merge(model)
    with folder_written_whole(folder, overwrite=overwrite) as stage:
        with as_os_error():
            whole.save_pretrained(stage)
        notes += [*_tokenizer(place, facts.name, stage, trusted=trusted), *exporter.beside_merged(stage, facts)]
        proof = None
        if wanted is not None and without is not None:
            again = type(whole).from_pretrained(stage, dtype="auto").eval()
            difference = float((outputs_of(again, inputs) - wanted).abs().max())
            proof = Proof(0, 0.0, (difference, float((wanted - without).abs().max())))
        files = _files(stage)
    return Exported(folder, files, None, tuple(notes), proof)


def _merge(model: PeftModel) -> tuple[Any, list[str]]:
    if has_codes(model):
        merged, lost = merge_into_dense(model)
        return merged, [lost.in_words()]
    return model.merge_and_unload(), []


def _tokenizer(place: str, base: str, folder: Path, *, trusted: bool) -> list[str]:
    """Save the tokenizer beside the adapter, or else the base's."""
    from transformers import AutoTokenizer

    for source in (place, base):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusted)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        with as_os_error():
            tokenizer.save_pretrained(folder)
        return []
    return [f"Neither {place} nor {base} has a tokenizer: put its files beside the model."]


def _files(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir()))
