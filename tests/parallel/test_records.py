"""JSON values become dataclasses as they are, or an error names the key."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pytest

from parallel.errors import IntegrityError
from parallel.records import read_record


@dataclass(frozen=True)
class Inner:
    size: int
    label: str | None


@dataclass(frozen=True)
class Outer:
    inner: Inner
    pair: tuple[int, int]
    items: tuple[Inner, ...]
    mixed: tuple[int | str, ...]
    by_name: dict[str, float]
    by_number: dict[int, str]
    device: Literal["cpu", "cuda"]
    ready: bool
    anything: dict[str, Any]


RECORD = Outer(
    inner=Inner(3, None),
    pair=(1, 2),
    items=(Inner(4, "four"), Inner(5, "")),
    mixed=("num_tokens", 48),
    by_name={"a": 0.5, "b": 2.0},
    by_number={1: "one", 16: "sixteen"},
    device="cuda",
    ready=False,
    anything={"deep": [1, None, {"x": True}]},
)


def values() -> dict[str, Any]:
    return json.loads(json.dumps(asdict(RECORD)))


def test_a_record_comes_back_as_it_was() -> None:
    assert read_record(Outer, values(), "record") == RECORD


def test_a_whole_number_is_a_float_where_one_is_needed() -> None:
    found = read_record(Outer, values() | {"by_name": {"a": 3}}, "record")
    assert type(found.by_name["a"]) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": {"size": 3}}, r"record\.inner\.label is missing"),
        ({"inner": {"size": 3, "label": None, "x": 1}}, r"record\.inner\.x is no key"),
        ({"inner": [3]}, r"record\.inner is \[3\]; it must be an object"),
        ({"inner": {"size": True, "label": ""}}, r"inner\.size is true; .* a whole number"),
        ({"inner": {"size": 3.0, "label": ""}}, r"inner\.size is 3.0; .* a whole number"),
        ({"inner": {"size": 3, "label": 4}}, r"inner\.label is 4; .* a string"),
        ({"pair": [1]}, r"record\.pair is \[1\]; .* a list of 2 items"),
        ({"pair": "12"}, r"record\.pair is \"12\"; .* a list"),
        ({"items": [{"size": 4, "label": ""}, 7]}, r"record\.items\[1\] is 7; .* an object"),
        ({"mixed": [None]}, r"mixed\[0\] is null; .* a whole number or a string"),
        ({"by_name": {"a": float("nan")}}, r"by_name\[a\] is NaN; .* a finite number"),
        ({"by_name": {"a": "1"}}, r"by_name\[a\] is \"1\"; .* a finite number"),
        ({"by_number": {"01": "x"}}, r"by_number has the key \"01\"; .* a whole number"),
        ({"by_number": {"-1": "x"}}, r"by_number has the key \"-1\"; .* a whole number"),
        ({"by_number": []}, r"by_number is \[\]; .* an object"),
        ({"device": "tpu"}, r"device is \"tpu\"; it must be \"cpu\" or \"cuda\""),
        ({"ready": 0}, r"ready is 0; .* true or false"),
        ({"ready": "a" * 200}, r"ready is \"a{59}\.\.\.; "),
    ],
)
def test_what_cannot_be_right_names_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(IntegrityError, match=message):
        read_record(Outer, values() | change, "record")
