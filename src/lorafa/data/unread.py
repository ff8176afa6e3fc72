"""Characters that a tokenizer has no token for: it writes them as its unknown token, or passes over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorafa.errors import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNREAD = "hold characters that the tokenizer has no token for, so that they are neither read nor trained"


class Unread:
    """Looks at texts and their ids, one after another. Each character is looked up once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        others = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        unknown: int | None = tokenizer.unk_token_id
        self._unknown = None if unknown in others else unknown
        """The id of what is unknown, where it means nothing else."""
        self._known: set[str] = set()
        self._without: set[str] = set()

    def remark(self, texts: Sequence[str], ids: Sequence[int]) -> list[str]:
        """What is to be said of these texts, which became these ids."""
        found = set().union(*map(set, texts))
        for character in found - self._known:
            if not character.isspace() and not self._is_read(character):
                self._without.add(character)
        self._known |= found
        return [UNREAD] if found & self._without or (self._unknown is not None and self._unknown in ids) else []

    def characters(self) -> str:
        """The unread characters of all texts so far, in words."""
        return shorten(map(repr, sorted(self._without)), 10) or "none by itself"

    def _is_read(self, character: str) -> bool:
        ids = self.tokenizer(character, add_special_tokens=False).input_ids
        return bool(ids) and self._unknown not in ids
