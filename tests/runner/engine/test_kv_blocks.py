"""Blocks of the KV cache: taken, shared, let go; and completions that must fit into few of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import rank_jobs
from rank_pool import RankPool

from runner.engine.kv_blocks import BlockPool, next_key

KEYS = [next_key(bytes([n]), [n]) for n in range(9)]


def known(pool: BlockPool, count: int) -> list[int]:
    """Free blocks that are known by the first of `KEYS`."""
    blocks = pool.take(count) or []
    for block, key in zip(blocks, KEYS, strict=False):
        pool.publish(block, key)
    pool.give_back(blocks)
    return blocks


def test_no_more_than_there_are() -> None:
    pool = BlockPool(3, 4)
    assert [pool.blocks_for(n) for n in (0, 1, 4, 5, 12)] == [0, 1, 1, 2, 3]
    assert pool.take(2) == [0, 1]
    assert pool.take(2) is None
    assert pool.take(0) == []
    assert pool.take(1) == [2]


def test_a_shared_block_is_free_when_the_last_one_lets_it_go() -> None:
    pool = BlockPool(2, 4)
    (block,) = known(pool, 1)
    assert pool.share(KEYS[:1]) == pool.share(KEYS[:1]) == [block]
    pool.give_back([block])
    assert pool.take(2) is None
    pool.give_back([block])
    assert sorted(pool.take(2) or []) == [0, 1]


def test_only_an_unbroken_beginning_is_shared() -> None:
    pool = BlockPool(4, 4)
    first, second, _, last = known(pool, 4)
    pool.share(KEYS[:2])
    pool.share(KEYS[3:4])
    assert pool.take(1), "the third, whose contents are gone now"
    assert pool.share(KEYS[:4]) == [first, second]
    assert pool.share(KEYS[3:4]) == [last]


def test_what_is_known_is_taken_last_and_an_end_before_its_beginning() -> None:
    pool = BlockPool(5, 4)
    earlier = known(pool, 2)
    unknown = pool.take(1) or []
    pool.give_back(unknown)
    assert pool.take(5) == [*unknown, 3, 4, *reversed(earlier)]


def test_of_two_that_hold_the_same_one_is_shared() -> None:
    pool = BlockPool(2, 4)
    first, second = pool.take(2) or []
    pool.publish(first, KEYS[0])
    pool.publish(second, KEYS[0])
    pool.give_back([first, second])
    assert pool.share(KEYS[:1]) == [first]
    assert pool.take(1) == [second]
    pool.give_back([first])
    assert pool.share(KEYS[:1]) == [first]


def test_keys_differ_by_tokens_order_and_what_came_before() -> None:
    keys = {
        next_key(previous, ids)
        for previous in (b"", b"\1", KEYS[0])
        for ids in ([1, 2], [2, 1], [1, 2, 0], [258], [1 << 40])
    }
    assert len(keys) == 15
    assert next_key(b"", [1, 2]) == next_key(b"", (1, 2))


@pytest.mark.parametrize(
    ("tp_sizes", "ahead"), [([1], False), ([2, 1], False), ([1], True), ([2], True)], ids=str
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_few_blocks_and_shared_beginnings_change_no_token(
    name: str,
    tp_sizes: list[int],
    ahead: bool,
    rank_pool: RankPool,
    checkpoint: Callable[[str], Path],
) -> None:
    """Prompts of which three begin alike, in a cache that holds about two sequences."""
    beginning = [7 + 3 * i % 90 for i in range(21)]
    prompts = [beginning, [5, 6, 7], beginning[:17], [*beginning, 9, 9], beginning[:8]]
    settings = {"kv_cache.block_size": 4, "scheduler.max_num_batched_tokens": 12}
    model = str(checkpoint(name))
    alone = [
        rank_pool.run(rank_jobs.complete, [1], model, [prompt], 14, {}, settings)[0][0]
        for prompt in prompts
    ]
    few = (model, prompts, 14, settings, 14, ahead)
    found, parts = rank_pool.run(rank_jobs.complete_in_few_blocks, tp_sizes, *few)[0]
    assert found == alone
    cached: dict[int, list[int]] = {}
    for request_id, num_computed in parts:
        cached.setdefault(request_id, []).append(num_computed)
    assert any(counts[0] > 0 for counts in cached.values()), "nothing was shared"
    assert any(counts != sorted(counts) for counts in cached.values()), "nobody gave way"
