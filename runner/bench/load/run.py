"""A run of the load generator: warm-up, then requests by the loop until there are enough."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from parallel.errors import PreflightError
from runner.bench.load.arrivals import ClosedLoop, Loop, OpenLoop
from runner.bench.load.client import Client
from runner.bench.load.data import Body, Data
from runner.bench.load.timeline import Timeline


@dataclass(frozen=True)
class Load:
    """What is sent, and how.

    Attributes:
        num_requests: most requests, without those of the warm-up; None: any number.
        duration_s: none is sent after so many seconds; None: no matter when.
        num_warmup: sent first, one after the other; they do not count.
    """

    loop: Loop
    data: Data
    num_requests: int | None
    duration_s: float | None
    num_warmup: int
    seed: int


async def run_load(client: Client, load: Load) -> list[Timeline]:
    """Every request's timeline, in the order of sending.

    Raises:
        ConfigError, PreflightError: see `Client.check`; or a request of the warm-up failed.
    """
    await client.check()
    bodies = load.data.bodies(load.seed)
    for body in islice(bodies, load.num_warmup):
        timeline = await client.send(body, due_at=time.perf_counter())
        if timeline.error:
            told = f"{timeline.error}: {timeline.detail}".rstrip(": ")
            raise PreflightError(f"{client.url} does not answer the first request ({told})")
    counted = islice(bodies, load.num_requests)
    ends_at = time.perf_counter() + (load.duration_s or float("inf"))
    if isinstance(load.loop, OpenLoop):
        return await _open(client, load.loop, counted, ends_at, load.seed)
    return await _closed(client, load.loop, counted, ends_at)


async def _open(
    client: Client, loop: OpenLoop, bodies: Iterator[Body], ends_at: float, seed: int
) -> list[Timeline]:
    """Each when it is due; a late answer does not hold back the next request."""
    due_at = time.perf_counter()
    sending: list[asyncio.Task[Timeline]] = []
    async with asyncio.TaskGroup() as tasks:
        for gap_s in loop.gaps_s(seed):
            body = next(bodies, None) if due_at < ends_at else None
            if body is None:
                break
            await asyncio.sleep(max(0.0, due_at - time.perf_counter()))
            sending.append(tasks.create_task(client.send(body, due_at=due_at)))
            due_at += gap_s
    return [task.result() for task in sending]


async def _closed(
    client: Client, loop: ClosedLoop, bodies: Iterator[Body], ends_at: float
) -> list[Timeline]:
    timelines: list[Timeline] = []

    async def send_one_after_the_other() -> None:
        while (due_at := time.perf_counter()) < ends_at:
            body = next(bodies, None)
            if body is None:
                return
            timelines.append(await client.send(body, due_at=due_at))

    async with asyncio.TaskGroup() as clients:
        for _ in range(loop.concurrency):
            clients.create_task(send_one_after_the_other())
    return sorted(timelines, key=lambda timeline: timeline.sent_at)
