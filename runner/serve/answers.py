"""Answers in the shape of OpenAI's: whole, or as the events of a stream."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal
from uuid import uuid4

from runner.serve import logprobs
from runner.serve.errors import ApiError
from runner.serve.ticket import Piece, Ticket
from runner.text.tokenizer import Tokenizer

Kind = Literal["chat", "text"]

_OBJECTS = {
    ("chat", False): "chat.completion",
    ("chat", True): "chat.completion.chunk",
    ("text", False): "text_completion",
    ("text", True): "text_completion",
}
_PREFIXES = {"chat": "chatcmpl", "text": "cmpl"}


@dataclass(frozen=True)
class Answer:
    """The answer to one request."""

    kind: Kind
    model: str
    ticket: Ticket
    tokenizer: Tokenizer
    id: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self) -> dict[str, Any]:
        """All of it, when it is complete.

        Raises:
            ApiError: it will not be.
        """
        async for piece in self._pieces():
            if piece.error:
                raise piece.error
        completion = self.ticket.completion
        content: dict[str, Any] = {"text": completion.text}
        if self.kind == "chat":
            content = {"message": {"role": "assistant", "content": completion.text}}
        content["logprobs"] = self._logprobs(range(len(completion.logprobs)))
        return self._envelope(content, completion.finish_reason, streamed=False) | {
            "usage": self._usage()
        }

    async def events(self, *, include_usage: bool) -> AsyncIterator[str]:
        """Server-sent events, the last of them [DONE]; an error is an event, too."""
        if self.kind == "chat":
            yield self._event(self._chunk({"role": "assistant", "content": ""}, None))
        async for piece in self._pieces():
            if piece.error:
                yield self._event(piece.error.body())
                return
            yield self._event_of(piece)
        if include_usage:
            last = self._envelope({}, None, streamed=True)
            yield self._event(last | {"choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    async def _pieces(self) -> AsyncIterator[Piece]:
        while True:
            piece = await self.ticket.pieces.get()
            yield piece
            if piece.is_last:
                return

    def _event_of(self, piece: Piece) -> str:
        if not piece.text or piece.tokens or piece.finish_reason:
            delta = {"content": piece.text} if piece.text else {}
            return self._event(self._chunk(delta, piece.finish_reason, piece.tokens))
        return json.dumps(piece.text).join(self._around_text)

    @cached_property
    def _around_text(self) -> tuple[str, str]:
        """What is the same in all events that bring nothing but text, before and after it.

        Writing all of each out takes the server's thread several times as long.
        """
        text = self.id  # Nothing else in an event is this string as a whole.
        before, _, after = self._event(self._chunk({"content": text}, None)).partition(
            json.dumps(text)
        )
        return before, after

    def _chunk(
        self, delta: dict[str, Any], finish_reason: str | None, tokens: range = range(0)
    ) -> dict[str, Any]:
        content: dict[str, Any] = {"text": delta.get("content", "")}
        if self.kind == "chat":
            content = {"delta": delta}
        content["logprobs"] = self._logprobs(tokens)
        return self._envelope(content, finish_reason, streamed=True)

    def _logprobs(self, tokens: range) -> dict[str, Any] | None:
        """Of the tokens at these places; None where nobody asked, or there are none."""
        if not tokens:
            return None
        shape = logprobs.of_chat if self.kind == "chat" else logprobs.of_text
        return shape(self.ticket.completion, tokens, self.tokenizer)

    def _envelope(
        self, content: dict[str, Any], finish_reason: str | None, *, streamed: bool
    ) -> dict[str, Any]:
        choice = {"index": 0, "logprobs": None, **content, "finish_reason": finish_reason}
        return {
            "id": f"{_PREFIXES[self.kind]}-{self.id}",
            "object": _OBJECTS[self.kind, streamed],
            "created": self.created,
            "model": self.model,
            "choices": [choice],
        }

    def _usage(self) -> dict[str, int]:
        completion = self.ticket.completion
        asked, answered = len(completion.request.prompt_ids), len(completion.token_ids)
        return {
            "prompt_tokens": asked,
            "completion_tokens": answered,
            "total_tokens": asked + answered,
        }

    @staticmethod
    def _event(values: dict[str, Any]) -> str:
        return f"data: {json.dumps(values)}\n\n"


def no_such_model(asked: str, served: str) -> ApiError:
    """What OpenAI's clients know."""
    return ApiError(
        404,
        f"the model {asked!r} does not exist; this server has {served!r}",
        param="model",
        code="model_not_found",
    )
