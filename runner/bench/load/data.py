"""What is asked: random token ids, lines of JSON, or conversations as ShareGPT's files have them.

None of it needs a tokenizer or a network.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError
from runner.config.json_file import read_text

Body = dict[str, Any]
"""A request without `model` and `stream`; with `messages` it is one of a chat."""


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens, uniform between two that are both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, *, option: str) -> "Lengths":
        """Of `128` or `64:256`.

        Raises:
            ConfigError: it is something else.
        """
        low, _, high = text.partition(":")
        bounds = [low, high or low]
        if all(bound.isascii() and bound.isdigit() for bound in bounds):
            lengths = cls(*map(int, bounds))
            if 1 <= lengths.low <= lengths.high:
                return lengths
        raise ConfigError(f"{option} {text}: give a number of tokens, 128, or a range, 64:256")

    def draw(self, source: random.Random) -> int:
        return source.randint(self.low, self.high)


@dataclass(frozen=True)
class RandomData:
    """Prompts of random token ids below `vocab_size`, of known length on any server."""

    input_len: Lengths
    output_len: Lengths
    vocab_size: int

    def bodies(self, seed: int) -> Iterator[Body]:
        """Without end; the same seed gives the same."""
        source = random.Random(seed)
        while True:
            length = self.input_len.draw(source)
            prompt = [source.randrange(self.vocab_size) for _ in range(length)]
            yield {"prompt": prompt, "max_tokens": self.output_len.draw(source)}


@dataclass(frozen=True)
class FileData:
    """Requests out of a file, in random order, and again from the beginning when all were sent."""

    requests: Sequence[Body]
    output_len: Lengths

    def bodies(self, seed: int) -> Iterator[Body]:
        """Without end; a request that does not say `max_tokens` gets one of `output_len`."""
        source = random.Random(seed)
        while True:
            for body in source.sample(self.requests, len(self.requests)):
                yield {"max_tokens": self.output_len.draw(source)} | body


Data = RandomData | FileData


def read_jsonl(path: Path) -> list[Body]:
    """Lines of `{"prompt": ...}` or `{"messages": ...}`; other keys are sent as they are.

    Raises:
        ConfigError: a line is something else, or there are none.
    """
    lines = enumerate(read_text(path).splitlines(), start=1)
    return _some([_body(line, f"{path}:{number}") for number, line in lines if line.strip()], path)


def read_sharegpt(path: Path) -> list[Body]:
    """The first thing that a human says in each of a list of `{"conversations": [...]}`.

    Raises:
        ConfigError: the file is something else, or nobody says anything.
    """
    conversations = _parse(read_text(path), str(path))
    if not isinstance(conversations, list):
        raise ConfigError(f"{path} is no list; ShareGPT's form is [{{'conversations': [...]}}]")
    said = [text for entry in conversations if (text := _first_human(entry))]
    return _some([{"messages": [{"role": "user", "content": text}]} for text in said], path)


def _body(line: str, place: str) -> Body:
    values = _parse(line, place)
    if not isinstance(values, dict) or ("prompt" in values) == ("messages" in values):
        raise ConfigError(f"{place}: give an object with either prompt or messages")
    return {key: value for key, value in values.items() if key not in ("id", "custom_id", "model")}


def _first_human(entry: Any) -> str | None:
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and turn.get("from") in ("human", "user"):
            text = turn.get("value")
            return text if isinstance(text, str) else None
    return None


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON: {error}") from None


def _some(requests: list[Body], path: Path) -> list[Body]:
    if not requests:
        raise ConfigError(f"{path} holds no prompts")
    return requests
