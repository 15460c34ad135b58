"""What a step takes, roughly: whether one with prompts is captured, and whether one is cut, where
steps are padded to one of the numbers of rows compiled for.
"""

from bisect import bisect_left
from dataclasses import dataclass

from parallel.decoder_plan import DecoderPlan
from parallel.plan import DTYPE_BYTES

_READ = 150
"""So many rows take as long to compute as what a step does beside them: it reads all weights."""

_WORTH = 0.85
"""Several steps must take at most so much of the time of one, which is only estimated."""

_LAYER_S = 5e-4
"""What the host takes for a layer of a step that is run call by call."""

_STEP_S = 1e-3
"""What it takes for any step, while the device waits."""

_MOST_CAPTURED = 1024
"""Rows up to which a graph is worth more than attention by cuDNN, which none holds."""

_FLOP_PER_S = {"cuda": 7e14, "cpu": 1e12}
"""What devices reach in half precision, roughly; to cut steps pays more on one that is slower."""


@dataclass(frozen=True)
class StepSizes:
    """The sizes that steps have.

    Attributes:
        buckets: numbers of rows, ascending.
        overhead: so many rows take as long as what each step costs beside its rows.
        calls: so many take as long as the host does to call a step layer by layer.
        captured: rows of a step that is a CUDA graph, and not called so, at most.
    """

    buckets: tuple[int, ...]
    overhead: float = 0.0
    calls: float = 0.0
    captured: int = 0

    @classmethod
    def of(
        cls, plan: DecoderPlan, buckets: tuple[int, ...], device_type: str, *, captured: int = 0
    ) -> "StepSizes":
        """By what the largest rank computes; equal on all ranks."""
        row_s = _row_s(plan, device_type)
        return cls(buckets, _STEP_S / row_s, _calls_s(plan) / row_s, captured)

    def cut(self, num_tokens: int, num_decoding: int) -> int | None:
        """The most tokens of the next step, where several smaller steps are estimated to take less
        time than one, by `_WORTH`; None: they do not.

        Args:
            num_tokens: that wait; where they are more than the largest bucket, that is full.
            num_decoding: of these the ones of sequences that decode: one in every step for each.
        """
        place = bisect_left(self.buckets, num_tokens)
        if place in (0, len(self.buckets)):
            return None
        whole, lower = self.buckets[place], self.buckets[place - 1]
        if lower <= num_decoding:
            return None
        num_full, rest = divmod(num_tokens - num_decoding, lower - num_decoding)
        cost = num_full * self._cost(lower)
        if rest:
            cost += self._cost(self.buckets[bisect_left(self.buckets, rest + num_decoding)])
        return lower if cost <= _WORTH * self._cost(whole) else None

    def _cost(self, num_rows: int) -> float:
        """Of a step, in rows."""
        calls = 0.0 if num_rows <= self.captured else self.calls
        return max(num_rows + _READ, calls) + self.overhead


def rows_worth_capturing(plan: DecoderPlan) -> int:
    """Up to how many rows a GPU waits for the host in a step that is run call by call; equal on all
    ranks.
    """
    return min(int(_calls_s(plan) / _row_s(plan, "cuda")), _MOST_CAPTURED)


def _row_s(plan: DecoderPlan, device_type: str) -> float:
    """Seconds that the largest rank computes for a row."""
    num_weights = max(r.weight_bytes for r in plan.ranks) / DTYPE_BYTES[plan.dtype]
    return 2 * num_weights / _FLOP_PER_S[device_type]


def _calls_s(plan: DecoderPlan) -> float:
    """Seconds that the host takes to call the most layers of a stage."""
    return _LAYER_S * max(stop - start for start, stop in (stage.layers for stage in plan.stages))
