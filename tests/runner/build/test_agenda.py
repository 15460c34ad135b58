"""Which artefact is built next, and how long that takes in all, by a clock of its own."""

import heapq
import itertools
import threading
from collections.abc import Sequence

import torch
from torch import nn

from runner.build.agenda import Agenda, Build
from runner.compiler.segment import Segment, TensorSpec


class Steps(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.count):
            x = torch.relu(x)
        return x


def build(key: str, *, rows: int = 8, num_ops: int = 1, backend: str = "inductor") -> Build:
    segment = Segment(key, Steps(num_ops), (TensorSpec((rows, 4), torch.float32),))
    return Build(backend, segment, segment.export("cpu"), key)


def taken(builds: Sequence[Build]) -> list[str]:
    """By one process that builds them all."""
    agenda, keys = Agenda(builds), []
    for _ in builds:
        one = agenda.take()
        keys.append(one.key)
        agenda.finished(one)
    return keys


def makespan(builds: Sequence[Build], seconds: dict[str, float], num_processes: int) -> float:
    """When the last of some processes ends that take from one agenda."""
    agenda, now = Agenda(builds), 0.0
    running: list[tuple[float, int, Build]] = []
    number, waiting = itertools.count(), len(builds)
    while waiting or running:
        # With one process too few there is always one that can begin, as `take` must not wait here.
        while waiting and len(running) < num_processes and _may_take(agenda):
            one = agenda.take()
            heapq.heappush(running, (now + seconds[one.key], next(number), one))
            waiting -= 1
        now, _, one = heapq.heappop(running)
        agenda.finished(one)
    return now


def _may_take(agenda: Agenda) -> bool:
    full = agenda._num_tuned == agenda._most_tuned
    return not all(one.is_tuned and full for one in agenda._waiting)


def test_the_longest_come_first_behind_the_one_that_precompiles_the_headers() -> None:
    builds = [
        build("engine", backend="tensorrt", num_ops=9),
        build("short", num_ops=2),
        build("tuned and short", rows=1),
        build("long", num_ops=5),
        build("engine of one row", backend="tensorrt", rows=1, num_ops=10),
        build("tuned", rows=1, num_ops=3),
    ]
    assert taken(builds) == [
        "short",
        "tuned",
        "tuned and short",
        "long",
        "engine of one row",
        "engine",
    ]


def test_those_that_tune_by_timing_are_few_at_a_time() -> None:
    agenda = Agenda([build(f"tuned{i}", rows=1) for i in range(3)] + [build("other")])
    other, first, second = (agenda.take() for _ in range(3))
    assert [other.key, first.key, second.key] == ["other", "tuned0", "tuned1"]
    got: list[str] = []
    waiting = threading.Thread(target=lambda: got.append(agenda.take().key))
    waiting.start()
    agenda.finished(other)
    waiting.join(0.2)
    assert waiting.is_alive()
    assert got == []
    agenda.finished(second)
    waiting.join(10)
    assert got == ["tuned2"]


def test_while_the_headers_are_precompiled_others_build_what_needs_none() -> None:
    """That is what another backend builds, and what first chooses its kernels."""
    builds = [build(f"library{i}", num_ops=5 - i) for i in range(4)]
    builds += [build(f"engine{i}", backend="tensorrt", num_ops=5 - i) for i in range(3)]
    agenda = Agenda([*builds, build("tuned", rows=1)])
    first, *others = (agenda.take() for _ in range(4))
    assert first.key == "library3"
    assert [one.key for one in others] == ["tuned", "engine0", "engine1"]
    agenda.finished(others[1])
    agenda.finished(first)
    assert [agenda.take().key for _ in range(4)] == ["library0", "library1", "library2", "engine2"]


def test_where_there_is_no_other_backend_all_wait_for_the_headers() -> None:
    agenda = Agenda([build(f"library{i}", num_ops=5 - i) for i in range(3)])
    assert [agenda.take().key for _ in range(3)] == ["library2", "library0", "library1"]


def test_eight_processes_end_nearly_together() -> None:
    """The artefacts of an 8B model with `auto`, and what they took on an H200 when they were built
    in fixed shares: four tuned ones of 24 s, 22 others by inductor and 26 engines.
    """
    seconds = {f"tuned{i}": 24.0 for i in range(4)}
    seconds |= {f"library{i}": 15.0 + i % 5 for i in range(22)}
    seconds |= {f"engine{i}": 4.0 + i % 7 for i in range(26)}
    builds = [
        build(
            key,
            rows=1 if key.startswith("tuned") else 8,
            backend="tensorrt" if key.startswith("engine") else "inductor",
        )
        for key in seconds
    ]
    work = sum(seconds.values())
    assert makespan(builds, seconds, 8) < 1.1 * work / 8
    assert makespan(builds, seconds, 1) == work
