"""KL to the base: the definition, zero where nothing has moved, the same whatever the batches, on texts drawn once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafa import LoraConfig, get_peft_model
from lorafa.data.chat import IGNORE, Sample
from lorafa.errors import ConfigError, DataError
from lorafa.evals import drawn, forgetting
from lorafa.evals.drawn import Drawing, drawn_texts, openings
from lorafa.evals.entry import Source, Subject
from lorafa.evals.forgetting import FORGETTING, ForgettingSettings, Pair, divergence
from toys.language_models import byte_tokenizer, tiny_llama

ROWS = [[3, 7, 9, 4, 11], [5, 6], [8, 2, 2, 10, 3, 9, 1], [40, 41, 42]]
SAMPLES = [Sample(ids, [IGNORE, *ids[1:]]) for ids in ROWS] + [Sample([1, 2], [IGNORE, IGNORE])]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFA_CACHE", str(tmp_path / "cache"))


def adapted(scale: float = 0.1, **config: Any) -> Any:
    """In float64, with an adapter whose B has moved by ``scale``; 0: as it starts."""
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]} | config
    model = get_peft_model(tiny_llama().double(), LoraConfig(**settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(scale * torch.randn_like(weight))
    return model


def by_definition(model: Any, ids: list[int]) -> float:
    """The sum over positions and vocabulary of p (log p - log q)."""
    with torch.no_grad():
        with model.disable_adapter():
            log_p = model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        log_q = model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum())


@given(st.integers(0, 2**31), st.floats(1e-6, 30))
@settings(max_examples=40, deadline=None)
def test_the_divergence_is_the_definition_and_nonnegative(seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    base, other = torch.randn(2, 3, 50, dtype=torch.float64)
    other = base + scale * other
    found = divergence(base, other)
    p, q = base.softmax(-1), other.softmax(-1)
    torch.testing.assert_close(found, (p * (p.log() - q.log())).sum(-1), rtol=1e-9, atol=1e-14)
    assert (found >= 0).all()
    assert (divergence(base, base) == 0).all()
    assert (divergence(base.float(), other.float()) >= 0).all()


def test_a_token_that_the_base_never_writes_counts_for_nothing_and_one_the_model_never_writes_is_infinite() -> None:
    base = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0], [0.0, -1e4, 0.0]], dtype=torch.float64)
    other = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]], dtype=torch.float64)
    found = divergence(base, other)
    assert found[0] == 0
    assert found[1] == torch.inf
    assert float(found[2]) == pytest.approx(float(torch.tensor(1.5, dtype=torch.float64).log()))


def test_a_small_divergence_is_not_drowned_by_rounding() -> None:
    torch.manual_seed(0)
    base = torch.randn(4, 1000, dtype=torch.float64)
    other = base + 1e-4 * torch.randn_like(base)
    wanted = divergence(base, other)
    assert (wanted < 1e-8).all()
    torch.testing.assert_close(divergence(base.float(), other.float()).double(), wanted, rtol=0.01, atol=0)


def test_an_adapter_that_has_not_moved_has_forgotten_exactly_nothing() -> None:
    assert Pair(adapted(0.0)).divergences(SAMPLES, 0, 2) == [0.0] * 5


@pytest.mark.parametrize("chunked", [True, False])
def test_each_text_s_sum_is_the_definition_s_whatever_batch_and_chunk(
    chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not chunked:
        monkeypatch.setattr(forgetting, "supports_chunked_loss", lambda model: "not here")
    model = adapted()
    wanted = [by_definition(model, ids) for ids in ROWS] + [0.0]
    assert min(wanted[:4]) > 1e-3
    for batch_size, chunk in ((1, None), (2, 1), (3, 3), (8, 64)):
        found = Pair(model).divergences(SAMPLES, 0, batch_size, chunk_tokens=chunk)
        assert found == pytest.approx(wanted, rel=1e-9)


def test_a_head_with_an_adapter_of_its_own_is_compared_by_all_its_logits() -> None:
    model = adapted(target_modules=["q_proj", "lm_head"])
    assert forgetting.supports_chunked_loss(model) is not None
    assert Pair(model).divergences(SAMPLES, 0, 2)[:4] == pytest.approx([by_definition(model, row) for row in ROWS])


def test_another_model_can_be_the_base() -> None:
    base, model = tiny_llama().double().eval(), tiny_llama(seed=1).double().eval()
    found = Pair(model, base).divergences(SAMPLES, 0, 2)
    ids = torch.tensor([ROWS[0]])
    log_p, log_q = (one(input_ids=ids).logits[0, :-1].detach().log_softmax(-1) for one in (base, model))
    assert found[0] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()))


def test_the_log_ratio_of_drawn_tokens_has_the_divergence_as_its_mean() -> None:
    model, tokenizer = adapted(0.05), byte_tokenizer()
    with model.disable_adapter():
        samples = drawn_texts(model, tokenizer, openings(256), Drawing(8, seed=3), None)
    pair, ratios = Pair(model), []
    exact = pair.divergences(samples, 0, 64)
    for sample in samples:
        ids = torch.tensor([sample.input_ids])
        with torch.no_grad():
            log_q = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            with model.disable_adapter():
                log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        taken = ids[0, 1:].unsqueeze(1)
        counted = torch.tensor([label != IGNORE for label in sample.labels[1:]])
        ratios.append(float((log_p - log_q).gather(1, taken)[:, 0][counted].sum()))
    gap = torch.tensor(ratios, dtype=torch.float64) - torch.tensor(exact, dtype=torch.float64)
    error = float(gap.std() / len(gap) ** 0.5)
    assert error < 0.3 * sum(exact) / len(exact)
    assert abs(float(gap.mean())) < 3.5 * error


# ---- the texts


def test_texts_are_drawn_once_and_again_for_another_base_seed_or_length(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, calls = byte_tokenizer(), []
    original = drawn.generate_ids

    def counted(*args: Any, **settings: Any) -> Any:
        calls.append(1)
        return original(*args, **settings)

    monkeypatch.setattr(drawn, "generate_ids", counted)
    begun = openings(6)

    def draw(model: Any, length: int = 5, seed: int = 0) -> list[Sample]:
        with model.disable_adapter():
            return drawn_texts(model, tokenizer, begun, Drawing(length, seed), None)

    first = draw(adapted())
    assert draw(adapted()) == first
    assert draw(adapted(0.7)) == first  # another adapter on the same base
    assert len(calls) == 1
    assert draw(adapted(), seed=1) != first
    draw(adapted(), length=6)
    other = get_peft_model(tiny_llama(seed=1).double(), LoraConfig(r=4, target_modules=["q_proj"]))
    draw(other)
    assert len(calls) == 4
    assert all(any(label != IGNORE for label in sample.labels) for sample in first)
    assert first[0].input_ids[:1] == [tokenizer.bos_token_id]
    assert first[0].labels[0] == IGNORE


def test_a_damaged_file_of_texts_is_drawn_anew(tmp_path: Path) -> None:
    model, tokenizer = adapted(), byte_tokenizer()

    def draw() -> list[Sample]:
        with model.disable_adapter():
            return drawn_texts(model, tokenizer, openings(2), Drawing(4, 0), None)

    first = draw()
    (file,) = (tmp_path / "cache" / "drawn").iterdir()
    for content in ("[[1]", json.dumps([[1]]), json.dumps([[1], []])):
        file.write_text(content)
        with pytest.warns(UserWarning, match="drawn anew"):
            assert draw() == first


def test_the_end_of_a_text_is_one_of_its_tokens() -> None:
    model, tokenizer = adapted(), byte_tokenizer()
    first = tiny_llama().double().eval()
    model.generation_config.eos_token_id = list(range(0, 259, 2))  # every other token ends a text
    with model.disable_adapter():
        samples = drawn_texts(model, tokenizer, openings(8), Drawing(20, 0), None)
    written = [[label for label in sample.labels if label != IGNORE] for sample in samples]
    assert all(ids[-1] % 2 == 0 and all(token % 2 for token in ids[:-1]) for ids in written if len(ids) < 20)
    assert any(len(ids) < 20 for ids in written)
    assert first.generation_config.eos_token_id is None


def test_a_tokenizer_without_a_token_to_begin_with_is_refused() -> None:
    tokenizer = byte_tokenizer(pad_token="<|im_end|>")
    with pytest.raises(DataError, match=r"nothing can be drawn from an empty prompt\. Set tokenizer\.bos_token"):
        drawn.prompts_of(openings(2), tokenizer)


# ---- the evaluation


def measured(model: Any, **own: Any) -> Any:
    settings = ForgettingSettings(texts=4, max_new_tokens=6, **own)
    items = FORGETTING.read(Source(None), settings)
    subject = Subject(model, byte_tokenizer())
    FORGETTING.check(subject, items, settings)
    return FORGETTING.measure(subject, items, settings, 2, lambda *_: None)


def test_the_score_is_the_mean_over_tokens() -> None:
    scores = measured(adapted())
    numbers = scores.numbers
    assert numbers["texts"] == 4
    assert numbers["tokens"] == sum(scores.measured.weights) <= 24
    assert scores.measured.mean() == pytest.approx(numbers["kl"])
    assert numbers["kl"] > 0
    assert not scores.measured.higher_is_better
    assert measured(adapted(0.0)).numbers["kl"] == 0


def test_texts_of_a_file_count_all_their_tokens_but_the_first(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat")
    model, own = adapted(), ForgettingSettings(window=512)
    items = FORGETTING.read(Source(str(tmp_path / "text.txt")), own)
    found = FORGETTING.measure(Subject(model, byte_tokenizer()), items, own, 2, lambda *_: None)
    whole = forgetting.encode_all(items, byte_tokenizer(), 2**31).samples[0].input_ids
    assert found.numbers["tokens"] == len(whole) - 1
    assert found.numbers["kl"] * (len(whole) - 1) == pytest.approx(by_definition(model, whole))
    assert "interval" not in found.numbers
    cut = ForgettingSettings(window=8, overlap=4)
    assert FORGETTING.measure(Subject(model, byte_tokenizer()), items, cut, 2, lambda *_: None).numbers["tokens"] == (
        len(whole) - 1
    )


def test_a_model_without_adapters_has_no_base_to_compare_with() -> None:
    with pytest.raises(ConfigError, match=r"no base to compare with.*eval\.base=<model>"):
        measured(tiny_llama())


def test_trained_biases_of_the_base_are_not_taken_for_the_base() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], bias="all"))
    with pytest.raises(ConfigError, match="has trained biases of the base itself"):
        measured(model)


def test_a_model_can_be_compared_with_a_named_one(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    assert measured(tiny_llama().eval(), base=str(tmp_path / "base")).numbers["kl"] < 1e-9
    assert measured(tiny_llama(seed=1).eval(), base=str(tmp_path / "base")).numbers["kl"] > 0
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match="has another vocabulary than the model"):
        measured(tiny_llama().eval(), base=str(tmp_path / "base"))


def test_held_out_rows_are_not_asked() -> None:
    assert FORGETTING.asks([], ForgettingSettings()) == []
    with pytest.raises(ConfigError, match=r"asks nothing of a run's held-out rows.*eval\.forgetting=true"):
        FORGETTING.check(Subject(adapted(), byte_tokenizer()), [], ForgettingSettings())
