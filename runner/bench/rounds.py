"""The timeline of a benchmark: rounds of requests, each a row of steps; and when there are enough.

All times are seconds of one clock on rank 0, which sees a step when its tokens are on the host.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from runner.bench.stats import WINDOW, is_stable


@dataclass(frozen=True)
class Step:
    """One step of the engine.

    Attributes:
        num_outputs: requests that got a token.
        num_first: those of them that got their first.
    """

    ended_at: float
    num_outputs: int
    num_first: int


@dataclass
class Round:
    """All requests of a workload from sending them to the last token."""

    num_requests: int
    started_at: float
    steps: list[Step] = field(default_factory=list)

    @property
    def elapsed_s(self) -> float:
        return self.steps[-1].ended_at - self.started_at

    @property
    def prefill_s(self) -> float:
        """Until every request has its first token."""
        return self.steps[self._num_prefill_steps - 1].ended_at - self.started_at

    @property
    def decode_steps_s(self) -> list[float]:
        """How long each later token of all requests took; empty for one token each.

        In a pipeline the requests fall into groups, each in a step of its own: what counts is
        when all groups have got a token.
        """
        rounds_of_tokens, num_outputs = [], 0
        before = self._num_prefill_steps - 1
        for index in range(before + 1, len(self.steps)):
            num_outputs += self.steps[index].num_outputs
            if num_outputs >= self.num_requests:
                if num_outputs == self.num_requests:
                    elapsed = self.steps[index].ended_at - self.steps[before].ended_at
                    rounds_of_tokens.append(elapsed)
                before, num_outputs = index, 0
        return rounds_of_tokens

    @property
    def _num_prefill_steps(self) -> int:
        begun = 0
        for count, step in enumerate(self.steps, start=1):
            begun += step.num_first
            if begun == self.num_requests:
                return count
        raise ValueError(f"{begun} of {self.num_requests} requests have begun")


@dataclass(frozen=True)
class Repeat:
    """How often a round is repeated.

    Attributes:
        metric: what must become stable, of one round.
        warmup_rounds: first rounds, which do not count.
        max_rounds: most rounds that count; the benchmark ends there, stable or not.
    """

    metric: Callable[[Round], float]
    warmup_rounds: int
    max_rounds: int

    def metrics(self, rounds: Sequence[Round]) -> list[float]:
        """One value for each round that counts."""
        return [self.metric(round_) for round_ in rounds[self.warmup_rounds :]]

    def is_stable(self, rounds: Sequence[Round]) -> bool:
        return is_stable(self.metrics(rounds))

    def is_done(self, rounds: Sequence[Round]) -> bool:
        counted = len(rounds) - self.warmup_rounds
        return counted >= self.max_rounds or (counted > 0 and self.is_stable(rounds))

    def reported(self, rounds: Sequence[Round]) -> list[Round]:
        """The last rounds, those that the rule has judged."""
        return list(rounds[self.warmup_rounds :][-WINDOW:])
