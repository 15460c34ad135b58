"""How a dimension, or the heads of an attention layer, are split over the ranks of one stage.

Pure arithmetic on ranges; nothing here must divide evenly. Which tensor is split by which of these
ranges is the business of `parallel.rules`.
"""

from dataclasses import dataclass
from itertools import pairwise

from parallel.errors import ConfigError

Range = tuple[int, int]
"""Start and stop, the stop exclusive."""

_GRANULARITIES = (128, 64, 32, 16, 8)
_MAX_IMBALANCE = 1.05


def even_split(total: int, parts: int) -> tuple[Range, ...]:
    """Cut `total` units into `parts` contiguous ranges; the first `total % parts` are one longer.

    >>> even_split(7, 3)
    ((0, 3), (3, 5), (5, 7))
    """
    size, extra = divmod(total, parts)
    starts = [part * size + min(part, extra) for part in range(parts + 1)]
    return tuple(pairwise(starts))


def width_split(total: int, parts: int) -> tuple[Range, ...]:
    """Like `even_split`, in multiples of up to 128 where the widest part stays within 5 % of an
    even share.

    Matrix kernels want aligned widths: 11008 over 3 ranks is 3712, 3712 and 3584 rather than 3670,
    3669 and 3669.

    Raises:
        ConfigError: more parts than units.
    """
    if parts > total:
        raise ConfigError(
            f"tensor_parallel_size={parts} exceeds intermediate_size={total}; use 1 to {total}"
        )
    widest = -(-total // parts)
    for granularity in _GRANULARITIES:
        blocks, rest = divmod(total, granularity)
        fits = -(-blocks // parts) * granularity <= widest * _MAX_IMBALANCE
        if rest == 0 and blocks >= parts and fits:
            ranges = even_split(blocks, parts)
            return tuple((start * granularity, stop * granularity) for start, stop in ranges)
    return even_split(total, parts)


def padded_split(total: int, parts: int) -> tuple[tuple[Range, ...], int]:
    """Ranges of at most `padded` units, the last ones shorter or empty, and `padded` itself.

    A vocabulary is split like this, so that every rank of a stage computes logits of one shape.

    >>> padded_split(10, 4)
    (((0, 3), (3, 6), (6, 9), (9, 10)), 3)
    """
    padded = -(-total // parts)
    ranges = [(min(p * padded, total), min((p + 1) * padded, total)) for p in range(parts)]
    return tuple(ranges), padded


@dataclass(frozen=True)
class HeadShare:
    """The query heads of one rank, the KV heads that they read, and who reads which.

    Attributes:
        query: range of global query heads.
        kv: range of global KV heads.
        query_to_kv: for each local query head, the *local* index of its KV head; one entry per
            query head.
    """

    query: Range
    kv: Range
    query_to_kv: tuple[int, ...]

    @property
    def num_query(self) -> int:
        return self.query[1] - self.query[0]

    @property
    def num_kv(self) -> int:
        return self.kv[1] - self.kv[0]


def split_heads(num_heads: int, num_kv_heads: int, parts: int) -> tuple[HeadShare, ...]:
    """Divide the heads of grouped-query attention over `parts` ranks.

    With `parts <= num_kv_heads`, whole KV groups go to the ranks and no KV head is stored twice: 9
    query and 3 KV heads over 2 ranks are 6 + 3 and 2 + 1. With more ranks than KV heads the query
    heads are spread evenly, and a KV head is replicated on every rank that reads it: 9 and 3 over
    4 ranks are 3, 2, 2, 2 query heads, and the third rank, whose two query heads belong to
    different groups, holds two KV heads.

    Raises:
        ConfigError: more ranks than query heads, or heads that do not form whole groups.
    """
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"num_attention_heads={num_heads} is not a multiple of "
            f"num_key_value_heads={num_kv_heads}; "
            "this checkpoint's config.json cannot be right"
        )
    if parts > num_heads:
        raise ConfigError(
            f"tensor_parallel_size={parts} exceeds num_attention_heads={num_heads}; use 1 to "
            f"{num_heads}"
        )
    group = num_heads // num_kv_heads
    if parts <= num_kv_heads:
        query_ranges = [(a * group, b * group) for a, b in even_split(num_kv_heads, parts)]
    else:
        query_ranges = list(even_split(num_heads, parts))
    return tuple(_share(query, group) for query in query_ranges)


def _share(query: Range, group: int) -> HeadShare:
    start, stop = query
    first_kv, last_kv = start // group, (stop - 1) // group
    local = tuple(head // group - first_kv for head in range(start, stop))
    return HeadShare(query, (first_kv, last_kv + 1), local)
