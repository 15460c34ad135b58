"""Events of a stream, as OpenAI's clients read them."""

import json
from typing import Any

import pytest

from runner.serve.answers import Answer, Kind
from runner.serve.ticket import Piece


@pytest.mark.parametrize("kind", ["chat", "text"])
@pytest.mark.parametrize("text", ['say "this"\n', "Zürich \\u00fc 東京 🙂", "\x00\x1f", "%s {0}"])
def test_an_event_of_text_alone_is_like_all_others(kind: Kind, text: str) -> None:
    answer = Answer(kind, 'a "model"', ticket=None, tokenizer=None)  # type: ignore[arg-type]
    first, plain, last = (
        _read(answer._event_of(piece))
        for piece in (Piece("a"), Piece(text), Piece(text, finish_reason="stop"))
    )
    assert plain["choices"][0].pop("finish_reason") is None
    assert last["choices"][0].pop("finish_reason") == "stop"
    assert plain == last
    assert first.keys() == plain.keys()
    choice = plain["choices"][0]
    assert text == (choice["delta"]["content"] if kind == "chat" else choice["text"])


def _read(event: str) -> Any:
    assert event.startswith("data: ")
    assert event.endswith("\n\n")
    return json.loads(event.removeprefix("data: "))
