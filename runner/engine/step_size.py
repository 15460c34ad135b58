"""Whether a step is cut, where steps are padded to one of the numbers of rows compiled for."""

from bisect import bisect_left
from dataclasses import dataclass

from parallel.decoder_plan import DecoderPlan
from parallel.plan import DTYPE_BYTES

_FLAT = 256
"""Rows up to which a step takes about as long as one of a single row, for it reads all weights."""

_WORTH = 0.75
"""Several steps must take at most so much of the time of one, which is only estimated."""

_LAYER_S = 2e-4
"""What the host takes for a layer of a step that is run call by call, at most."""

_FLOP_PER_S = {"cuda": 1e15, "cpu": 1e12}
"""What devices reach in half precision, roughly; to cut steps pays more on one that is slower."""


@dataclass(frozen=True)
class StepSizes:
    """The sizes that steps have.

    Attributes:
        buckets: numbers of rows, ascending.
        overhead: so many rows take as long as what each step costs beside its rows.
    """

    buckets: tuple[int, ...]
    overhead: float = 0.0

    @classmethod
    def of(cls, plan: DecoderPlan, buckets: tuple[int, ...], device_type: str) -> "StepSizes":
        """By what the largest rank computes; equal on all ranks."""
        num_weights = max(r.weight_bytes for r in plan.ranks) / DTYPE_BYTES[plan.dtype]
        num_layers = max(stop - start for start, stop in (stage.layers for stage in plan.stages))
        row_s = 2 * num_weights / _FLOP_PER_S[device_type]
        return cls(buckets, num_layers * _LAYER_S / row_s)

    def cut(self, num_tokens: int, num_decoding: int) -> int | None:
        """The most tokens of the next step, where several smaller steps are estimated to take three
        quarters of the time of one, or less; None: they do not.

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
        return max(num_rows, _FLAT) + self.overhead
