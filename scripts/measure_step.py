"""Measure the host's part of a step: 64 sequences of a model of one tiny layer, streamed to clients
over HTTP. Prints a line for people and, last, a JSON object; ends with 1 beyond the bound.

What counts is everything of the engine's thread but the layer itself: requests, schedule, layout,
tokens, text, metrics. Its processor time does not depend on what else the machine does. Beside it
stands the processor time of the web server's thread, with which it shares an interpreter.
"""

import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any, NamedTuple

import torch
from fastapi import FastAPI

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import rank_jobs  # noqa: E402
from checkpoints import add_tokenizer, make_checkpoint  # noqa: E402

from parallel.context import ParallelContext  # noqa: E402
from parallel.launch import RankEnv  # noqa: E402
from runner.config.schema import ServerConfig  # noqa: E402
from runner.engine.control import Control  # noqa: E402
from runner.engine.loading import load_stage  # noqa: E402
from runner.engine.rank import loop, make_engine  # noqa: E402
from runner.engine.request_maker import RequestMaker  # noqa: E402
from runner.serve.errors import ApiError  # noqa: E402
from runner.serve.front import ServeFront  # noqa: E402
from runner.serve.guard import Guard  # noqa: E402
from runner.serve.http_server import listen, serving  # noqa: E402
from runner.serve.metrics import Metrics  # noqa: E402
from runner.serve.openai_api import OpenAIRoutes  # noqa: E402

NUM_SEQS = 64
NUM_STEPS = 300
MOST_MS = 1.5

CLIENTS = """
import json, selectors, socket, sys
port, num_streams, num_tokens = map(int, sys.argv[1:])
selector = selectors.DefaultSelector()
for number in range(num_streams):
    body = {"prompt": [3 + number, 5, 7], "max_tokens": num_tokens, "temperature": 0}
    content = json.dumps(body | {"stream": True}).encode()
    stream = socket.create_connection(("127.0.0.1", port))
    head = f"POST /v1/completions HTTP/1.1\\r\\nHost: here\\r\\nContent-Length: {len(content)}"
    stream.sendall(f"{head}\\r\\nConnection: close\\r\\n\\r\\n".encode() + content)
    selector.register(stream, selectors.EVENT_READ)
while selector.get_map():
    for key, _ in selector.select():
        if not key.fileobj.recv(65536):
            selector.unregister(key.fileobj)
"""
"""A process of its own: streams that are read to their end."""


class Step(NamedTuple):
    """Of one step, without its layer, in seconds: what passed, and what the processor did for the
    engine's thread and, with its layer, for the web server's.
    """

    wall: float
    engine: float
    http: float


class TimedFront(ServeFront):
    """Notes clocks, and how much of the engine's the layer took, at the end of every step."""

    def watch(self, stage_runner: Any) -> None:
        """Time the layer apart."""
        self.steps: list[Step] = []
        self._clocks = clocks()
        self._layer = (0.0, 0.0)
        self._last: tuple[float, ...] | None = None
        forward = stage_runner._forward

        def timed(*args: Any) -> Any:
            began = self._clocks()
            outputs = forward(*args)
            wall, engine, _ = difference(self._clocks(), began)
            self._layer = (self._layer[0] + wall, self._layer[1] + engine)
            return outputs

        stage_runner._forward = timed

    def next(self) -> Control:
        control = super().next()
        now = self._clocks()
        is_full = self._scheduler is not None and self._scheduler.load().num_running == NUM_SEQS
        if self._last and is_full and not control.added:
            self.steps.append(Step(*difference(difference(now, self._last), (*self._layer, 0.0))))
        self._last, self._layer = now, (0.0, 0.0)
        return control


def clocks() -> Callable[[], tuple[float, ...]]:
    """What reads, in seconds: time, processor time of its caller's thread and of the server's."""
    server = next(thread for thread in threading.enumerate() if thread.name == "http")
    assert server.ident is not None
    http = time.pthread_getcpuclockid(server.ident)
    return lambda: (time.perf_counter(), time.thread_time(), time.clock_gettime(http))


def difference(later: tuple[float, ...], earlier: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(b - a for a, b in zip(earlier, later, strict=True))


def clients(front: ServeFront, port: int) -> None:
    """Run them, and end the engine."""
    while front.state != "ready":
        time.sleep(0.01)
    arguments = [str(number) for number in (port, NUM_SEQS, NUM_STEPS)]
    subprocess.run([sys.executable, "-c", CLIENTS, *arguments], check=True)
    front.drain(0)


def measure(folder: Path) -> list[Step]:
    """The steps in which all sequences ran."""
    changes = {"num_hidden_layers": 1, "vocab_size": 259, "eos_token_id": None}
    make_checkpoint("llama", folder, **changes, max_position_embeddings=512)
    add_tokenizer(folder)
    settings = {"scheduler.max_num_seqs": NUM_SEQS}
    job = rank_jobs.prepare(str(folder), [1], settings)
    context = ParallelContext.open(job.plan.topology, RankEnv(0, 1), device_type="cpu")
    maker = RequestMaker(job)
    front = TimedFront(
        maker,
        Metrics(),
        max_queue_size=0,
        max_num_seqs=NUM_SEQS,
        max_model_len=512,
        request_timeout_s=None,
    )
    app = FastAPI()
    app.include_router(OpenAIRoutes(front, maker, model="tiny", vocab_size=259).router)
    guard = Guard(app, key=None, max_bytes=1000, shape=ApiError.body)
    listener = listen(ServerConfig(port=0))
    stage_runner = load_stage(job, context)
    with serving(guard, listener, grace_s=lambda: 0.0):
        front.watch(stage_runner)
        reading = Thread(target=clients, args=(front, listener.getsockname()[1]))
        reading.start()
        loop(make_engine(job, stage_runner, front), front)
        reading.join()
    return front.steps[10:]


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        steps = measure(Path(folder))
    wall_ms, cpu_ms, http_ms = (median(values) * 1e3 for values in zip(*steps, strict=True))
    commit = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(commit, cwd=ROOT, capture_output=True, text=True, check=False)
    print(
        f"{len(steps)} steps of {NUM_SEQS} sequences: the host's part takes {cpu_ms:.2f} ms of "
        f"processor time, {wall_ms:.2f} ms pass; the web server's thread takes "
        f"{http_ms * 1e3 / NUM_SEQS:.1f} us a token (medians)"
    )
    result = {
        "num_steps": len(steps),
        "cpu_ms": round(cpu_ms, 3),
        "wall_ms": round(wall_ms, 3),
        "http_us_a_token": round(http_ms * 1e3 / NUM_SEQS, 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": found.stdout.strip(),
    }
    print(json.dumps(result))
    return 0 if cpu_ms <= MOST_MS else 1


if __name__ == "__main__":
    sys.exit(main())
