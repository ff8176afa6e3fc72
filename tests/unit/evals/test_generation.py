"""Greedy answers are greedy whatever the model's own generation config says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from lorafa import LoraConfig, get_peft_model
from lorafa.data.records import Message
from lorafa.data.unanswered import Unanswered
from lorafa.evals.answering import Answering, answers
from lorafa.evals.generation import Sampling, generate_greedy, generate_ids, seed_at
from toys.language_models import byte_tokenizer, greedy_by_hand, tiny_llama

PROMPT, NEW = [5, 6, 7, 200], 8
TOKENIZER = byte_tokenizer()
MODEL = tiny_llama().eval()
ANSWER = greedy_by_hand(MODEL, PROMPT, NEW, {TOKENIZER.eos_token_id})
A_TOKEN = ANSWER[2]
ODD: dict[str, Any] = {
    "suppress_tokens": [A_TOKEN], "begin_suppress_tokens": [ANSWER[0]], "bad_words_ids": [[A_TOKEN]],
    "sequence_bias": [[[A_TOKEN], -50.0]], "forced_bos_token_id": 3, "forced_eos_token_id": 3,
    "exponential_decay_length_penalty": (2, 5.0), "watermarking_config": {"bias": 2.5, "seeding_scheme": "lefthash"},
    "cache_implementation": "static", "stop_strings": ["a"], "bos_token_id": 3, "pad_token_id": 3,
    "decoder_start_token_id": 3, "force_words_ids": [[3]], "constraints": None, "custom_field": 3,
    "prompt_lookup_num_tokens": 2, "assistant_early_exit": 1, "max_length": 5, "max_time": 1e-9,
}  # fmt: skip
"""A value for those fields whose kind cannot be told from the default."""
FIELDS = sorted({name for name in vars(GenerationConfig()) if not name.startswith("_")} | ODD.keys())
OWN = {"eos_token_id", "transformers_version"}
"""The end tokens are read on purpose."""


def odd_value(name: str) -> Any:
    default = getattr(GenerationConfig(), name, None)
    if name in ODD:
        return ODD[name]
    return not default if isinstance(default, bool) else 3


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in OWN])
def test_no_setting_of_the_model_s_own_reaches_the_answers(name: str) -> None:
    own = MODEL.generation_config
    MODEL.generation_config = GenerationConfig()
    setattr(MODEL.generation_config, name, odd_value(name))
    before = dict(vars(MODEL.generation_config))
    try:
        assert generate_greedy(MODEL, TOKENIZER, [PROMPT], batch_size=1, max_new_tokens=NEW) == [ANSWER]
        assert vars(MODEL.generation_config) == before
    finally:
        MODEL.generation_config = own


def test_an_answer_is_over_at_each_end_that_was_trained() -> None:
    (found,) = generate_greedy(MODEL, TOKENIZER, [PROMPT], batch_size=1, max_new_tokens=NEW, ends=[A_TOKEN])
    by_hand = greedy_by_hand(MODEL, PROMPT, NEW, {TOKENIZER.eos_token_id, A_TOKEN})
    assert found == by_hand == ANSWER[: ANSWER.index(A_TOKEN)]


@pytest.mark.parametrize("by_peft", [False, True])
def test_the_settings_of_a_wrapped_model_are_left_as_they_were(by_peft: bool) -> None:
    import peft

    model = tiny_llama()
    model.generation_config.repetition_penalty = 5.0
    own = model.generation_config
    if by_peft:
        wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    else:
        wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert generate_greedy(wrapped, TOKENIZER, [PROMPT], batch_size=1, max_new_tokens=NEW) == [ANSWER]
    assert wrapped.generation_config is own
    assert model.generation_config is own
    assert [m for m in wrapped.modules() if "generation_config" in vars(m)] == [model]


def test_a_failure_leaves_the_settings_as_they_were() -> None:
    model = tiny_llama()
    own = model.generation_config
    model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate_greedy(model, TOKENIZER, [PROMPT], batch_size=1, max_new_tokens=NEW)
    assert model.generation_config is own


def test_texts_of_one_seed_are_not_those_of_another_at_another_place() -> None:
    def drawn(seed: int) -> list[list[int]]:
        sampling = Sampling(seed=seed)
        return generate_ids(MODEL, TOKENIZER, [PROMPT] * 6, batch_size=2, max_new_tokens=NEW, sampling=sampling)

    found = [drawn(seed) for seed in range(5)]
    assert drawn(0) == found[0]
    texts = [tuple(text) for texts in found for text in texts]
    assert len(set(texts)) == len(texts)


def test_answers_of_one_seed_are_not_those_of_another_in_another_window() -> None:
    prompts = [Unanswered((Message("user", "a"),), place=f"row {number}") for number in range(8)]

    def drawn(seed: int) -> list[str]:
        how = Answering(NEW, 1, Sampling(seed=seed))
        return [answer.text for window in answers(MODEL, TOKENIZER, prompts, how) for answer in window]

    first, window = drawn(0), Answering(NEW, 1).window
    assert window < len(prompts)
    assert drawn(window)[: len(prompts) - window] != first[window:]


def test_no_two_seeds_and_places_share_random_numbers() -> None:
    found = {seed_at(seed, place) for seed in range(60) for place in range(60)}
    assert len(found) == 3600
    assert all(0 <= seed < 2**63 for seed in found)
    assert seed_at(0, seed_at(1, 2)) != seed_at(1, seed_at(0, 2))


class OfOneMatrix(torch.utils._python_dispatch.TorchDispatchMode):
    """Batched products with a matrix that is one for the whole batch, which PyTorch copies once a row on a CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.found += [each.shape for each in args if each.shape[0] > 1 and each.stride(0) == 0]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("adapted", [False, True])
def test_the_head_is_not_multiplied_row_by_row(adapted: bool) -> None:
    model: Any = tiny_llama().requires_grad_(False)
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    prompts = [PROMPT, PROMPT[:2], PROMPT[1:]]
    rows = torch.tensor([PROMPT, PROMPT])
    with torch.no_grad(), OfOneMatrix() as plainly:
        assert isinstance(model(input_ids=rows, logits_to_keep=1).logits, Tensor)
    with OfOneMatrix() as seen:
        found = generate_greedy(model, TOKENIZER, prompts, batch_size=3, max_new_tokens=2)
    assert plainly.found, "without it the head is not multiplied so either"
    assert seen.found == []
    assert found[0] == ANSWER[:2]
    assert not any(module._forward_pre_hooks for module in model.modules())
