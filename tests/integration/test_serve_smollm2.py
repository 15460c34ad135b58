"""SmolLM2 behind a server at tp 2 x pp 2: 64 requests of all lengths at once, and how fast."""

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers import Server

from runner.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.dist, pytest.mark.full, pytest.mark.timeout(3600)]

NUM_REQUESTS = 64
LONGEST = 1500
NUM_TOKENS = 8
SHARED = 384
"""Tokens that every longer prompt begins with."""

TEXT = "The history of the lighthouse keepers begins with a storm, a lamp and a very long night. "


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    """Of 1 to `LONGEST` tokens, as many short ones as long ones by the order of magnitude."""
    words = Tokenizer.load(smollm2).encode(TEXT * 200)
    step = math.log(LONGEST) / (NUM_REQUESTS - 1)
    lengths = [round(math.exp(step * n)) for n in range(NUM_REQUESTS)]
    beginning, rest = words[:SHARED], words[SHARED:]
    # Beyond the beginning each has text of its own.
    return [(beginning + rest[7 * n :])[:length] for n, length in enumerate(lengths)]


def start(model: Path, *more: str) -> Any:
    common = ["--dtype", "float32", "--max-model-len", "1536", *more]
    return Server.start(model, *common, "--set", f"scheduler.max_num_seqs={NUM_REQUESTS}")


def complete(server: Server, prompt: Sequence[int], max_tokens: int = NUM_TOKENS) -> Any:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "logprobs": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=1800)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def answers(server: Server, prompts: Sequence[list[int]], concurrency: int) -> Iterator[Any]:
    """The text, and its tokens by name, of each prompt, so many at once."""
    with ThreadPoolExecutor(concurrency) as pool:
        for choice in pool.map(lambda prompt: complete(server, prompt), prompts):
            yield choice["text"], choice["logprobs"]["tokens"]


def test_64_lengths_at_once_get_what_each_gets_alone(
    smollm2: Path, prompts: list[list[int]]
) -> None:
    lengths = [len(prompt) for prompt in prompts]
    assert (lengths[0], lengths[-1]) == (1, LONGEST)
    cut = ["-tp", "2", "-pp", "2"]
    with start(smollm2, *cut) as server:
        alone = list(answers(server, prompts, 1))
    # Another one, whose cache knows nothing of these prompts.
    with start(smollm2, *cut) as server:
        began = time.monotonic()
        together = list(answers(server, prompts, NUM_REQUESTS))
        seconds = time.monotonic() - began
        deadline = time.monotonic() + 10
        while server.metric("kv_cache_usage_perc"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        known = server.metric("prefix_cache_hits_total")
        looked_up = server.metric("prefix_cache_queries_total")
        bubble = server.metric("pipeline_bubble")
    print(
        f"{NUM_REQUESTS} prompts of {sum(lengths)} tokens in {seconds:.0f} s; {known:.0f} of "
        f"{looked_up:.0f} prompt tokens were known; bubble {bubble:.2f}"
    )
    assert together == alone
    assert known >= SHARED // 16 * 16  # One that came later has taken the whole beginning.


def test_a_beginning_that_is_known_is_not_computed_again(
    smollm2: Path, prompts: list[list[int]]
) -> None:
    longest = prompts[-1]
    with start(smollm2) as server:

        def seconds() -> float:
            began = time.monotonic()
            complete(server, longest, 1)
            return time.monotonic() - began

        complete(server, longest[:8], 1)
        first, again = seconds(), min(seconds() for _ in range(3))
        known = server.metric("prefix_cache_hits_total")
    print(f"{LONGEST} tokens: {first:.2f} s, once known {again:.2f} s; {known:.0f} reused")
    assert known >= 3 * (LONGEST - 16)
    assert again < first / 3


def test_batching_is_three_times_as_fast_as_one_at_a_time(
    smollm2: Path, prompts: list[list[int]]
) -> None:
    short = [prompt for prompt in prompts if 8 <= len(prompt) <= 48][:16]
    assert len(short) == 16

    def seconds(server: Server, concurrency: int) -> float:
        began = time.monotonic()
        with ThreadPoolExecutor(concurrency) as pool:
            list(pool.map(lambda prompt: complete(server, prompt, 32), short))
        return time.monotonic() - began

    with start(smollm2) as server:
        seconds(server, 16)  # So that no run pays for the prompts.
        ratios = []
        for _ in range(3):
            one, many = seconds(server, 1), seconds(server, 16)
            ratios.append(one / many)
            print(f"16 x 32 tokens: {one:.1f} s one at a time, {many:.1f} s at once")
    assert max(ratios) >= 3
