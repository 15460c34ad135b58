"""Measure the host's part of a step: 64 sequences of a model of one tiny layer, behind a server's
front. Prints a line for people and, last, a JSON object; ends with 1 beyond the bound.

What counts is everything of the engine's thread but the layer itself: requests, schedule, layout,
tokens, text, metrics. Its processor time does not depend on what else the machine does.
"""

import asyncio
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import rank_jobs  # noqa: E402
from checkpoints import add_tokenizer, make_checkpoint  # noqa: E402

from parallel.context import ParallelContext  # noqa: E402
from parallel.launch import RankEnv  # noqa: E402
from runner.engine.control import Control  # noqa: E402
from runner.engine.loading import load_stage  # noqa: E402
from runner.engine.rank import loop, make_engine  # noqa: E402
from runner.engine.request_maker import RequestMaker  # noqa: E402
from runner.serve.front import ServeFront  # noqa: E402
from runner.serve.metrics import Metrics  # noqa: E402
from runner.text.generation_options import GenerationOptions  # noqa: E402

NUM_SEQS = 64
NUM_STEPS = 300
MOST_MS = 1.5


class TimedFront(ServeFront):
    """Notes both clocks, and how much of each the layer took, at the end of every step."""

    def watch(self, stage_runner: Any) -> None:
        """Time the layer apart."""
        self.steps: list[tuple[float, float]] = []
        self._layer = [0.0, 0.0]
        self._last: tuple[float, float] | None = None
        forward = stage_runner._forward

        def timed(*args: Any) -> Any:
            began = clocks()
            outputs = forward(*args)
            for index, (start, stop) in enumerate(zip(began, clocks(), strict=True)):
                self._layer[index] += stop - start
            return outputs

        stage_runner._forward = timed

    def next(self) -> Control:
        control = super().next()
        now = clocks()
        is_full = self._scheduler is not None and self._scheduler.load().num_running == NUM_SEQS
        if self._last and is_full and not control.added:
            spent = [n - b - x for n, b, x in zip(now, self._last, self._layer, strict=True)]
            self.steps.append((spent[0], spent[1]))
        self._last, self._layer = now, [0.0, 0.0]
        return control


def clocks() -> tuple[float, float]:
    """Time that passes, and processor time of this thread."""
    return time.perf_counter(), time.thread_time()


async def clients(front: ServeFront) -> None:
    """64 streams, read to their end."""
    while front.state != "ready":
        await asyncio.sleep(0.01)
    options = GenerationOptions(max_tokens=NUM_STEPS, temperature=0)
    tickets = [front.submit([3 + n, 5, 7], options, None) for n in range(NUM_SEQS)]
    for ticket in tickets:
        while not (await ticket.pieces.get()).is_last:
            pass
    front.drain(0)


def measure(folder: Path) -> list[tuple[float, float]]:
    """Seconds of each step with all sequences: passed, and of the processor."""
    changes = {"num_hidden_layers": 1, "vocab_size": 259, "eos_token_id": None}
    make_checkpoint("llama", folder, **changes, max_position_embeddings=512)
    add_tokenizer(folder)
    settings = {"scheduler.max_num_seqs": NUM_SEQS}
    job = rank_jobs.prepare(str(folder), [1], settings)
    context = ParallelContext.open(job.plan.topology, RankEnv(0, 1), device_type="cpu")
    front = TimedFront(
        RequestMaker(job),
        Metrics(),
        max_queue_size=0,
        max_num_seqs=NUM_SEQS,
        max_model_len=512,
        request_timeout_s=None,
    )
    stage_runner = load_stage(job, context)
    front.watch(stage_runner)
    reading = Thread(target=lambda: asyncio.run(clients(front)))
    reading.start()
    loop(make_engine(job, stage_runner, front), front)
    reading.join()
    return front.steps[10:]


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        steps = measure(Path(folder))
    wall_ms, cpu_ms = (median(values) * 1e3 for values in zip(*steps, strict=True))
    commit = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(commit, cwd=ROOT, capture_output=True, text=True, check=False)
    print(
        f"{len(steps)} steps of {NUM_SEQS} sequences: the host's part takes {cpu_ms:.2f} ms of "
        f"processor time, {wall_ms:.2f} ms pass (medians)"
    )
    result = {
        "num_steps": len(steps),
        "cpu_ms": round(cpu_ms, 3),
        "wall_ms": round(wall_ms, 3),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": found.stdout.strip(),
    }
    print(json.dumps(result))
    return 0 if cpu_ms <= MOST_MS else 1


if __name__ == "__main__":
    sys.exit(main())
