"""`Prompt`: one line of an offline run's input that can be answered; `BadLine`: one that cannot.

Not here: how a line says it (`schema`), nor the lines themselves (`reading`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from runner.text.generation_options import GenerationOptions

Endpoint = Literal["/v1/chat/completions", "/v1/completions"]

RequestId = str | int


class Place(NamedTuple):
    """Where a line stands: the name of a file, and the number of the line from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"


@dataclass(frozen=True)
class Prompt:
    """What a line asks for.

    Attributes:
        id: the author's own, unique in the run; None: there is none.
        content: a text to continue, or the messages of a chat.
        endpoint: of OpenAI's batch format; None: the line is of our own.
        model: the name that a line of OpenAI's batch format gives the model.
    """

    place: Place
    id: RequestId | None
    content: str | Sequence[Mapping[str, Any]]
    options: GenerationOptions
    endpoint: Endpoint | None = None
    model: str | None = None


@dataclass(frozen=True)
class BadLine:
    """A line that has no answer, and why; the id where it could be read."""

    place: Place
    id: RequestId | None
    reason: str


@dataclass(frozen=True)
class Answer:
    """What came of a prompt; the stop token, if there is one, counts as generated."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
