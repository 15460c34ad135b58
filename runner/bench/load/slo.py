"""Service level objectives: the latencies that an answer must keep to count as good."""

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.errors import ConfigError
from runner.bench.load.timeline import Timeline

_METRICS = ("ttft", "tpot", "e2e")


@dataclass(frozen=True)
class Slo:
    """Attributes:
    metric: ttft, tpot or e2e.
    """

    metric: str
    limit_ms: float

    @classmethod
    def parse(cls, text: str) -> "Slo":
        """Of `ttft:200`, in milliseconds.

        Raises:
            ConfigError: it is something else.
        """
        metric, _, limit = text.partition(":")
        try:
            limit_ms = float(limit)
        except ValueError:
            limit_ms = 0.0
        if metric not in _METRICS or not 0 < limit_ms < float("inf"):
            raise ConfigError(
                f"--slo {text}: give {', '.join(_METRICS[:-1])} or {_METRICS[-1]} and a limit in "
                "milliseconds, such as ttft:200"
            )
        return cls(metric, limit_ms)

    def is_met(self, timeline: Timeline) -> bool:
        """By an answer without error; one of a single token has no tpot, which cannot be late."""
        seconds = {"ttft": timeline.ttft_s, "tpot": timeline.tpot_s, "e2e": timeline.e2e_s}
        value = seconds[self.metric]
        return value is None or value * 1e3 <= self.limit_ms


def is_good(timeline: Timeline, slos: Sequence[Slo]) -> bool:
    """Complete, and within every limit."""
    return timeline.error is None and all(slo.is_met(timeline) for slo in slos)
