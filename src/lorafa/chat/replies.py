"""What is answered to requests of the OpenAI protocol, whole and as a stream."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from lorafa.chat.decoding import Answer
from lorafa.chat.engine import Job
from lorafa.chat.requests import Request


class Reply(ABC):
    """The reply to one request, as an object or in chunks."""

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, request: Request, job: Job) -> None:
        """Begin the reply that the answers of a job make."""
        self.request, self.job = request, job
        self._id, self._created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())

    def whole(self) -> dict[str, Any]:
        """The reply when all answers have ended; waits for them."""
        for _ in self.job:
            pass
        choices = [
            {**self._said(answer.text), "index": place, "logprobs": None, "finish_reason": answer.finish}
            for place, answer in enumerate(self.job.answers)
        ]
        return {**self._head(self.whole_object), "choices": choices, "usage": self._usage()}

    def chunks(self) -> Iterator[dict[str, Any]]:
        """The reply in parts, as they are written."""
        for place in range(len(self.job.answers)):
            if (begin := self._begins()) is not None:
                yield self._chunk(place, begin, None)
        for place, text, finish in self.job:
            if text:
                yield self._chunk(place, self._adds(text), None)
            if finish is not None:
                yield self._chunk(place, self._adds(""), finish)
        if self.request.usage:
            yield {**self._head(self.chunk_object), "choices": [], "usage": self._usage()}

    @abstractmethod
    def _said(self, text: str) -> dict[str, Any]:
        """What a choice has for its whole text."""

    @abstractmethod
    def _begins(self) -> dict[str, Any] | None:
        """What the first chunk of a choice has; None where there is none before its text."""

    @abstractmethod
    def _adds(self, text: str) -> dict[str, Any]:
        """What a chunk has for new text; an empty one ends a choice."""

    def _chunk(self, place: int, said: dict[str, Any], finish: str | None) -> dict[str, Any]:
        choice = {**said, "index": place, "logprobs": None, "finish_reason": finish}
        return {**self._head(self.chunk_object), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.request.model}

    def _usage(self) -> dict[str, int]:
        """Tokens; a prompt counts once, however many answers it has, and the token that ends an answer counts too."""
        answers: Sequence[Answer] = self.job.answers
        asked = sum(len(answer.row.prompt) for answer in answers[:: self.request.choices])
        written = sum(answer.tokens for answer in answers)
        return {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}


class ChatReply(Reply):
    """What ``/v1/chat/completions`` sends."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _said(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _begins(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def _adds(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


class CompletionReply(Reply):
    """What ``/v1/completions`` sends."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _said(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _begins(self) -> dict[str, Any] | None:
        return None

    def _adds(self, text: str) -> dict[str, Any]:
        return {"text": text}
