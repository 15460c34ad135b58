"""What a line of results says, in our own form and in that of OpenAI's batch files; and of which
prompt it is.

Not here: the files of results (`folder`).
"""

import time
from collections.abc import Mapping
from typing import Any

from runner.prompts.prompt import Answer, Place, Prompt

_BATCH_REQUEST = "batch_req"


def result_of(prompt: Prompt, answer: Answer, *, model: str) -> dict[str, Any]:
    """The line for a prompt that was answered, in the form that the prompt was given in.

    Args:
        model: its name, where the prompt does not give one.
    """
    if prompt.endpoint is None:
        return {
            "id": prompt.id,
            "file": prompt.place.file,
            "index": prompt.place.line,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "usage": _usage(answer),
        }
    response = {
        "status_code": 200,
        "request_id": _name("req", prompt.place),
        "body": _body(prompt, answer, prompt.model or model),
    }
    return {
        "id": _name(_BATCH_REQUEST, prompt.place),
        "custom_id": prompt.id,
        "response": response,
        "error": None,
    }


def place_of(result: Mapping[str, Any]) -> Place:
    """Of which prompt a line of results, or of errors, is.

    Raises:
        KeyError, TypeError, ValueError: it is not one of ours.
    """
    if "index" in result:
        return Place(str(result["file"]), int(result["index"]))
    line, file = str(result["id"]).removeprefix(f"{_BATCH_REQUEST}_").split("_", maxsplit=1)
    return Place(file, int(line))


def _name(kind: str, place: Place) -> str:
    """An id that is unique in a run, and from which the place can be told."""
    return f"{kind}_{place.line}_{place.file}"


def _body(prompt: Prompt, answer: Answer, model: str) -> dict[str, Any]:
    if prompt.endpoint == "/v1/chat/completions":
        kind, name = "chat.completion", "chatcmpl"
        said: dict[str, Any] = {"message": {"role": "assistant", "content": answer.text}}
    else:
        kind, name, said = "text_completion", "cmpl", {"text": answer.text}
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": answer.finish_reason}
    return {
        "id": _name(name, prompt.place),
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": _usage(answer),
    }


def _usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }
