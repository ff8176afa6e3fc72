"""The ids of a conversation, stretch by stretch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from lorafa.data.cuts import Stretch
from lorafa.data.rendering import CLOSE, OPEN, added_tokens, dense, unmarked
from lorafa.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPELLED = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}|[{OPEN}{CLOSE}]")
_GUARDS = ("\n", "|", "0")


class Tokens:
    """A tokenizer that reads each stretch of a text as it stands there. Made once for many conversations.

    Some tokenizers put a space before each text they are given (``_guard`` is not None). A stretch then has a guard put
    before it, whose ids are taken off again.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._added = added_tokens(tokenizer)
        self._guard = self._find_guard()

    def ids(self, stretches: Sequence[Stretch]) -> list[list[int]]:
        """The ids of the text of each stretch.

        Raises:
            DataError: the tokenizer cannot tokenize a stretch apart, or makes a token of what only spells it.
        """
        parts: list[list[int]] = []
        before = None
        for stretch in stretches:
            first = not any(parts)
            if stretch.turn is None:
                parts.append(self._read(stretch.text, None if first else before, first=first))
                continue
            parts.append(self._read(stretch.text, None, first=first, exact=True))
            before = None if stretch.end is None else self.tokenizer.convert_ids_to_tokens(stretch.end)
        return parts

    def _read(self, text: str, before: str | None, *, first: bool, exact: bool = False) -> list[int]:
        """The ids of a stretch that stands after the token ``before``, if any.

        A tokenizer that puts a space before each text may put one after each added token, too. Where the stretch is
        ``exact``, it does not.
        """
        ids: list[int] = []
        for number, piece in enumerate(_SPELLED.split(text)):
            spelled = number % 2 == 1
            for part in self._added_apart(piece) if exact and piece and not spelled else [piece]:
                if not part:
                    continue
                guard = self._guard if ids or before is None or spelled else self._guard and before
                found = self._apart(part, None if first and not ids and not exact else guard, spelled=spelled)
                if spelled and self.tokenizer.convert_tokens_to_ids(part) in found:
                    raise DataError(
                        f"A text spells {part!r}, and the tokenizer makes the token of it, which can close a turn. "
                        "Write that text in another way."
                    )
                ids += found
        return ids

    def _added_apart(self, text: str) -> list[str]:
        """The text, cut before and after each added token where that makes a difference."""
        if self._guard is None:
            return [text]
        cuts = [0, *(at for mark in self._added.finditer(text) for at in mark.span()), len(text)]
        return [text[start:stop] for start, stop in pairwise(cuts)]

    def keeps(self, stretches: Sequence[Stretch], ids: list[int]) -> bool:
        """Whether the ids, put together, read as the text does, or as its ids in one piece do; blanks aside."""
        text = unmarked("".join(stretch.text for stretch in stretches))
        read = dense(self._decoded(ids))
        return read == dense(text) or read == dense(self._decoded(self._encoded(text)))

    def _encoded(self, text: str, *, spelled: bool = False) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=spelled).input_ids
        if spelled:  # a fast tokenizer keeps this setting until it is called without
            self.tokenizer("", split_special_tokens=False)
        return list(ids)

    def _decoded(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def _apart(self, text: str, guard: str | None, *, spelled: bool = False) -> list[int]:
        """Ids of a text that stands after others: ``guard`` is put before it for the tokenizer, and taken off again."""
        if guard is None:
            return self._encoded(text, spelled=spelled)
        alone, both = self._encoded(guard), self._encoded(guard + text, spelled=spelled)
        if both[: len(alone)] != alone:
            raise DataError(
                f"The tokenizer puts a space before each text, and {text[:40]!r} cannot be tokenized without. "
                "Use another tokenizer, or another template."
            )
        return both[len(alone) :]

    def _find_guard(self) -> str | None:
        """What to put before a text, and to take off its ids, to have it without a space; None: nothing."""
        one = self._encoded("a")
        two = self._decoded(one) + "a"
        if self._decoded(one + one) == two:
            return None
        for guard in _GUARDS:
            size = len(self._encoded(guard))
            if self._decoded(one + self._encoded(guard + "a")[size:]) == two:
                return guard
        return None
