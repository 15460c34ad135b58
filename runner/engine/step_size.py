"""How many tokens a step takes, where it is padded to one of the numbers of rows compiled for."""

from bisect import bisect_left
from collections.abc import Sequence

_FLAT = 256
"""Rows up to which a step takes about as long as one of a single row, for it reads all weights."""

_WORTH = 0.75
"""Of the rows of one step those of several must be at most so many: each has its own overhead."""


def step_size(buckets: Sequence[int], num_tokens: int, num_decoding: int) -> int:
    """The most tokens of the next step: all that wait, or so many of the prompts' that several
    steps that are nearly full take less than one that is mostly padding.

    Args:
        buckets: numbers of rows, ascending.
        num_tokens: that wait; where there are more than the largest bucket has rows, that is full.
        num_decoding: of these the ones of sequences that decode: one in every step for each.
    """
    place = bisect_left(buckets, num_tokens)
    if place in (0, len(buckets)):
        return buckets[min(place, len(buckets) - 1)]
    whole, lower = buckets[place], buckets[place - 1]
    if lower <= num_decoding:
        return whole
    num_full, rest = divmod(num_tokens - num_decoding, lower - num_decoding)
    rows = num_full * max(lower, _FLAT)
    if rest:
        rows += max(buckets[bisect_left(buckets, rest + num_decoding)], _FLAT)
    return lower if rows <= _WORTH * max(whole, _FLAT) else whole
