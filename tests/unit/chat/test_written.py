"""Text that is given out token by token is never taken back, and together it is the whole text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lorafa.chat.written import Written
from toys.language_models import byte_tokenizer

TOKENIZER = byte_tokenizer()


def decode(ids: list[int]) -> str:
    text: str = TOKENIZER.decode(ids, clean_up_tokenization_spaces=False)
    return text


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text, add_special_tokens=False).input_ids
    return ids


@given(st.text(max_size=30))
def test_the_pieces_are_the_text_and_none_ends_within_a_character(text: str) -> None:
    written = Written(decode)
    pieces = [written.add(token) for token in ids_of(text)]
    assert all(text.startswith("".join(pieces[: n + 1])) for n in range(len(pieces)))
    assert "".join(pieces) + written.close() == text == written.text


@settings(deadline=None)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_stop_and_gives_no_part_of_one_out(text: str, stops: list[str]) -> None:
    written = Written(decode, stops)
    pieces, read = [], ""
    for token in ids_of(text):
        pieces.append(written.add(token))
        read += decode([token])
        if written.stopped:
            break
    pieces.append(written.close())
    at = min((read.find(stop) for stop in stops if stop in read), default=len(read))
    assert written.stopped == any(stop in text for stop in stops)
    assert "".join(pieces) == written.text == read[:at]
    assert not any(stop in written.text for stop in stops)
    if written.stopped:  # at the token with which the first one was complete
        assert not any(stop in read[:-1] for stop in stops)


def test_bytes_that_are_no_character_are_given_out_when_the_text_is_over() -> None:
    written = Written(decode)
    whole = ids_of("é")
    assert [written.add(whole[0]), written.close()] == ["", "\ufffd"]
