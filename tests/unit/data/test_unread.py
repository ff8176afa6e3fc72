"""Characters that a tokenizer has no token for: said, or refused where nothing else is left of an answer."""

from __future__ import annotations

import warnings

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorafa.data.chat import IGNORE, encode_all
from lorafa.data.records import Message, Record
from lorafa.errors import DataError
from toys.workplace import TEMPLATE, make_workplace


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """One that has no token for bytes it was not trained on, and passes over them."""
    model = make_workplace(tmp_path_factory.mktemp("work")) / "model"
    return PreTrainedTokenizerFast.from_pretrained(model)


def unknowing() -> PreTrainedTokenizerBase:
    """One with words of single letters, which writes all others as unknown."""
    marks = ["<unk>", "<end>", "<|user|>", "<|assistant|>", "<|end|>"]
    core = Tokenizer(models.WordLevel({word: at for at, word in enumerate([*marks, "a", "b"])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": marks[2:]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def asked(question: str, answer: str) -> Record:
    return Record((Message("user", question), Message("assistant", answer)), place="rows.jsonl, line 3")


def test_letters_that_are_dropped_are_said_with_the_first_row(dropping: PreTrainedTokenizerBase) -> None:
    with pytest.warns(UserWarning, match=r"^1 of 2 rows hold characters that the tokenizer has no token for, .*") as of:
        encode_all([asked("Ann has 2", "so 3"), asked("Ann has Ж", "so 3 Я")], dropping, 100)
    assert "('Ж', 'Я'). The first: rows.jsonl, line 3." in str(of[0].message)


def test_an_answer_of_which_nothing_is_left_is_refused(dropping: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"line 3: the tokenizer makes no token of the text 'ЖЯ'\. Delete the row\."):
        encode_all([asked("Ann has 2", "ЖЯ")], dropping, 100)


def test_what_becomes_the_unknown_token_is_said() -> None:
    with pytest.warns(UserWarning, match=r"1 of 1 rows hold characters that the tokenizer has no token for"):
        encoded = encode_all([asked("a b", "a xyz")], unknowing(), 100)
    assert 0 in [label for label in encoded.samples[0].labels if label != IGNORE]


def test_nothing_is_said_where_all_is_read(dropping: PreTrainedTokenizerBase) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_all([asked("Ann has 2", "so \n 3")], dropping, 100)
