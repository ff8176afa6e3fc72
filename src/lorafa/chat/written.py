"""The text of an answer while its tokens come one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNREADABLE = "\ufffd"
"""What a decoder writes for bytes that are no character, or not yet one."""


class Written:
    """Turns tokens into text that is never taken back: what it has given out is always the beginning of ``text``.

    The last characters wait where they may change: bytes that are not yet a whole character, and what may become the
    beginning of a text before which the answer ends.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        """Begin an empty text.

        Args:
            decode: ids -> their text.
            stops: texts before the first of which the answer ends; none is empty.
        """
        self._decode, self._stops = decode, tuple(stops)
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        """Whether one of the ``stops`` was written."""

    def add(self, token: int) -> str:
        """Take a token in, and give out the text that is new; an empty one after a stop."""
        if self.stopped:
            return ""
        self.ids.append(token)
        return self._give(self._decode(self.ids), last=False)

    def close(self) -> str:
        """Give out what has waited: the answer is over."""
        return "" if self.stopped else self._give(self._decode(self.ids), last=True)

    def _give(self, text: str, *, last: bool) -> str:
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, text = True, text[: min(found)]
        elif not last:
            text = text.rstrip(UNREADABLE)
            text = text[: len(text) - self._begun(text)]
        new = text[len(self.text) :]
        self.text += new
        return new

    def _begun(self, text: str) -> int:
        """How many characters at the end of a text are the beginning of a stop."""
        return max(
            (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
