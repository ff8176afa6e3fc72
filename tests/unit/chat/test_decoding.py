"""Answers of one mixed batch are those of each adapter alone, drawn ones by their seed alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from lorafa.chat.decoding import Answer, draw, write
from lorafa.chat.options import Options
from lorafa.chat.speakers import Row, Speakers
from lorafa.data.records import Message
from lorafa.evals.generation import Sampling
from toys.chats import SHAPES, chat_tokenizer, turns
from toys.language_models import greedy_by_hand
from toys.speakers import make_speakers

SPEAKERS = make_speakers(ends=())
PROMPTS = {"tiny": [5, 6, 7, 200], "german": [9, 30], "french": [5, 6, 7, 200, 11, 80]}
DRAWN = Options(max_new_tokens=12, temperature=1.0, seed=3)


def row(name: str, new: int = 10, sampling: Sampling | None = None, speakers: Speakers = SPEAKERS) -> Row:
    return Row(speakers.find(name), PROMPTS[name], new, sampling)


def written(*rows: Row, speakers: Speakers = SPEAKERS) -> list[Answer]:
    answers = [Answer(speakers, one) for one in rows]
    write(speakers.model, answers)
    return answers


def by_hand(name: str, new: int = 10, ends: tuple[int, ...] = ()) -> list[int]:
    """The definition, with the adapter active and no batch."""
    model = SPEAKERS.model
    if name == "tiny":
        with model.disable_adapter():
            return greedy_by_hand(model, PROMPTS[name], new, ends)
    model.set_adapter(name)
    return greedy_by_hand(model, PROMPTS[name], new, ends)


def test_side_by_side_everyone_answers_as_alone() -> None:
    expected = {name: by_hand(name) for name in PROMPTS}
    found = written(*map(row, PROMPTS))
    assert {answer.row.speaker.name: answer.ids for answer in found} == expected
    assert len({tuple(ids) for ids in expected.values()}) == 3  # or nothing was mixed


def test_which_adapter_is_active_changes_nothing() -> None:
    SPEAKERS.model.set_adapter("german")
    first = [answer.ids for answer in written(*map(row, PROMPTS))]
    SPEAKERS.model.set_adapter("french")
    assert [answer.ids for answer in written(*map(row, PROMPTS))] == first


def test_each_row_ends_at_its_own_length_and_at_its_own_ends() -> None:
    ids = by_hand("german")
    ending = replace(SPEAKERS.find("german"), ends=frozenset({ids[4]}))
    found = written(row("tiny", 3), Row(ending, PROMPTS["german"], 10), row("french", 10))
    assert [(len(a.ids), a.tokens, a.finish) for a in found[:2]] == [(3, 3, "length"), (4, 5, "stop")]
    assert found[1].ids == ids[: ids.index(ids[4])]
    assert (found[2].ids, found[2].finish) == (by_hand("french"), "length")


def test_what_is_heard_is_the_text_and_its_end_is_heard_too() -> None:
    heard: list[tuple[str, str | None]] = []
    answer = Answer(SPEAKERS, row("german"), lambda text, finish: heard.append((text, finish)))
    write(SPEAKERS.model, [answer])
    assert "".join(text for text, _ in heard) == answer.text
    assert [finish for _, finish in heard] == [None] * 9 + ["length"]


def test_a_text_before_which_it_ends() -> None:
    (whole,) = written(row("german", 40))
    stop = whole.text[5:8]
    (cut,) = written(replace(row("german", 40), stops=("never written", stop)))
    assert (cut.text, cut.finish) == (whole.text[: whole.text.index(stop)], "stop")
    assert cut.tokens < 40


def test_a_drawn_answer_depends_on_its_seed_and_not_on_who_shares_the_batch() -> None:
    drawn = row("german", 12, DRAWN.sampling())
    (alone,) = written(drawn)
    together = written(row("tiny", 20), row("french", 5, DRAWN.sampling(1)), drawn)[2]
    (other,) = written(row("german", 12, DRAWN.sampling(1)))
    assert alone.ids == together.ids
    assert alone.ids != other.ids
    assert alone.ids != by_hand("german", 12)


def test_a_seed_and_a_number_say_what_is_drawn_and_no_seed_draws_anew() -> None:
    assert DRAWN.sampling(2) == DRAWN.sampling(2) != DRAWN.sampling(3)
    anew = replace(DRAWN, seed=None)
    assert anew.sampling() != anew.sampling()
    assert replace(DRAWN, temperature=0.0).sampling() is None


def test_drawn_tokens_have_the_probabilities_of_the_definition() -> None:
    probabilities = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    generator = torch.Generator().manual_seed(0)
    for temperature, top_p in ((1.0, 1.0), (2.0, 1.0), (1.0, 0.7), (1.0, 0.71), (0.5, 0.01)):
        expected = (probabilities.log() / temperature).softmax(0)
        kept, reached = [], 0.0
        for token in expected.argsort(descending=True).tolist():
            if reached >= top_p - 1e-6:
                break
            kept.append(token)
            reached += float(expected[token])
        sampling = Sampling(temperature, top_p)
        counts = Counter(draw(probabilities.log(), sampling, generator) for _ in range(1500))
        assert set(counts) == set(kept)
        for token in kept:
            p = float(expected[token]) / reached
            assert counts[token] / 1500 == pytest.approx(p, abs=5 * (p * (1 - p) / 1500) ** 0.5 + 1e-9)


def test_tokens_that_belong_to_another_adapter_are_never_written() -> None:
    ids = by_hand("german")
    narrow = replace(SPEAKERS.find("german"), vocabulary=max(ids))
    for sampling in (None, DRAWN.sampling()):
        found = written(Row(narrow, PROMPTS["german"], 30, sampling), row("tiny"))
        assert max(found[0].ids) < max(ids)
        assert found[1].ids == by_hand("tiny")


def test_rows_that_would_push_each_other_out_of_the_context_are_written_one_after_the_other() -> None:
    """A row that has ended goes on with its batch: a table of positions would be asked for more than it has."""
    long = Row(SPEAKERS.find("tiny"), [5 + n % 200 for n in range(500)], 12)
    short = Row(SPEAKERS.find("german"), PROMPTS["german"], 40)
    seen: list[int] = []
    handle = SPEAKERS.model.get_base_model().model.rotary_emb.register_forward_pre_hook(
        lambda _, args, named: seen.append(int(named["position_ids"].max())), with_kwargs=True
    )
    try:
        found = written(long, short)
    finally:
        handle.remove()
    assert max(seen) < 512
    assert [answer.tokens for answer in found] == [12, 40]
    assert found[1].ids == by_hand("german", 40)


def test_a_cancelled_answer_ends_with_its_next_token_and_leaves_the_others() -> None:
    def cancel(*_: object) -> None:
        cancelled.cancelled = cancelled.tokens == 3

    cancelled, other = Answer(SPEAKERS, row("german"), cancel), Answer(SPEAKERS, row("french"))
    write(SPEAKERS.model, [cancelled, other])
    assert (cancelled.tokens, cancelled.finish, other.finish) == (4, "cancelled", "length")
    assert cancelled.ids == by_hand("german")[:4]


def test_a_base_without_adapters_answers_too() -> None:
    alone = make_speakers(())
    (found,) = written(row("tiny", speakers=alone), speakers=alone)
    assert found.ids == by_hand("tiny")


def test_a_conversation_is_asked_through_the_chat_template_and_fills_the_context_at_most() -> None:
    speaker = SPEAKERS.find("german")
    made = SPEAKERS.row(speaker, (Message("user", "a" * 400),), Options(max_new_tokens=256))
    text = f"<|im_start|>user\n{'a' * 400}<|im_end|>\n<|im_start|>assistant\n"
    assert SPEAKERS.model.config.max_position_embeddings == 512
    assert made.prompt == speaker.tokenizer(text, add_special_tokens=False).input_ids
    assert made.max_new_tokens == 512 - len(made.prompt)
    with pytest.raises(ValueError, match=r"has 5\d\d tokens for german, and the model's context of 512 leaves no room"):
        SPEAKERS.row(speaker, (Message("user", "a" * 500),), Options())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_conversation_goes_on_after_an_answer_that_is_empty_or_odd(shape: str) -> None:
    tokenizer = chat_tokenizer("bytes", SHAPES[shape].template)
    speaker = replace(SPEAKERS.find("tiny"), tokenizer=tokenizer, vocabulary=10**6)
    for said in ("", " ", "\n\n", "\ufffd", "user: assistant:", "{{ 1 / 0 }}"):
        asked = turns(("user", "One?"), ("assistant", said), ("user", "Two?"))
        text = tokenizer.decode(SPEAKERS.row(speaker, asked, Options()).prompt)
        assert text.index("One?") < text.index("Two?")
        assert said in text


def test_a_text_is_continued_as_it_stands() -> None:
    made = SPEAKERS.row_of_text(SPEAKERS.find("tiny"), "one two", Options(max_new_tokens=5))
    assert made.prompt == SPEAKERS.find("tiny").tokenizer("one two", add_special_tokens=False).input_ids
    with pytest.raises(ValueError, match="has no token"):
        SPEAKERS.row_of_text(SPEAKERS.find("tiny"), "", Options())
    with pytest.raises(ValueError, match="writes token 258, and its model has 100 tokens"):
        SPEAKERS.row_of_text(replace(SPEAKERS.find("tiny"), vocabulary=100), "<|im_end|> x", Options())
