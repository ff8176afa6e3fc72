"""Attention in blocks: equal to softmax attention in float64, left alone where it is not plain causal attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import lorafa.models.attention as blocks
from lorafa.models.attention import NAME, attention_in_blocks, causal_attention, use_blocks
from lorafa.models.load import load_model
from toys.language_models import gpt2, llama, t5
from toys.workplace import make_workplace


def _tensors(rows: int, heads: int, groups: int, tokens: int, size: int = 8, of_values: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((heads, size), (groups, size), (groups, of_values))
    made = [torch.randn(rows, tokens, *shape, dtype=torch.float64, generator=generator) for shape in shapes]
    return [one.transpose(1, 2).requires_grad_() for one in made]


def _by_definition(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    times = query.shape[1] // key.shape[1]
    scores = scale * query @ key.repeat_interleave(times, 1).transpose(2, 3)
    later = torch.ones(scores.shape[-2:]).triu(1).bool()
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ value.repeat_interleave(times, 1)


@pytest.mark.parametrize(
    ("rows", "heads", "groups", "tokens"),
    [(1, 1, 1, 2), (3, 4, 4, 63), (2, 4, 2, 64), (2, 9, 3, 65), (5, 6, 1, 200)],
)
@pytest.mark.parametrize("scale", [0.125, 0.3])
def test_outputs_and_gradients_are_those_of_the_definition(
    rows: int, heads: int, groups: int, tokens: int, scale: float
) -> None:
    made = _tensors(rows, heads, groups, tokens, of_values=5)
    wanted = _by_definition(*made, scale)
    weight = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = causal_attention(*made, scale)
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(found, made, weight), torch.autograd.grad(wanted, made, weight), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_rows_are_taken_together_as_far_as_their_scores_fit_into_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _tensors(5, 4, 2, 100)
    whole = causal_attention(*made, 0.5)
    assert len(list(blocks._blocks(made[0]))) == 2
    monkeypatch.setattr(blocks, "SCORE_BYTES", 1)
    assert len(list(blocks._blocks(made[0]))) == 5 * 2
    assert torch.allclose(causal_attention(*made, 0.5), whole, rtol=1e-12)


def test_what_is_kept_for_backward_is_what_was_given() -> None:
    made, kept = _tensors(2, 4, 2, 70), []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        causal_attention(*made, 0.5)
    assert {one.data_ptr() for one in kept} == {one.data_ptr() for one in made}


def test_half_precision_is_as_near_to_the_definition_as_plain_products() -> None:
    exact = _tensors(2, 4, 2, 150)
    half = [one.detach().bfloat16().requires_grad_() for one in exact]
    wanted = _by_definition(*(one.detach().double() for one in half), 0.35)
    found = causal_attention(*half, 0.35)
    assert found.dtype == torch.bfloat16
    assert float((found.detach() - wanted).norm() / wanted.norm()) < 0.01


def test_a_second_derivative_is_refused_not_wrong() -> None:
    made = _tensors(1, 2, 1, 4)
    squares = causal_attention(*made, 0.5).square().sum()
    (grad,) = torch.autograd.grad(squares, made[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


class _Module(nn.Module):
    is_causal = True
    num_key_value_groups = 2


def _asked(**more: Any) -> tuple[Tensor, Tensor, bool]:
    """Ours, that of transformers, and whether it was ours that was computed in blocks."""
    query, key, value = _tensors(2, 4, 2, 6)
    arguments = {"attention_mask": None, "scaling": 0.4, "is_causal": None} | more
    if short := arguments.pop("queries", None):
        query = query[:, :, -short:]
    torch.manual_seed(0)
    ours, _ = attention_in_blocks(_Module(), query, key, value, **arguments)
    torch.manual_seed(0)
    theirs, _ = sdpa_attention_forward(_Module(), query, key, value, **arguments)
    return ours, theirs, "CausalAttention" in _names(ours)


def _names(output: Tensor) -> str:
    node, names = output.grad_fn, ""
    while node is not None:
        names, node = names + type(node).__name__, node.next_functions[0][0] if node.next_functions else None
    return names


def test_plain_causal_attention_is_computed_in_blocks() -> None:
    ours, theirs, in_blocks = _asked()
    assert in_blocks
    assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "more",
    [
        {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()[:, None, None]},
        {"dropout": 0.5},
        {"is_causal": False},
        {"queries": 1, "attention_mask": torch.ones(2, 1, 1, 6).bool()},
        {"position_bias": torch.ones(1, 4, 6, 6, dtype=torch.float64)},
    ],
    ids=["mask", "dropout", "looks ahead", "one new token", "position bias"],
)
def test_all_else_is_that_of_transformers(more: dict[str, Any]) -> None:
    ours, theirs, in_blocks = _asked(**more)
    assert not in_blocks
    assert torch.equal(ours, theirs)


def test_under_autocast_and_compiled_it_is_that_of_transformers() -> None:
    made = _tensors(2, 4, 2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert not blocks._is_served(*made)
    assert blocks._is_served(*made)
    meta = [one.to("meta") for one in made]
    assert not blocks._is_served(*meta)


def _training(model: nn.Module, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return [out.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_model_trains_as_before(make: Any) -> None:
    model = make().double().eval()
    ids = torch.randint(0, 32, (3, 20), generator=torch.Generator().manual_seed(0))
    before = _training(model, ids)
    use_blocks(model)
    assert model.config._attn_implementation == NAME
    for now, then in zip(_training(model, ids), before, strict=True):
        assert torch.allclose(now, then, rtol=1e-8, atol=1e-11)


def test_padded_and_generated_rows_are_as_before() -> None:
    model = llama().double().eval()
    ids = torch.randint(3, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])

    def both() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        return logits, model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)

    before = both()
    use_blocks(model)
    after = both()
    assert torch.allclose(after[0], before[0], rtol=1e-9, atol=1e-11)
    assert torch.equal(after[1], before[1])


def test_models_with_another_attention_keep_it() -> None:
    eager = transformers.LlamaForCausalLM._from_config(llama().config, attn_implementation="eager")
    use_blocks(eager)
    assert eager.config._attn_implementation == "eager"


def test_a_model_that_would_say_something_else_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **more: Any) -> tuple[Tensor, None]:
        return 2 * sdpa_attention_forward(*arguments, **more)[0], None

    def broken(*_: Any, **__: Any) -> tuple[Tensor, None]:
        raise ValueError("not for this one")

    for other in (wrong, broken):
        monkeypatch.setattr(blocks, "attention_in_blocks", other)
        model = llama()
        use_blocks(model)
        assert model.config._attn_implementation == "sdpa"


def test_single_numbers_may_differ_as_two_ways_of_rounding_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(*arguments: Any, **more: Any) -> tuple[Tensor, None]:
        out = sdpa_attention_forward(*arguments, **more)[0]
        return out * (1 + 0.01 * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))).to(out.dtype), None

    monkeypatch.setattr(blocks, "attention_in_blocks", rounded)
    model = llama().bfloat16()
    use_blocks(model)
    assert model.config._attn_implementation == NAME


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_runner_takes_it_unless_another_is_named_and_saves_no_word_of_it(tmp_path: Path, dtype: str) -> None:
    folder = str(make_workplace(tmp_path) / "model")
    model, _ = load_model(folder, dtype)
    assert model.config._attn_implementation == NAME
    model.save_pretrained(tmp_path / "saved")
    assert NAME not in json.dumps(json.loads((tmp_path / "saved" / "config.json").read_text()))
    assert load_model(folder, "float32", attention="sdpa")[0].config._attn_implementation == "sdpa"


def test_encoder_decoders_are_left_alone() -> None:
    model = t5()
    before = model.config._attn_implementation
    use_blocks(model)
    assert model.config._attn_implementation == before


def test_a_model_without_weights_is_counted_as_it_will_run() -> None:
    with torch.device("meta"):
        model = llama()
    use_blocks(model)
    assert model.config._attn_implementation == NAME
    with FakeTensorMode():
        made = [torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)]
        assert blocks._is_served(*made)
        assert causal_attention(*made, 0.5).shape == (2, 4, 6, 8)
