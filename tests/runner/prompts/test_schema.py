"""What a line of prompts may say, and what a wrong one is told."""

from typing import Any

import pytest

from parallel.errors import ConfigError
from runner.prompts.prompt import Place, Prompt
from runner.prompts.schema import id_of, parse
from runner.text.generation_options import GenerationOptions

PLACE = Place("a.jsonl", 3)
USER = {"role": "user", "content": "Hi"}
CHAT = "/v1/chat/completions"


def batch(url: str = CHAT, **body: Any) -> dict[str, Any]:
    return {"custom_id": "c", "method": "POST", "url": url, "body": body}


def problem(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(values, PLACE)
    return str(caught.value)


def test_a_prompt_with_everything() -> None:
    asked: dict[str, Any] = {
        "max_tokens": 3,
        "temperature": 1,
        "top_p": 0.5,
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "seed": 7,
        "ignore_eos": True,
    }
    line = {"id": "a", "prompt": "", **asked, "stop": "END"}
    options = GenerationOptions(**asked, stop=("END",))
    assert parse(line, PLACE) == Prompt(PLACE, "a", "", options)


def test_a_prompt_with_nothing_else_leaves_all_to_others() -> None:
    assert parse({"prompt": "x", "seed": None}, PLACE) == Prompt(
        PLACE, None, "x", GenerationOptions()
    )


def test_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    line = {"custom_id": 5, "messages": [USER, {"role": "user", "content": parts}], "stop": ["x"]}
    prompt = parse(line, PLACE)
    assert prompt.id == 5
    assert [message["content"] for message in prompt.content] == ["Hi", "ab"]  # type: ignore[index]
    assert prompt.options == GenerationOptions(stop=("x",))


def test_openais_chat() -> None:
    prompt = parse(batch(model="m", messages=[USER], max_completion_tokens=4, n=1), PLACE)
    assert (prompt.id, prompt.endpoint, prompt.model) == ("c", CHAT, "m")
    assert prompt.content == [{**USER, "name": None}]
    assert prompt.options == GenerationOptions(max_tokens=4)


def test_openais_completion() -> None:
    prompt = parse(batch("/v1/completions", prompt="x", max_tokens=4, stream=False), PLACE)
    assert (prompt.endpoint, prompt.model, prompt.content) == ("/v1/completions", None, "x")
    assert prompt.options == GenerationOptions(max_tokens=4)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({}, "give either prompt or messages; neither is there"),
        ({"prompt": "x", "messages": [USER]}, "give either prompt or messages; both are there"),
        ({"prompt": "x", "max_token": 1}, "max_token: unknown key; did you mean max_tokens?"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens: 0 is too small; use 1 or more"),
        ({"prompt": "x", "max_tokens": 1.5}, "max_tokens: 1.5 is a number with a fraction; use a"),
        ({"prompt": "x", "temperature": "1"}, "temperature: '1' is a string; use a number"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature: nan is not finite"),
        ({"prompt": "x", "seed": True}, "seed: true is true or false; use a whole number or null"),
        ({"prompt": "x", "stop": ["a", ""]}, "stop.1: empty; give a value"),
        ({"prompt": "x", "id": True}, "id: true is no id; use a string or a whole number"),
        ({"prompt": "x", "id": "1", "custom_id": "1"}, "id and custom_id are two names of one"),
        ({"prompt": ["x"]}, "prompt: ['x'] is a list; use a string"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: missing; it is needed"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text can be"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages.0.content: a part is not"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "only text"),
        (batch("/v1/embeddings"), "url: '/v1/embeddings' is not allowed; use /v1/chat/completions"),
        (batch(messages=[USER], n=2), "body.n: 2 is not allowed; use 1"),
        (batch(messages=[USER], stream=True), "body.stream: true is not allowed; use False"),
        (batch(prompt="x"), "body.prompt: unknown key"),
        (batch(), "body.messages: missing; it is needed: the chat so far"),
        ({"url": CHAT, "prompt": "x"}, "custom_id: missing"),
    ],
)
def test_a_wrong_line_is_told_what_is_wrong(line: dict[str, Any], told: str) -> None:
    assert told in problem(line)


def test_all_that_is_wrong_is_told_in_one_line() -> None:
    assert problem({"prompt": 1, "stop": 2}).count("\n") == 0
    assert "stop: 2 is a whole number" in problem({"prompt": 1, "stop": 2})
    assert "prompt: 1 is a whole number" in problem({"prompt": 1, "stop": 2})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"id": "a"}, "a"),
        ({"custom_id": 1}, 1),
        ({"id": []}, None),
        ({"id": True}, None),
        ({}, None),
    ],
)
def test_a_wrong_line_may_have_an_id_all_the_same(line: dict[str, Any], expected: Any) -> None:
    assert id_of(line) == expected
