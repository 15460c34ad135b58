"""From the start of a process to its first token: the process tells when it got where, another one
starts it and reads that.

Both read CLOCK_MONOTONIC, which all processes of a host share.
"""

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import IO

from parallel.errors import ShardlineError
from parallel.launch import signals_raise
from runner.bench.workload import Workload
from runner.engine.completion import check_all_chosen
from runner.engine.control import Control
from runner.engine.scheduler import Output, Scheduler

PROCESS, LOADING, ALLOCATING, FIRST_STEP = "process", "loading", "allocating", "first_step"
"""The phases: interpreter, plan and, of several ranks, their processes; importing torch, joining
the other ranks and loading; the KV cache; the first step.
"""

_PROMPT_OF_ROUND = 0


class FirstTokenFront:
    """Sends one round, reports the end of each phase when all first tokens are there, and leaves.

    Attributes:
        ends: the time at which each phase ended, in order.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        vocab_size: int,
        max_num_seqs: int,
        report: Callable[[str], None],
    ) -> None:
        """
        Args:
            report: takes a line for `time_start`.
        """
        self.ends = {PROCESS: time.monotonic()}
        self._requests = workload.requests(_PROMPT_OF_ROUND, vocab_size)
        self._workload = workload
        self._max_num_seqs = max_num_seqs
        self._report = report
        self._unfinished = workload.num_requests

    def kv_blocks(self, block_size: int) -> int:
        """Asked for when the weights are loaded."""
        self.ends[LOADING] = time.monotonic()
        return self._workload.kv_blocks(block_size, self._max_num_seqs)

    def begin(self, scheduler: Scheduler) -> None:
        """All lengths are known beforehand; the engine refuses what does not fit."""

    def next(self) -> Control:
        """All requests at first; nothing more until they are complete."""
        self.ends.setdefault(ALLOCATING, time.monotonic())
        requests, self._requests = self._requests, []
        return Control(requests, leave=not self._unfinished)

    def take(self, outputs: list[Output]) -> None:
        """The first tokens end the measurement."""
        check_all_chosen(outputs)
        if outputs:
            self.ends.setdefault(FIRST_STEP, time.monotonic())
        self._unfinished -= sum(output.finish_reason is not None for output in outputs)
        if not self._unfinished:
            self._report(json.dumps({"ends": self.ends}))


@dataclass(frozen=True)
class Start:
    """One start of a process.

    Attributes:
        seconds: from starting it until its first token was told.
        phases_s: how long each phase of it took, in order.
    """

    seconds: float
    phases_s: dict[str, float]


class StartError(ShardlineError):
    """A process that was started ended without a token; it has the exit code of that process."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def time_start(command: Sequence[str], environment: Mapping[str, str]) -> Start:
    """Start a process whose front is a `FirstTokenFront`, and wait for its end.

    Raises:
        StartError: it failed; the message is its own last line.
    """
    with tempfile.TemporaryFile("w+") as errors:
        started_at = time.monotonic()
        with _running(command, environment, errors) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            seconds = time.monotonic() - started_at
            exit_code = process.wait()
        if exit_code or not line:
            errors.seek(0)
            said = errors.read().strip().splitlines() or ["the process said nothing"]
            raise StartError(said[-1].removeprefix("shardline: "), exit_code or 1)
    ends = {"": started_at, **json.loads(line)["ends"]}
    phases = {name: end - start for (_, start), (name, end) in pairwise(ends.items())}
    return Start(seconds, phases)


@contextlib.contextmanager
def _running(
    command: Sequence[str], environment: Mapping[str, str], errors: IO[str]
) -> Iterator["subprocess.Popen[str]"]:
    """A process that does not outlive this block, whatever ends it."""
    with signals_raise():
        process = subprocess.Popen(
            command, env=dict(environment), stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait()
