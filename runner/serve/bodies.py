"""What the bodies of requests may say: those of offline runs, and what only a server can do.

Strict: a key that would do nothing is refused by name, unless its value is the one that changes
nothing. Not here: how a body becomes tokens.
"""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from runner.config.messages import explain
from runner.config.problems import dotted
from runner.config.section import Seconds, Section
from runner.engine.logprobs import MAX_LOGPROBS
from runner.prompts.schema import ChatBody, CompletionBody, Options
from runner.serve.errors import ApiError

BodyT = TypeVar("BodyT", bound=Section)
_NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


class StreamOptions(Section):
    """What a stream holds beside the text."""

    include_usage: bool = False
    """Whether a last event counts the tokens."""


class _Served(Options):
    """Keys of both endpoints that an offline run does not have."""

    stream_options: StreamOptions | None = None
    timeout: Seconds | None = None
    """Seconds that the answer may take."""
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None


class ChatRequest(_Served, ChatBody):
    """The body of POST /v1/chat/completions."""

    stream: bool | None = None  # type: ignore[assignment]
    """Whether the answer comes piece by piece."""
    logprobs: bool | None = None
    """Whether to tell how likely each token was."""
    top_logprobs: _NumLogprobs | None = None
    """Of how many of the likeliest tokens at each place to tell it, too."""

    @model_validator(mode="after")
    def _asks_for_all(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs; set it to true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """See `runner.engine.request.Request`."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Served, CompletionBody):
    """The body of POST /v1/completions."""

    prompt: str | list[int] = Field(...)  # type: ignore[assignment]
    """The text to continue, or its token ids."""
    stream: bool | None = None  # type: ignore[assignment]
    """Whether the answer comes piece by piece."""
    logprobs: _NumLogprobs | None = None
    """Of how many of the likeliest tokens to tell how likely they were, beside that of each token
    itself.
    """
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """See `runner.engine.request.Request`."""
        return self.logprobs


def parse_body(kind: type[BodyT], body: bytes) -> BodyT:
    """The body as its schema has it.

    Raises:
        ApiError: 400: it is no JSON object, or has a key or a value that cannot be.
    """
    try:
        values: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not a JSON object")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        faults = [(dotted(loc), sentence) for loc, sentence in explain(error, kind)]
        message = "; ".join(": ".join(filter(None, fault)) for fault in faults)
        raise ApiError(400, message, param=faults[0][0] or None) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
