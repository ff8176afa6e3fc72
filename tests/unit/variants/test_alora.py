"""Activated LoRA in a language model: caches, padding, beams, training, and PEFT's own on the same tensors."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import BackendError, ConfigError
from toys.adapters import train

INVOCATION = [7, 9]
CONFIG = hf.LlamaConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
    pad_token_id=0, eos_token_id=None, bos_token_id=1,
)  # fmt: skip
PROMPT = torch.tensor([[3, 4, 7, 9, 5, 7, 9, 6], [7, 9, 3, 4, 5, 6, 8, 8], [3, 4, 5, 6, 8, 8, 8, 8]])
"""Invoked at 5, at 0, and nowhere."""


def base_model() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(CONFIG).double().eval()


def model_of(**settings: Any) -> PeftModel:
    config = LoraConfig(
        r=2, target_modules="all-linear", alora_invocation_tokens=INVOCATION, task_type="CAUSAL_LM", init_seed=0,
        **settings,
    )  # fmt: skip
    model = get_peft_model(base_model(), config)
    torch.manual_seed(1)
    train(model)
    return model.eval()


def answers(model: Any, prompt: Tensor = PROMPT, **settings: Any) -> Tensor:
    found: Tensor = model.generate(input_ids=prompt, max_new_tokens=5, min_new_tokens=5, **settings)
    return found


def logits_of(model: Any, prompt: Tensor, **settings: Any) -> Tensor:
    """Logits of every new token, (tokens, rows, vocabulary)."""
    out = model.generate(
        input_ids=prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **settings,
    )  # fmt: skip
    return torch.stack(out.logits)


def test_keys_and_values_before_the_invocation_are_those_of_the_base_to_the_bit() -> None:
    model = model_of()
    with torch.no_grad():
        own = model(PROMPT, use_cache=True).past_key_values
        with model.disable_adapter():
            base = model(PROMPT, use_cache=True).past_key_values
    for mine, theirs in zip(own.layers, base.layers, strict=True):
        for name in ("keys", "values"):
            left, right = getattr(mine, name), getattr(theirs, name)
            assert torch.equal(left[0, :, :5], right[0, :, :5])
            assert torch.equal(left[2], right[2])
            assert not torch.equal(left[0, :, 5:], right[0, :, 5:])


def test_with_and_without_a_cache_the_same_is_generated() -> None:
    model = model_of()
    cached = logits_of(model, PROMPT)
    for other in (logits_of(model, PROMPT, use_cache=False), logits_of(model, PROMPT, prefill_chunk_size=3)):
        torch.testing.assert_close(cached, other)
    tokens = answers(model, do_sample=False)
    again = model(tokens[:, :-1]).logits[:, -1]  # the invocation lies in the prompt alone
    torch.testing.assert_close(cached[-1], again.float())


def test_padding_on_the_left_changes_nothing() -> None:
    model = model_of()
    alone = logits_of(model, PROMPT[:1])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), PROMPT[:1]], dim=1)
    together = torch.cat([padded, torch.randint(10, 31, (1, 11))])
    mask = (together != 0).long()
    torch.testing.assert_close(logits_of(model, together, attention_mask=mask)[:, :1], alone)


def test_padding_on_the_right_changes_nothing_before_it() -> None:
    model = model_of()
    alone = model(PROMPT[:2]).logits
    padded = torch.cat([PROMPT[:2], torch.zeros(2, 3, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(padded, attention_mask=(padded != 0).long()).logits[:, :8], alone)


def test_beams_and_several_answers_go_by_the_invocation_of_their_own_prompt() -> None:
    model = model_of()
    together = answers(model, num_beams=3, do_sample=False)
    for row in range(3):
        assert torch.equal(together[row], answers(model, PROMPT[row : row + 1], num_beams=3, do_sample=False)[0])
    torch.manual_seed(0)
    drawn = model.generate(
        input_ids=PROMPT[:2], max_new_tokens=1, do_sample=True, num_return_sequences=2, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    wanted = model(PROMPT[:2]).logits[:, -1].repeat_interleave(2, dim=0)
    torch.testing.assert_close(drawn.logits[0], wanted.float())


def test_a_call_that_continues_another_says_where_the_invocation_is() -> None:
    model = model_of()
    with torch.no_grad():
        wanted = model(PROMPT[:2]).logits[:, -1]
        begun = model(PROMPT[:2, :-1], use_cache=True)
        got = model(PROMPT[:2, -1:], past_key_values=begun.past_key_values, alora_offsets=[3, 8]).logits[:, -1]
    torch.testing.assert_close(got, wanted)
    embedded = model.get_input_embeddings()(PROMPT[:2])
    torch.testing.assert_close(model(inputs_embeds=embedded, alora_offsets=[3, 8]).logits[:, -1], wanted)
    with pytest.raises(BackendError, match=r"the call had no input_ids in which to look for them. Pass input_ids, or"):
        model(inputs_embeds=embedded)
    with pytest.raises(ConfigError, match=r"alora_offsets must have a whole number or None for each of the 2 rows"):
        model(PROMPT[:2], alora_offsets=[3])


def test_a_base_call_in_between_leaves_generation_alone() -> None:
    model = model_of()
    wanted = logits_of(model, PROMPT)
    model(PROMPT[:, :3].flip(1))
    torch.testing.assert_close(logits_of(model, PROMPT), wanted)
    assert not model.base_model.model._forward_pre_hooks


@pytest.mark.parametrize("start", [True, "pissa"])
def test_a_file_gives_the_same_here_and_in_peft(tmp_path: Path, start: bool | str) -> None:
    model = model_of(init_lora_weights=start)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(), tmp_path)
    torch.testing.assert_close(again(PROMPT).logits, model(PROMPT).logits)
    theirs = peft.PeftModel.from_pretrained(base_model(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(theirs(input_ids=PROMPT).logits, model(PROMPT).logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits_of(theirs, PROMPT), logits_of(model, PROMPT), rtol=1e-5, atol=1e-6)


def test_it_counts_in_rows_with_the_invocation() -> None:
    variant = model_of().base_model.lora_layers()[0][1].adapters["default"].variant
    assert [variant.counts_in(row) for row in PROMPT.tolist()] == [True, True, False]
    assert not variant.counts_in([7])


def test_layers_that_share_an_input_keep_one_choice_of_it() -> None:
    """q, k and v, and gate and up, read the same states: of each only the places that count are kept, once."""
    model = model_of()
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(PROMPT).logits.sum()
    shapes = [tuple(one.shape) for one in kept.values()]
    # 3 places of the first row, 8 of the second, none of the third; once for q, k and v, for o, for gate and up
    assert shapes.count((11, 16)) == 2 * 3
    assert shapes.count((11, 24)) == 2
    assert shapes.count((11, 2)) == 2 * 7


def test_an_empty_invocation_is_no_plain_adapter() -> None:
    with pytest.raises(ConfigError, match=r"must be a list of token ids, one at least, found \[\] \(list\)"):
        LoraConfig(alora_invocation_tokens=[])


def test_offsets_are_numbers_and_not_answers_to_a_question() -> None:
    with pytest.raises(ConfigError, match=r"a whole number or None for each of the 3 rows, found \[True"):
        model_of()(PROMPT, alora_offsets=[True, False, True])


def test_token_ids_without_rows_are_refused() -> None:
    for call in (model_of(), model_of().generate):
        with pytest.raises(ConfigError, match=r"in rows of token ids, \(rows, tokens\), found \(8,\)"):
            call(PROMPT[0])


def test_it_runs_in_inference_mode_as_pipelines_do() -> None:
    model = model_of()
    with torch.no_grad():
        expected = model(PROMPT).logits
    with torch.inference_mode():
        assert torch.equal(model(PROMPT).logits, expected)
        assert torch.equal(answers(model), answers(model, do_sample=False))


class Marked(torch.autograd.Function):
    """Its place in a graph is there for as long as the graph is."""

    seen: ClassVar[list[weakref.ref[Any]]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Marked.seen.append(weakref.ref(ctx))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_a_call_without_a_backward_pass_leaves_no_graph_behind() -> None:
    model = model_of().train()
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, args, output: Marked.apply(output.detach().requires_grad_()))
    loss = model(PROMPT).logits.sum()
    (mark,) = Marked.seen
    assert mark() is not None
    del loss
    gc.collect()
    assert mark() is None
