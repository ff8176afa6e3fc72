"""The loss of encoders with a decoder: that of transformers, row by row and over unequal batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lorafa import LoraConfig, get_peft_model
from lorafa.data.chat import IGNORE
from lorafa.data.pairs import PairCollator, PairEncoder, divided
from lorafa.errors import ConfigError, DataError, SourceError
from lorafa.evals.generation import generate_greedy
from lorafa.evals.loss import answer_loss, row_losses
from lorafa.models.batch_loss import BatchLoss, summed_by_rows
from lorafa.models.kinds.causal import CAUSAL
from lorafa.models.kinds.found import kind_of
from lorafa.models.kinds.seq2seq import SEQ2SEQ, answer_losses
from lorafa.models.load import check_samples, load
from toys.kinds import make_bert, make_t5
from toys.language_models import bert, conversation, llama, t5

UNEQUAL = [([5, 9, 1], [7, 1]), ([4, 1], [8, 3, 6, 1]), ([9, 9, 2, 1], [2, 1]), ([3, 1], [1])]


def batch_of(pairs: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    return PairCollator(0)([_Row(read, written) for read, written in pairs])


class _Row:
    """A sample of two sides."""

    def __init__(self, read: list[int], written: list[int]) -> None:
        self.input_ids, self.labels = read + written, [IGNORE] * len(read) + written
        self.truncated, self.place = False, ""


def bart() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, init_std=1.0,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


@pytest.mark.parametrize("make", [t5, bart])
def test_the_loss_of_a_batch_is_the_model_s_own(make: Any) -> None:
    model, batch = make().double().eval(), batch_of(UNEQUAL)
    torch.testing.assert_close(BatchLoss(model, answer_losses)(batch), model(**batch).loss, rtol=1e-12, atol=0)


def test_its_gradients_are_the_model_s_own() -> None:
    batch, found = batch_of(UNEQUAL), []
    for loss_of in (lambda model: BatchLoss(model, answer_losses)(batch), lambda model: model(**batch).loss):
        model = t5().double().eval()
        loss_of(model).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-9, atol=1e-12)


def test_two_unequal_batches_weigh_every_token_alike() -> None:
    """The mean over both is that of the one batch of all rows, which the mean of the two means is not."""
    model = t5().double().eval()
    loss, parts = BatchLoss(model, answer_losses), (batch_of(UNEQUAL[:1]), batch_of(UNEQUAL[1:]))
    count = sum(len(written) for _, written in UNEQUAL)
    together = sum(loss(part, count) for part in parts)
    torch.testing.assert_close(together, model(**batch_of(UNEQUAL)).loss, rtol=1e-12, atol=0)
    assert (sum(loss(part) for part in parts) / 2 - together).abs() > 1e-3


def test_the_losses_of_rows_are_theirs_alone_whatever_stands_beside_them() -> None:
    model = t5().double().eval()
    losses, terms = answer_losses(model, batch_of(UNEQUAL))
    alone = [answer_losses(model, batch_of([pair]))[0] for pair in UNEQUAL]
    torch.testing.assert_close(losses, torch.cat(alone), rtol=1e-12, atol=0)
    assert terms.tolist() == [len(written) for _, written in UNEQUAL]


def test_the_loss_over_samples_does_not_depend_on_the_batches() -> None:
    model, rows, summed = t5().eval(), [_Row(*pair) for pair in UNEQUAL], summed_by_rows(answer_losses)
    losses = [answer_loss(model, rows, PairCollator(0), size, summed) for size in (1, 3, 4)]  # type: ignore[arg-type]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    by_row = row_losses(model, rows, PairCollator(0), 2, None)  # type: ignore[arg-type]
    assert sum(by_row) / sum(len(written) for _, written in UNEQUAL) == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("make", [t5, bart])
def test_answers_are_those_of_each_prompt_alone_and_begin_behind_the_start_token(make: Any) -> None:
    """Written by hand: the likeliest token after all so far, one whole forward pass each."""
    model, prompts = make().eval(), [[5, 9, 4, 8, 7, 1], [4, 1], [9, 2, 1]]
    model.generation_config.num_beams, model.generation_config.min_new_tokens = 3, 5  # not ours: has no effect

    def by_hand(prompt: list[int]) -> list[int]:
        written = [model.config.decoder_start_token_id]
        for _ in range(6):
            out = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([written]))
            best = int(out.logits[0, -1].argmax())
            if best in ends:
                break
            written.append(best)
        return written[1:]

    class Ids:
        pad_token_id, eos_token_id = 0, model.config.eos_token_id

    ends = {int(model.config.eos_token_id)}
    tuned = get_peft_model(make().eval(), LoraConfig(r=2, target_modules="all-linear"))
    expected = [by_hand(prompt) for prompt in prompts]
    for one in (model, tuned):  # B is 0: the adapter changes nothing
        found = generate_greedy(one, Ids(), prompts, batch_size=3, max_new_tokens=6)  # type: ignore[arg-type]
        assert found == expected
    assert any(expected)


def test_a_kind_is_recognized_by_the_model() -> None:
    assert [kind_of(model) for model in (t5(), llama())] == [SEQ2SEQ, CAUSAL]
    assert kind_of(get_peft_model(t5(), LoraConfig(r=2, target_modules=["q"]))) is SEQ2SEQ


def test_a_kind_is_chosen_by_the_config_and_can_be_named(tmp_path: Path) -> None:
    place = make_t5(tmp_path)
    assert load(str(place / "model"), "auto", kind="auto").kind is SEQ2SEQ
    assert load(str(place / "model"), "auto", kind="seq2seq").kind is SEQ2SEQ
    with pytest.raises(SourceError, match="Could not load a causal language model"):
        load(str(place / "model"), "auto")
    with pytest.raises(ConfigError, match=r"Unknown kind of model 'seq2sec'\. Did you mean 'seq2seq'\?"):
        load(str(place / "model"), "auto", kind="seq2sec")


def test_an_encoder_alone_is_no_sequence_to_sequence_model(tmp_path: Path) -> None:
    place = make_bert(tmp_path)
    with pytest.raises(SourceError, match="Could not load a sequence-to-sequence model from the folder"):
        load(str(place / "model"), "auto", kind="seq2seq")


def test_weights_that_are_not_finite_are_found(tmp_path: Path) -> None:
    place = make_t5(tmp_path)
    model = transformers.T5ForConditionalGeneration.from_pretrained(place / "model")
    model.shared.weight.data[0, 0] = float("nan")
    model.save_pretrained(place / "model")
    with pytest.raises(SourceError, match=r"is not finite in float32\. Its weights are damaged"):
        load(str(place / "model"), "auto", kind="auto")


# ---- samples


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = make_t5(tmp_path_factory.mktemp("t5"))
    return transformers.AutoTokenizer.from_pretrained(place / "model")


def test_a_sample_is_the_prompt_and_the_trained_answer_each_with_its_end(tokenizer: Any) -> None:
    sample = PairEncoder(tokenizer, 16).sample(conversation("the film is good", "positive"))
    read, written = divided(sample)
    assert (tokenizer.decode(read), tokenizer.decode(written)) == ("the film is good </s>", "positive </s>")
    assert sample.labels == [IGNORE] * len(read) + written
    assert not sample.truncated


def test_what_is_cut_is_counted_and_special_tokens_stay(tokenizer: Any) -> None:
    encoder = PairEncoder(tokenizer, 3)
    sample = encoder.sample(conversation("the film is good", "positive"))
    assert sample.truncated
    assert tokenizer.decode(divided(sample)[0]) == "the film </s>"
    assert encoder.sample(conversation("good", "positive is bad fine")).truncated


def test_a_template_that_is_given_writes_what_is_read(tokenizer: Any) -> None:
    given = transformers.AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    given.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    sample = PairEncoder(given, 16).sample(conversation("the film", "good", "is bad", "negative"))
    assert given.decode(divided(sample)[0]) == "the film good is bad </s>"


@pytest.mark.parametrize(
    ("turns", "text"),
    [
        (("a", "good", "the", "bad"), r"'a': a model of this kind reads one text .* found the turns user, a"),
        (("", "good"), None),
    ],
)
def test_what_is_no_pair_of_texts_is_refused_with_its_row(tokenizer: Any, turns: tuple[str, ...], text: Any) -> None:
    if text is None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer.name_or_path)
        tokenizer.eos_token = None
        text = "has no end-of-sequence token"
    with pytest.raises(DataError, match=text):
        PairEncoder(tokenizer, 16).sample(conversation(*turns))


def test_a_plain_text_is_refused(tokenizer: Any) -> None:
    from lorafa.data.records import Message, Record

    record = Record((Message("assistant", "good film"),), plain=True, place="rows.jsonl, line 2")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: the row has no question before its answer"):
        PairEncoder(tokenizer, 16).sample(record)


def test_each_side_has_the_context_for_itself() -> None:
    import numpy as np

    model = bart()
    check_samples(model, np.array([50]), 3, lambda: 32)
    with pytest.raises(DataError, match=r"is longer than the model's context of 32 tokens, the longest has 33\. Cut"):
        check_samples(model, np.array([50]), 3, lambda: 33)


def test_an_encoder_is_not_taken_for_one_with_a_decoder() -> None:
    assert kind_of(bert()) is not SEQ2SEQ
