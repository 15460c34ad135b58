"""Rank 0's side of a benchmark: it sends rounds of requests and reads the clock at every step."""

import time
from collections.abc import Callable

from runner.bench.floor import DeviceLimits
from runner.bench.rounds import Repeat, Round, Step
from runner.bench.workload import Workload
from runner.engine.completion import check_all_chosen
from runner.engine.control import Control
from runner.engine.scheduler import Output, Scheduler


class RoundsFront:
    """Sends a round when the one before is complete, and leaves when there are enough.

    Attributes:
        rounds: what was measured, warm-up included.
        limits: what rank 0's device can do; None before the first round.
    """

    def __init__(
        self,
        workload: Workload,
        repeat: Repeat,
        *,
        vocab_size: int,
        max_num_seqs: int,
        measure_limits: Callable[[], DeviceLimits],
    ) -> None:
        """
        Args:
            measure_limits: called once, when the model is loaded and nothing runs.
        """
        self.rounds: list[Round] = []
        self.limits: DeviceLimits | None = None
        self._workload = workload
        self._repeat = repeat
        self._vocab_size = vocab_size
        self._max_num_seqs = max_num_seqs
        self._measure_limits = measure_limits
        self._unfinished = 0
        self._begun: set[int] = set()

    def kv_blocks(self, block_size: int) -> int:
        """Those of the sequences that run at once."""
        return self._workload.kv_blocks(block_size, self._max_num_seqs)

    def begin(self, scheduler: Scheduler) -> None:
        """All lengths are known beforehand; the engine refuses what does not fit."""

    def next(self) -> Control:
        """A round of requests, if none is under way."""
        if self._unfinished:
            return Control()
        if self.limits is None:
            self.limits = self._measure_limits()
        if self._repeat.is_done(self.rounds):
            return Control(leave=True)
        requests = self._workload.requests(len(self.rounds), self._vocab_size)
        self._unfinished = len(requests)
        self._begun.clear()
        self.rounds.append(Round(len(requests), time.perf_counter()))
        return Control(requests)

    def take(self, outputs: list[Output]) -> None:
        """The tokens of a step: they are on the host, so the devices are done with it."""
        check_all_chosen(outputs)
        now = time.perf_counter()
        first = {output.request_id for output in outputs} - self._begun
        self._begun |= first
        self.rounds[-1].steps.append(Step(now, len(outputs), len(first)))
        self._unfinished -= sum(output.finish_reason is not None for output in outputs)
