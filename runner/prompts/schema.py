"""What a line of prompts may say: our own form, and that of OpenAI's batch files.

Strict as the configuration is: an unknown key is an error, with the key that was perhaps meant.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, ValidationError, model_validator

from parallel.errors import ConfigError
from runner.config.messages import explain
from runner.config.problems import dotted, shown
from runner.config.section import Count, Section, Text
from runner.prompts.prompt import Endpoint, Place, Prompt, RequestId
from runner.text.generation_options import GenerationOptions


def _joined(content: Any) -> Any:
    """Text that comes in parts, `[{"type": "text", "text": ...}, ...]`, as one string."""
    return "".join(map(_text_of, content)) if isinstance(content, list) else content


def _text_of(part: Any) -> str:
    if isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text":
        text = part["text"]
        if isinstance(text, str):
            return text
    raise ValueError('a part is not {"type": "text", "text": "..."}; only text can be read')


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _identifying(given: Any) -> Any:
    # By exact type: to Python a bool is an int.
    if given is None or (type(given) in (str, int) and given != ""):
        return given
    raise ValueError(f"{shown(given)} is no id; use a string or a whole number")


Id = Annotated[Any, AfterValidator(_identifying)]

SectionT = TypeVar("SectionT", bound=Section)


class Message(Section):
    """One message of a chat."""

    role: Text
    """Who speaks: system, user or assistant."""

    content: Annotated[str, BeforeValidator(_joined)]
    """What is said."""

    name: Text | None = None
    """Who speaks, by name; only some chat templates show it."""


class Options(Section):
    """How to answer; what is null, the command's flags or the model's folder decide."""

    max_tokens: Count | None = None
    """Most tokens to generate."""

    temperature: float | None = None
    """Divides the logits; 0 is greedy."""

    top_p: float | None = None
    """Keep the likeliest tokens up to this probability."""

    top_k: int | None = None
    """Keep this many tokens; 0 is all."""

    min_p: float | None = None
    """Drop tokens below this share of the best."""

    repetition_penalty: float | None = None
    """Divides the logits of tokens that were seen; 1 is none."""

    seed: int | None = None
    """Same seed, same text."""

    stop: Annotated[list[Text], BeforeValidator(_listed)] | None = None
    """Strings that end the text."""

    ignore_eos: bool | None = None
    """Go on after tokens that end a text."""

    def options(self) -> GenerationOptions:
        """These as the engine's side knows them."""
        values = {name: getattr(self, name) for name in Options.model_fields}
        stop = None if self.stop is None else tuple(self.stop)
        return GenerationOptions(**values | {"stop": stop})


class PromptLine(Options):
    """A line of our own form."""

    id: Id = None
    custom_id: Id = None
    prompt: str | None = None
    messages: list[Message] | None = None

    @model_validator(mode="after")
    def _has_one_of_each(self) -> "PromptLine":
        if (self.prompt is None) == (self.messages is None):
            both = "both are" if self.prompt is not None else "neither is"
            raise ValueError(f"give either prompt or messages; {both} there")
        if self.id is not None and self.custom_id is not None:
            raise ValueError("id and custom_id are two names of one thing; give one of them")
        return self

    def prompt_at(self, place: Place) -> Prompt:
        own_id = self.custom_id if self.id is None else self.id
        content = _conversation(self.messages) if self.prompt is None else self.prompt
        return Prompt(place, own_id, content, self.options())


class _Body(Options):
    """What both endpoints take; the values that are fixed are those that change nothing."""

    model: Text | None = None
    n: Literal[1] | None = None
    stream: Literal[False] | None = None
    user: str | None = None


class ChatBody(_Body):
    """The body of /v1/chat/completions."""

    messages: list[Message]
    """The chat so far."""

    max_completion_tokens: Count | None = None
    """Most tokens to generate; the newer name of max_tokens."""

    def content(self) -> list[dict[str, Any]]:
        return _conversation(self.messages)

    def options(self) -> GenerationOptions:
        newer = GenerationOptions(max_tokens=self.max_completion_tokens)
        return newer.over(super().options())


class CompletionBody(_Body):
    """The body of /v1/completions."""

    prompt: str
    """The text to continue."""

    def content(self) -> str:
        return self.prompt


class BatchLine(Section):
    """A line of OpenAI's batch format, all but its body."""

    custom_id: Text
    """Names the request in the results."""

    method: Literal["POST"]
    """Always POST."""

    url: Endpoint
    """Which kind of request it is."""

    body: dict[str, Any]
    """The request."""


def parse(values: dict[str, Any], place: Place) -> Prompt:
    """The prompt that a line's JSON object describes.

    Raises:
        ConfigError: a key is unknown or missing, or has a value that cannot be.
    """
    if not values.keys() & {"body", "method", "url"}:
        return _validated(PromptLine, values).prompt_at(place)
    line = _validated(BatchLine, values)
    kind: type[ChatBody] | type[CompletionBody]
    kind = ChatBody if line.url == "/v1/chat/completions" else CompletionBody
    body = _validated(kind, line.body, below="body")
    return Prompt(place, line.custom_id, body.content(), body.options(), line.url, body.model)


def id_of(values: dict[str, Any]) -> RequestId | None:
    """The id of a line that may be wrong otherwise; None where it has none."""
    given = values.get("custom_id") if values.get("id") is None else values["id"]
    return given if type(given) in (str, int) else None


def _validated(kind: type[SectionT], values: dict[str, Any], *, below: str = "") -> SectionT:
    """Raises ConfigError: all that is wrong, in one line that names the keys."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [
            ": ".join(filter(None, (dotted(((below,) if below else ()) + loc), sentence)))
            for loc, sentence in explain(error, kind)
        ]
        raise ConfigError("; ".join(problems)) from error


def _conversation(messages: list[Message] | None) -> list[dict[str, Any]]:
    return [message.model_dump() for message in messages or ()]
