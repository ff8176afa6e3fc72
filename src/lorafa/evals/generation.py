"""Answers to many prompts at once, the most likely ones or drawn ones."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorafa.backends.offload import device_of
from lorafa.errors import ConfigError, DataError
from lorafa.evals.by_length import Progress, by_length
from lorafa.models.modes import evaluating, reading_last_positions
from lorafa.settings.checks import check_int, check_number
from lorafa.storage.tensors import can_be_gathered

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0
    """Logits are divided by it."""
    top_p: float = 1.0
    """Drawn among the likeliest tokens that have this probability together."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, "a number > 0", 0)
        check_number("top_p", self.top_p, "a number in (0, 1]", 0, 1, closed="]")
        check_int("seed", self.seed, at_least=0)
        if self.seed >= 2**63:  # what torch's generators take
            raise ConfigError(f"seed must be below 2**63, found {self.seed}. Give a smaller one.")

    def arguments(self) -> dict[str, float]:
        """What `transformers.GenerationConfig` is told."""
        return {"temperature": self.temperature, "top_p": self.top_p}


def sampling_of(
    temperature: float, top_p: float, seed: int | None, called: Callable[[str], str], before_value: str
) -> Sampling | None:
    """How tokens are drawn, as a user says it; None: not at all, at temperature 0.

    Args:
        seed: None where nothing is said, which is 0.
        called: name of a field of :class:`Sampling` -> what the user calls it.
        before_value: what stands between that and a value: "=", a blank.

    Raises:
        ConfigError: a number is out of its range, or says how to draw where nothing is drawn.
    """
    check_number(called("temperature"), temperature, "a number >= 0", 0, closed="[")
    check_number(called("top_p"), top_p, "a number in (0, 1]", 0, 1, closed="]")
    if seed is not None:
        check_int(called("seed"), seed, at_least=0)
    if temperature:
        return Sampling(temperature, top_p, seed or 0)
    for name, given in (("top_p", None if top_p == 1 else f"{top_p:g}"), ("seed", seed)):
        if given is not None:
            raise ConfigError(
                f"{called(name)}{before_value}{given} says how tokens are drawn, and with {called('temperature')}"
                f"{before_value}0 none are. Give a temperature, or leave it out."
            )
    return None


def seed_at(seed: int, place: int) -> int:
    """The seed of what is drawn from a place on, below 2^63. No two pairs of seed and place share one, so that texts of
    several seeds are independent."""
    digest = hashlib.sha256(f"drawn texts, seed {seed}, place {place}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    ends: Iterable[int] = (),
    progress: Progress | None = None,
    sampling: Sampling | None = None,
    keep_end: bool = False,
) -> list[list[int]]:
    """The continuation of each prompt without the end token (with it if ``keep_end``), in the order of ``prompts``: the
    most likely one token by token, or with ``sampling`` one that is drawn.

    Prompts of similar length share a batch, padded where that changes nothing: on the left, and before an encoder on
    the right. A batch ends when all its rows have. An answer is over at
    any of ``ends`` (those that were trained: ``Encoded.ends``) and at the end tokens of tokenizer and model. Nothing
    else of the model's own generation config applies, whatever it is called. Several processes share the batches out,
    and all get all answers. Nothing about the model or the tokenizer is changed.

    Raises:
        DataError: a prompt is empty, or prompt and answer do not fit the model's context.
    """
    from transformers import GenerationConfig

    check_prompts(model, prompts, max_new_tokens)
    stops = end_ids(model, tokenizer, ends)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0] if stops else 0
    how = {"do_sample": False} if sampling is None else {"do_sample": True, "top_k": 0, **sampling.arguments()}
    settings = GenerationConfig(
        **how, num_beams=1, return_dict_in_generate=False, use_cache=True,
        max_new_tokens=max_new_tokens, eos_token_id=stops or None, pad_token_id=pad,
    )  # fmt: skip
    if encoder := encodes(model):
        settings.decoder_start_token_id = decoder_start(model)
    device = device_of(model)
    # Where the model is spread over processes, one that is done goes on with the others.
    spread = {"synced_gpus": True} if any(map(can_be_gathered, model.parameters())) else {}

    def begins(ids: Tensor) -> int:
        """Where in the output the answers begin: behind the prompts, or behind the token that a decoder starts with."""
        return 1 if encoder else ids.shape[1]

    def written(rows: list[int]) -> list[list[int]]:
        if sampling is not None:  # a batch is drawn as it would be in one process
            torch.manual_seed(seed_at(sampling.seed, rows[0]))
        ids, mask = padded([prompts[i] for i in rows], pad, left=not encoder)
        out = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings, **spread
        )
        return [_until(stops, answer, keep_end) for answer in out[:, begins(ids) :].tolist()]

    drawn = nullcontext() if sampling is None else torch.random.fork_rng()
    with evaluating(model), reading_last_positions(model), without_own_settings(model), drawn:
        return by_length(written, [len(prompt) for prompt in prompts], batch_size, progress)


def generate_greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    ends: Iterable[int] = (),
    progress: Progress | None = None,
) -> list[list[int]]:
    """:func:`generate_ids` without sampling: the most likely token each time."""
    how: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "ends": ends}
    return generate_ids(model, tokenizer, prompts, progress=progress, **how)


def _until(stops: Collection[int], tokens: list[int], keep_end: bool) -> list[int]:
    """The tokens before the first of ``stops``, or up to and with it."""
    return tokens[: next((at + keep_end for at, token in enumerate(tokens) if token in stops), len(tokens))]


def check_prompts(model: PreTrainedModel, prompts: Sequence[list[int]], max_new_tokens: int) -> None:
    """Raises DataError for an empty prompt, and where the longest one and its answer do not fit the model's context."""
    if not all(prompts):
        raise DataError(
            f"Prompt {next(i for i, ids in enumerate(prompts) if not ids)} is empty; nothing can follow it. Leave it "
            "out."
        )
    longest = max(prompts, key=len, default=[])
    if not room_for(model, longest, max_new_tokens):
        raise DataError(
            f"The longest prompt has {len(longest)} tokens; with max_new_tokens={max_new_tokens} that exceeds the "
            f"model's context of {context_of(model)}. Lower max_new_tokens or leave out the longest rows."
        )


MORE = 1.25
"""How much longer than the longest worked answer an answer may be."""


def answer_length(
    model: PreTrainedModel, prompts: Sequence[list[int]], said: int | None, worked: Iterable[int], least: int
) -> int:
    """Tokens that the longest answer may have: as many as are said, or a quarter more than the longest worked one has,
    at least so many, as far as the model's context goes behind the longest prompt.

    Args:
        said: None: nothing.
        worked: tokens of each worked answer.
        least: what every answer may have.
    """
    if said is not None:
        return said
    wanted, room = max(least, math.ceil(MORE * max(worked, default=0))), room_after(model, longest_of(prompts))
    return max(1, wanted if room is None else min(wanted, room))


def longest_of(prompts: Sequence[list[int]]) -> int:
    """Tokens of the longest prompt; 0 of none."""
    return max(map(len, prompts), default=0)


def room_for(model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int) -> bool:
    """Whether a prompt and its answer fit the model's context."""
    room = room_after(model, len(prompt))
    return room is None or max_new_tokens <= room


def room_after(model: PreTrainedModel, prompt: int) -> int | None:
    """How many tokens an answer can have after a prompt of so many; None where nothing limits it. A decoder behind an
    encoder has the whole context for itself."""
    context = context_of(model)
    if context is None:
        return None
    return (context if prompt <= context else 0) if encodes(model) else context - prompt


def encodes(model: PreTrainedModel) -> bool:
    """Whether an encoder reads the prompt, and a decoder writes the answer from its own beginning."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def context_of(model: PreTrainedModel) -> int | None:
    """Positions that a model, or the part of it that reads text, has; None where its config sets no bound."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


def padded(rows: Sequence[list[int]], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, int64 (rows, longest): a decoder goes on at the right edge, an encoder counts its
    positions from the left one."""
    longest = max(map(len, rows))

    def filled(row: list[int], filler: int) -> list[int]:
        more = [filler] * (longest - len(row))
        return more + row if left else row + more

    return torch.tensor([filled(row, pad) for row in rows]), torch.tensor([filled([1] * len(row), 0) for row in rows])


def decoder_start(model: Any) -> int:
    """The token that the decoder is given first, as in training."""
    own = getattr(model, "generation_config", None)
    for said in (model.config, own):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if (token := getattr(said, name, None)) is not None:
                return int(token)
    raise ConfigError(
        "The model's config does not say with which token its decoder starts (decoder_start_token_id), so it cannot "
        "write. Set it in its config.json."
    )


@contextmanager
def without_own_settings(model: Any) -> Iterator[None]:
    """The model's own generation config is blank inside the block: what it says fills whatever ours leaves open.

    A list of neutral values would have to know every field that there is, and those still to come.
    """
    from transformers import GenerationConfig

    own = {module: module.generation_config for module in model.modules() if "generation_config" in vars(module)}
    try:
        for module in own:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module in model.modules():
            if module in own:
                module.generation_config = own[module]
            elif "generation_config" in vars(module):  # a wrapper has handed it on
                del module.generation_config


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trained: Iterable[int]) -> list[int]:
    """Every token after which an answer is over."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list | tuple) else [own]
    return sorted({token for token in [tokenizer.eos_token_id, *listed, *trained] if token is not None})
