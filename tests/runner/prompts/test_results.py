"""A line of results has the form of its prompt, and tells which one it is of."""

from typing import Any, get_args

import pytest

from runner.prompts.prompt import Answer, Endpoint, Place, Prompt
from runner.prompts.results import place_of, result_of
from runner.text.generation_options import GenerationOptions

ANSWER = Answer("said", "stop", 5, 3)
USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


def prompt(endpoint: Endpoint | None, model: str | None = None, file: str = "my_a.jsonl") -> Prompt:
    return Prompt(Place(file, 12), "mine", "x", GenerationOptions(), endpoint, model)


def test_our_own_form() -> None:
    assert result_of(prompt(None), ANSWER, model="m") == {
        "id": "mine",
        "file": "my_a.jsonl",
        "index": 12,
        "text": "said",
        "finish_reason": "stop",
        "usage": USAGE,
    }


@pytest.mark.parametrize(
    ("endpoint", "kind", "said"),
    [
        (
            "/v1/chat/completions",
            "chat.completion",
            {"message": {"role": "assistant", "content": "said"}},
        ),
        ("/v1/completions", "text_completion", {"text": "said"}),
    ],
)
def test_openais_form(endpoint: Any, kind: str, said: dict[str, Any]) -> None:
    result = result_of(prompt(endpoint, "given"), ANSWER, model="m")
    assert list(result) == ["id", "custom_id", "response", "error"]
    assert (result["custom_id"], result["error"]) == ("mine", None)
    assert result["response"]["status_code"] == 200
    body = result["response"]["body"]
    assert (body["object"], body["model"], body["usage"]) == (kind, "given", USAGE)
    assert body["choices"] == [{"index": 0, **said, "logprobs": None, "finish_reason": "stop"}]


def test_a_model_that_the_line_does_not_name() -> None:
    result = result_of(prompt("/v1/completions"), ANSWER, model="m")
    assert result["response"]["body"]["model"] == "m"


@pytest.mark.parametrize("endpoint", [None, *get_args(Endpoint)])
@pytest.mark.parametrize("file", ["a.jsonl", "_1_2_.jsonl", "batch_req_3_b"])
def test_every_form_says_which_prompt_it_is_of(endpoint: Any, file: str) -> None:
    asked = prompt(endpoint, file=file)
    assert place_of(result_of(asked, ANSWER, model="m")) == asked.place


@pytest.mark.parametrize("line", [{}, {"id": 3}, {"id": "batch_req_x_y"}, {"index": "a"}])
def test_a_line_of_someone_else(line: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        place_of(line)
