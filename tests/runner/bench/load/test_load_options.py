"""Objectives, arrivals and prompts."""

import json
import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from parallel.errors import ConfigError
from runner.bench.load.arrivals import OpenLoop
from runner.bench.load.data import FileData, Lengths, RandomData, read_jsonl, read_sharegpt
from runner.bench.load.slo import Slo, is_good
from runner.bench.load.timeline import Timeline


def test_an_objective_includes_its_limit() -> None:
    timeline = Timeline(0.0, 0.0, [0.25, 1.25], 1.25, output_tokens=3)
    assert [Slo.parse(text).is_met(timeline) for text in ("ttft:250", "ttft:249")] == [True, False]
    assert [Slo.parse(text).is_met(timeline) for text in ("tpot:500", "tpot:499")] == [True, False]
    assert is_good(timeline, [Slo("e2e", 1250)])
    assert not is_good(timeline, [Slo("e2e", 1250), Slo("ttft", 1)])


@pytest.mark.parametrize("text", ["ttft", "ttft:", "itl:5", "ttft:0", "ttft:-1", "tpot:nan", ":5"])
def test_no_objective(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--slo .* ttft, tpot or e2e"):
        Slo.parse(text)


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (100.0, 0.1)])
def test_arrivals_have_their_rate_and_burstiness(burstiness: float, variation: float) -> None:
    """A gamma distribution's deviation is its mean / sqrt(shape)."""
    gaps = list(islice(OpenLoop(20.0, burstiness).gaps_s(seed=3), 20_000))
    assert np.mean(gaps) == pytest.approx(1 / 20, rel=0.05)
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(variation, rel=0.05)
    assert gaps[:9] == list(islice(OpenLoop(20.0, burstiness).gaps_s(seed=3), 9))


def test_random_prompts_keep_their_bounds_and_seed() -> None:
    data = RandomData(Lengths(2, 5), Lengths(7, 8), vocab_size=11)
    bodies = list(islice(data.bodies(1), 300))
    assert {len(body["prompt"]) for body in bodies} == {2, 3, 4, 5}
    assert {body["max_tokens"] for body in bodies} == {7, 8}
    assert {i for body in bodies for i in body["prompt"]} == set(range(11))
    assert bodies == list(islice(data.bodies(1), 300))
    assert bodies != list(islice(data.bodies(2), 300))


def test_a_file_is_used_up_before_it_is_used_again() -> None:
    data = FileData([{"prompt": "a"}, {"prompt": "b", "max_tokens": 2}], Lengths(9, 9))
    first = list(islice(data.bodies(0), 2))
    assert sorted(first, key=str) == [
        {"max_tokens": 2, "prompt": "b"},
        {"max_tokens": 9, "prompt": "a"},
    ]
    assert sorted(islice(data.bodies(0), 4), key=str) == sorted(first * 2, key=str)


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    chat = {"messages": [{"role": "user", "content": "x"}], "temperature": 0}
    file.write_text(json.dumps({"id": 1, "prompt": "a"}) + "\n\n" + json.dumps(chat) + "\n")
    assert read_jsonl(file) == [{"prompt": "a"}, chat]


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "a"}', '{"prompt": "a", "messages": []}'])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(ConfigError, match=r"p\.jsonl:2"):
        read_jsonl(file)


def test_sharegpt(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    said = [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "hi"}]
    entries = [{"conversations": said}, {"conversations": []}, {"id": 2}, 7]
    file.write_text(json.dumps(entries))
    assert read_sharegpt(file) == [{"messages": [{"role": "user", "content": "hi"}]}]
    file.write_text(json.dumps(entries[1:]))
    with pytest.raises(ConfigError, match="no prompts"):
        read_sharegpt(file)


def test_lengths() -> None:
    assert Lengths.parse("5", option="--x") == Lengths(5, 5)
    assert Lengths.parse("5:9", option="--x") == Lengths(5, 9)
    assert {Lengths(5, 6).draw(random.Random(i)) for i in range(20)} == {5, 6}
    for text in ("", "0", "9:5", "a", "1:2:3", "-1", "²"):
        with pytest.raises(ConfigError, match="--x"):
            Lengths.parse(text, option="--x")
