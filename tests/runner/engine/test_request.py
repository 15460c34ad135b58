"""What a request may ask for, and that it survives the way between ranks."""

import json
import math
import re
from typing import Any

import pytest

from parallel.errors import ConfigError
from runner.engine.request import Request, SamplingParams


@pytest.mark.parametrize(
    ("name", "lowest", "highest"),
    [
        ("temperature", 0.0, 1e5),
        ("top_k", 0, 2**31 - 1),
        ("top_p", 1e-9, 1.0),
        ("min_p", 0.0, 1.0),
        ("repetition_penalty", 1e-9, 1e9),
        ("seed", 0, 2**64 - 1),
    ],
)
def test_the_ends_of_each_range_are_allowed(name: str, lowest: Any, highest: Any) -> None:
    for value in (lowest, highest):
        assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("temperature", [-0.1, 1e-6, 1e6, math.nan], "use 0 (greedy), or 1e-5 to 1e5"),
        ("top_k", [-1, 2**31, 10**400], "use 0 (all tokens) to 2**31 - 1"),
        ("top_p", [0.0, -0.5, 1.001, math.nan], "use more than 0, at most 1 (all tokens)"),
        ("min_p", [-0.001, 1.5, math.nan], "use 0 (none) to 1"),
        ("repetition_penalty", [0.0, -1.0, 1e10, math.nan], "use 1e-9 to 1e9; 1 means none"),
        ("seed", [-1, 2**64], "use 0 to 2**64 - 1"),
    ],
)
def test_values_outside_are_refused(name: str, values: list[Any], allowed: str) -> None:
    for value in values:
        line = f"{name}={value} is not allowed; {allowed}"
        with pytest.raises(ConfigError, match=f"^{re.escape(line)}$"):
            SamplingParams(**{name: value})


def test_the_default_is_greedy_over_all_tokens() -> None:
    assert SamplingParams() == SamplingParams(0.0, 0, 1.0, 0.0, 1.0, 0)


def test_longest_length_counts_prompt_and_completion() -> None:
    assert Request(0, (4, 5, 6), 10).max_length == 13


def test_json_and_back() -> None:
    sampling = SamplingParams(0.1 + 0.2, 5, 0.9, 0.01, 1.3, 2**64 - 1)
    request = Request(7, (3, 1, 2**31), 10, sampling, frozenset({9, 2}))
    text = json.dumps(request.to_dict())
    assert Request.from_dict(json.loads(text)) == request


def test_json_is_the_same_whatever_order_a_set_has() -> None:
    one, other = (Request(0, (1,), 1, stop_token_ids=frozenset(ids)) for ids in ((8, 0), (0, 8)))
    assert json.dumps(one.to_dict()) == json.dumps(other.to_dict())
