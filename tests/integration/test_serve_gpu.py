"""A server on a GPU and clients of the openai package: what they are answered, and what it says of
itself and of its GPU.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from servers import Server, wait_for

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

NUM_CLIENTS = 64
NUM_TOKENS = 32
PROMPTS = [f"{n} {what}" for n in range(8, 16) for what in ("green bottles", "men of the sea,") * 4]


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[Server]:
    seats = f"scheduler.max_num_seqs={NUM_CLIENTS}"
    cut = ["--device", "cuda", "--dtype", "float32", "--max-model-len", "512"]
    with Server.start(smollm2, *cut, "--set", seats) as server:
        yield server


def complete(server: Server, prompt: str) -> str:
    """As a stream, put together."""
    stream = server.client().completions.create(
        model="model", prompt=prompt, max_tokens=NUM_TOKENS, temperature=0, stream=True
    )
    return "".join(chunk.choices[0].text for chunk in stream)


def test_64_clients_at_once_get_what_each_gets_alone(server: Server) -> None:
    alone = {prompt: complete(server, prompt) for prompt in set(PROMPTS)}
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        together = list(pool.map(lambda prompt: complete(server, prompt), PROMPTS))
    assert together == [alone[prompt] for prompt in PROMPTS]
    assert len(set(together)) > 8
    wait_for(lambda: server.metric("kv_cache_usage_perc") == 0)


def test_a_client_that_leaves_gives_its_blocks_back(server: Server) -> None:
    stream = server.client().completions.create(
        model="model", prompt="Once", max_tokens=480, temperature=0, stream=True
    )
    next(iter(stream))
    assert server.metric("kv_cache_usage_perc") > 0
    stream.close()
    wait_for(lambda: server.metric("kv_cache_usage_perc") == 0)


def test_its_gpu_is_named_by_metrics_and_page(server: Server) -> None:
    complete(server, "One, two,")
    metrics = httpx.get(f"{server.url}/metrics").text
    used = next(m for m in metrics.splitlines() if m.startswith("DCGM_FI_DEV_FB_USED{"))
    assert 'rank="0"' in used
    assert float(used.split()[-1]) > 500, "MiB; the weights alone take more"
    shown = httpx.get(f"{server.url}/status").json()["gpus"]
    assert shown["reason"] is None
    assert shown["by_rank"]["0"]["memory_total_bytes"] > 0


def test_its_end_lets_open_requests_finish(server: Server) -> None:
    stream = server.client().completions.create(
        model="model", prompt="Once", max_tokens=200, temperature=0, stream=True
    )
    pieces = iter(stream)
    next(pieces)
    server.terminate()
    assert list(pieces)[-1].choices[0].finish_reason in ("length", "stop")
    assert server.process.wait(60) == 0
