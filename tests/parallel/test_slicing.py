"""Splits that need not divide evenly: examples by name, and what holds for all sizes."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import ConfigError
from parallel.slicing import (
    HeadShare,
    Range,
    even_split,
    padded_split,
    split_heads,
    width_split,
)

PARTS = st.integers(1, 8)


def widths(ranges: Sequence[Range]) -> list[int]:
    return [stop - start for start, stop in ranges]


def assert_tiles(ranges: Sequence[Range], total: int) -> None:
    """The ranges lie end to end from 0 to `total`."""
    covered = [unit for start, stop in ranges for unit in range(start, stop)]
    assert covered == list(range(total))


@settings(deadline=None)
@given(total=st.integers(0, 500), parts=PARTS)
def test_even_split_tiles_and_differs_by_at_most_one(total: int, parts: int) -> None:
    ranges = even_split(total, parts)
    assert len(ranges) == parts
    assert_tiles(ranges, total)
    assert max(widths(ranges)) - min(widths(ranges)) <= 1


def test_width_split_prefers_aligned_widths() -> None:
    """Llama-2's MLP over three ranks, in multiples of 128."""
    assert widths(width_split(11008, 3)) == [3712, 3712, 3584]


def test_width_split_aligns_only_where_the_widest_part_stays_close_to_even() -> None:
    assert widths(width_split(1536, 8)) == [192] * 8  # multiples of 128 would make one 256
    assert widths(width_split(97, 2)) == [49, 48]  # 97 is no multiple of anything


@settings(deadline=None)
@given(data=st.data(), parts=PARTS)
def test_width_split_tiles_and_leaves_no_rank_without(data: st.DataObject, parts: int) -> None:
    total = data.draw(st.one_of(st.integers(parts, 400), st.integers(8, 200).map(lambda n: 64 * n)))
    ranges = width_split(total, parts)
    assert len(ranges) == parts
    assert_tiles(ranges, total)
    assert min(widths(ranges)) >= 1
    assert max(widths(ranges)) <= -(-total // parts) * 1.05


def test_width_split_refuses_more_ranks_than_columns() -> None:
    with pytest.raises(ConfigError) as caught:
        width_split(3, 4)
    assert str(caught.value) == "tensor_parallel_size=4 exceeds intermediate_size=3; use 1 to 3"


def test_padded_split_gives_every_rank_the_same_local_size() -> None:
    """GPT-2's vocabulary over two ranks: 25129 rows each, one of them padding on the second."""
    ranges, padded = padded_split(50257, 2)
    assert (ranges, padded) == (((0, 25129), (25129, 50257)), 25129)


def test_padded_split_may_leave_ranks_without_rows() -> None:
    assert padded_split(5, 4) == (((0, 2), (2, 4), (4, 5), (5, 5)), 2)


@settings(deadline=None)
@given(total=st.integers(1, 500), parts=PARTS)
def test_padded_split_tiles_and_pads_only_at_the_end(total: int, parts: int) -> None:
    ranges, padded = padded_split(total, parts)
    assert len(ranges) == parts
    assert_tiles(ranges, total)
    assert padded * parts - total < parts
    # Row r of the gathered logits is token r, so each range must start at a multiple of `padded`.
    assert all(
        start == tp_rank * padded for tp_rank, (start, stop) in enumerate(ranges) if stop > start
    )


def test_nine_query_and_three_kv_heads_over_two_ranks() -> None:
    """SmolLM2-135M: whole groups, so that no KV head is stored twice."""
    assert split_heads(9, 3, 2) == (
        HeadShare(query=(0, 6), kv=(0, 2), query_to_kv=(0, 0, 0, 1, 1, 1)),
        HeadShare(query=(6, 9), kv=(2, 3), query_to_kv=(0, 0, 0)),
    )


def test_nine_query_and_three_kv_heads_over_four_ranks() -> None:
    """More ranks than KV heads: the third rank's query heads 5 and 6 read KV heads 1 and 2."""
    assert split_heads(9, 3, 4) == (
        HeadShare(query=(0, 3), kv=(0, 1), query_to_kv=(0, 0, 0)),
        HeadShare(query=(3, 5), kv=(1, 2), query_to_kv=(0, 0)),
        HeadShare(query=(5, 7), kv=(1, 3), query_to_kv=(0, 1)),
        HeadShare(query=(7, 9), kv=(2, 3), query_to_kv=(0, 0)),
    )


def test_one_kv_head_is_on_every_rank() -> None:
    shares = split_heads(4, 1, 4)
    assert [share.query for share in shares] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert {share.kv for share in shares} == {(0, 1)}


@settings(deadline=None)
@given(data=st.data(), num_kv_heads=st.integers(1, 8), group=st.integers(1, 8))
def test_heads_tile_and_each_reads_its_own_kv_head(
    data: st.DataObject, num_kv_heads: int, group: int
) -> None:
    num_heads = num_kv_heads * group
    parts = data.draw(st.integers(1, min(8, num_heads)))
    shares = split_heads(num_heads, num_kv_heads, parts)
    assert len(shares) == parts
    assert_tiles([share.query for share in shares], num_heads)
    for share in shares:
        assert share.num_query >= 1
        read = [share.kv[0] + local for local in share.query_to_kv]
        assert read == [head // group for head in range(*share.query)]
        assert set(read) == set(range(*share.kv))  # no KV head is held that none reads
    if parts <= num_kv_heads:
        assert_tiles([share.kv for share in shares], num_kv_heads)


def test_more_ranks_than_query_heads_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        split_heads(6, 3, 8)
    assert str(caught.value) == "tensor_parallel_size=8 exceeds num_attention_heads=6; use 1 to 6"


def test_heads_that_form_no_groups_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        split_heads(9, 2, 1)
    assert str(caught.value) == (
        "num_attention_heads=9 is not a multiple of num_key_value_heads=2; this checkpoint's "
        "config.json cannot be right"
    )
