"""Models by name: a built-in one that needs no Hub, a local folder, or a Hub id."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch

from lorafa.errors import ConfigError, DataError, SourceError, did_you_mean, shape_text, shorten, warn
from lorafa.models import MODELS, loadable
from lorafa.models.attention import use_blocks
from lorafa.models.kinds import AUTO, KINDS
from lorafa.models.kinds.entry import NEXT_TOKEN, Kind
from lorafa.models.kinds.found import kind_named
from lorafa.models.sourced import as_source_error, model_step
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
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready to train.

    Args:
        name: as in :func:`resolve_model`.
        dtype: of the weights; one of ``DTYPES`` by name, ``"auto"`` (as stored), or a ``torch.dtype``.
        attention: transformers' name of an attention implementation, "eager", "sdpa" or "flash_attention_2"; "auto"
            leaves the choice to it, and where that is "sdpa" computes causal attention on a CPU in blocks.
        cache_dir: where built-in models are kept; default :func:`~lorafa.storage.wheels.default_cache_dir`.
        revision: branch, tag or commit of a Hub model.
        trust_remote_code: run code that comes with the model (``auto_map`` in its files); without it one that needs
            such code is refused.

    The tokenizer has a pad token afterwards: its end-of-sequence token if it came without, or with one that was added
    and has no row in the embedding. Padding is masked by position, so sharing that token does no harm.

    Raises:
        ConfigError: unknown dtype.
        SourceError: the model cannot be found, fetched or read; its files lack weights; it looks ahead, or its output
            is not finite; it needs code of its own, which is not trusted.
    """
    loaded = load(
        name, dtype, attention=attention, cache_dir=cache_dir, revision=revision, trust_remote_code=trust_remote_code
    )
    return loaded.model, loaded.tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer, ready to train."""

    model: Any
    tokenizer: Any
    kind: Kind
    new: tuple[str, ...] = ()
    """Modules whose weights its files lack: they started at random, and are to be trained whole."""


def load(
    name: str,
    dtype: str | torch.dtype = "bfloat16",
    *,
    kind: str = "causal",
    attention: str = "auto",
    cache_dir: Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    answers: Callable[[], Sequence[str]] | None = None,
    classes: Sequence[str] | None = None,
) -> Loaded:
    """Load a model of some kind and its tokenizer, ready to train.

    Args:
        name, dtype, attention, cache_dir, revision, trust_remote_code: as for :func:`load_model`.
        kind: a line of ``KINDS``, or "auto" for the one its config speaks of.
        seed: of weights that the files lack, where the kind lets them.
        answers: those that a kind with classes is to tell apart; None leaves it those of its config.
        classes: the classes themselves, in the order of its outputs, in place of ``answers``.

    Raises:
        ConfigError: unknown dtype or kind.
        DataError: there are no classes to tell apart.
        SourceError: as :func:`load_model`.
    """
    if isinstance(dtype, str) and dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(
                f"Unknown dtype {dtype!r}.{did_you_mean(dtype, DTYPES)} Known: auto, {', '.join(DTYPES)}."
            )
        dtype = DTYPES[dtype]
    place = resolve_model(name, cache_dir=cache_dir, revision=revision)
    # transformers takes seconds to import: only those who load a model wait for it.
    import transformers

    where = _in_words(place)
    words = "a model" if kind == AUTO else KINDS.get(kind).words
    with as_source_error(f"Could not load {words} from the {where}", model_step()):
        # first: else the tokenizer is blamed for a damaged config
        config = transformers.AutoConfig.from_pretrained(
            place, revision=revision, trust_remote_code=trust_remote_code
        )
    found = kind_named(kind, config)
    tokenizer = _tokenizer_of(place, revision, trust_remote_code)
    classes = found.classes(config, answers, where) if classes is None else tuple(classes)
    with as_source_error(f"Could not load {found.words} from the {where}", model_step()), _seeded(seed), _unreported():
        # Weights of another shape are listed below, where transformers would point to a report it logged.
        model, loaded = getattr(transformers, found.auto_class).from_pretrained(
            place,
            revision=revision,
            dtype=dtype,
            attn_implementation=None if attention == "auto" else attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
            **found.loading(classes),
        )
    new = _check_weights(where, model, loaded, found)
    if answers is not None and not found.keeps_head(config, classes):
        with _seeded(seed):
            new = tuple(sorted({*new, *_begun_anew(model)}))
    found.check(where, model)
    if attention == "auto" and NEXT_TOKEN in found.offers:
        use_blocks(model)
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    if not found.own_template:
        tokenizer.chat_template = None
    found.settle(model, tokenizer)
    return Loaded(model, tokenizer, found, new)


def _begun_anew(model: Any) -> set[str]:
    """Draw the modules outside of the body again; their names in the model."""
    begun = drawn_anew(model)
    for module in begun.values():
        module.reset_parameters()
    return {name.partition(".")[0] for name in begun}


def drawn_anew(model: Any) -> dict[str, Any]:
    """The modules, by name, that are drawn again where a head is one for other classes: those outside of the body."""
    body = f"{model.base_model_prefix}."
    return {
        name: module
        for name, module in model.named_modules()
        if name and not f"{name}.".startswith(body) and hasattr(module, "reset_parameters")
    }


def load_tokenizer(
    name: str, *, cache_dir: Path | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model alone, as it comes.

    Args:
        name, cache_dir, revision, trust_remote_code: as in :func:`load_model`.

    Raises:
        SourceError: the model cannot be found or fetched, or has no tokenizer; that needs code which is not trusted.
    """
    return _tokenizer_of(resolve_model(name, cache_dir=cache_dir, revision=revision), revision, trust_remote_code)


def _tokenizer_of(place: Path | str, revision: str | None, trusted: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    step = _TOKENIZER_STEP if isinstance(place, Path) else model_step()
    with as_source_error(f"Could not load a tokenizer from the {_in_words(place)}", step):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            place, revision=revision, trust_remote_code=trusted
        )
    return tokenizer


def _in_words(place: Path | str) -> str:
    return f"{'folder' if isinstance(place, Path) else 'Hub model'} {str(place)!r}"


_TOKENIZER_STEP = "put the files of its tokenizer (tokenizer.json, tokenizer_config.json) beside its config.json."


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """What is drawn inside the block depends on the seed alone, and nothing outside it depends on the block."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _unreported() -> Iterator[None]:
    """Loading without the table of transformers that lists what :func:`_check_weights` says or refuses."""
    log = logging.getLogger("transformers.modeling_utils")

    def told(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    log.addFilter(told)
    try:
        yield
    finally:
        log.removeFilter(told)


def _check_weights(where: str, model: Any, loaded: Mapping[str, Any], kind: Kind) -> tuple[str, ...]:
    """Every weight of the model was read, but for those that the kind trains from the start: transformers makes up the
    others at random and only logs it.

    Returns:
        The modules of those.
    """
    missing, other = sorted(loaded["missing_keys"]), sorted(loaded["mismatched_keys"])
    new = {name for name in (*missing, *(name for name, _, _ in other)) if kind.may_be_new(name, model)}
    missing, other = [name for name in missing if name not in new], [one for one in other if one[0] not in new]
    if missing or other:
        shapes = [f"{name} ({shape_text(has)}, the config says {shape_text(wants)})" for name, has, wants in other]
        lacks = [f"lack {len(missing)} that the config asks for: {shorten(missing)}"] if missing else []
        differ = [f"have {len(other)} of another shape: {shorten(shapes)}"] if other else []
        raise SourceError(
            f"The weights of the {where} {' and '.join(lacks + differ)}. They would be random numbers. "
            f"Give {kind.words.replace(' ', ' complete ', 1)} whose config.json is its own."
        )
    if unused := sorted(loaded["unexpected_keys"]):
        warn(f"The model has no place for {len(unused)} weights of the {where}: {shorten(unused)}.")
    return modules_of(new, model)


def modules_of(weights: Iterable[str], model: Any) -> tuple[str, ...]:
    """The modules that are trained whole where these weights are new: those they lie in, of a head all of it."""
    body = f"{model.base_model_prefix}."
    names = {name.rpartition(".")[0] if name.startswith(body) else name.partition(".")[0] for name in weights}
    return tuple(sorted(names))


def on_accelerator(model: Any) -> Any:
    """The model on this process's accelerator, where there is one and nothing else has placed it."""
    if torch.accelerator.is_available() and not hasattr(model, "hf_device_map"):
        model.to(torch.accelerator.current_accelerator())
    return model


def check_samples(
    model: PreTrainedModel,
    lengths: npt.NDArray[Any],
    highest: int,
    longest: Callable[[], int | None] = lambda: None,
) -> None:
    """Every sample is within what the model can read: its vocabulary and its context.

    Args:
        lengths: tokens of each sample.
        highest: the highest id in any.
        longest: the most that is read at once, where that is not a whole sample; asked where it matters.

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
    at_once = longest() if len(longer) else None
    if at_once is not None and context:
        if at_once <= context:
            return
        raise DataError(
            f"A prompt or an answer is longer than the model's context of {context} tokens, the longest has {at_once}. "
            f"Cut them: data.max_length={context}."
        )
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
