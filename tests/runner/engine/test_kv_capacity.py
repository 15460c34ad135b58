"""The size of the KV cache: what is wanted, what fits, and what all ranks can agree on."""

import dataclasses
import operator
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import rank_jobs
import torch.distributed as dist
from rank_pool import RankPool

from parallel.collectives import Group
from parallel.context import ParallelContext
from parallel.decoder_plan import DecoderRankPlan
from parallel.errors import DoesNotFitError
from parallel.launch import RankEnv
from parallel.topology import Topology
from runner.engine.kv_capacity import agree_on_blocks
from runner.observe.cgroup import read_cgroup_limits


@pytest.fixture
def alone() -> ParallelContext:
    return ParallelContext.open(Topology.of([1]), RankEnv(0, 1), device_type="cpu")


@pytest.fixture
def rank_plan(checkpoint: Callable[[str], Path]) -> DecoderRankPlan:
    return rank_jobs.prepare(str(checkpoint("llama")), [1], {}).plan.ranks[0]


def blocks(
    wanted: int,
    context: ParallelContext,
    plan: DecoderRankPlan,
    *,
    utilization: float = 0.9,
    **sizes: int,
) -> int:
    """With a plan of other `sizes`."""
    changed = dataclasses.replace(plan, **sizes)  # type: ignore[arg-type]
    return agree_on_blocks(wanted, context, changed, block_size=16, utilization=utilization)


def test_no_more_than_is_wanted(alone: ParallelContext, rank_plan: DecoderRankPlan) -> None:
    assert blocks(5, alone, rank_plan) == 5


def test_no_more_than_memory_holds(alone: ParallelContext, rank_plan: DecoderRankPlan) -> None:
    """Half of the memory holds half as many; a job's ranks share the host's memory."""
    sizes = {"kv_bytes_per_token": 2**16, "activation_bytes": 0}
    all_of_it = blocks(10**9, alone, rank_plan, utilization=1.0, **sizes)
    assert 10 < all_of_it < 10**9
    half = blocks(10**9, alone, rank_plan, utilization=0.5, **sizes)
    assert half == pytest.approx(all_of_it / 2, rel=0.1)
    sharing = dataclasses.replace(alone, world=Group((0, 1, 2, 3), 0))
    assert blocks(10**9, sharing, rank_plan, **sizes) == pytest.approx(all_of_it * 0.225, rel=0.1)
    used = all_of_it * 2**20 // 2
    less = blocks(10**9, alone, rank_plan, **sizes | {"activation_bytes": used})
    assert less == pytest.approx(all_of_it * 0.4, rel=0.1)


def test_file_cache_is_free_and_a_container_has_a_limit(
    alone: ParallelContext, rank_plan: DecoderRankPlan
) -> None:
    """Reading a checkpoint fills the file cache; the kernel gives that back on demand."""
    available = psutil.virtual_memory().available
    limit = read_cgroup_limits().memory_free_bytes
    fitting = blocks(10**9, alone, rank_plan, kv_bytes_per_token=2**16, activation_bytes=0)
    free_bytes = available if limit is None else min(available, limit)
    assert fitting * 2**20 == pytest.approx(0.9 * free_bytes, rel=0.05)


def test_a_rank_without_layers_takes_what_the_others_do(
    alone: ParallelContext, rank_plan: DecoderRankPlan
) -> None:
    assert blocks(123, alone, rank_plan, kv_bytes_per_token=0) == 123


@pytest.mark.parametrize(
    "sizes", [{"kv_bytes_per_token": 2**40}, {"activation_bytes": 2**50}], ids=["block", "step"]
)
def test_no_room_for_one_block(
    sizes: dict[str, int], alone: ParallelContext, rank_plan: DecoderRankPlan
) -> None:
    line = r"no memory for a KV cache: .*; use a lower scheduler.max_num_batched_tokens"
    with pytest.raises(DoesNotFitError, match=line) as error:
        blocks(5, alone, rank_plan, **sizes)
    assert "\n" not in str(error.value)


class ByRank:
    """A value for each rank: it turns into the rank's own where it is unpickled."""

    def __init__(self, *values: Any) -> None:
        self._values = values

    def __reduce__(self) -> tuple[Any, ...]:
        return operator.getitem, (self._values, _Rank())


class _Rank:
    def __reduce__(self) -> tuple[Any, ...]:
        return dist.get_rank, ()


@pytest.mark.dist
def test_ranks_agree_on_what_the_fullest_can_hold(
    rank_pool: RankPool, alone: ParallelContext, rank_plan: DecoderRankPlan
) -> None:
    """Only rank 0 knows what is wanted, and another rank may have the least room."""
    light, heavy = (
        dataclasses.replace(rank_plan, kv_bytes_per_token=size, activation_bytes=0)
        for size in (2**16, 2**18)
    )
    rest = rank_pool.size - 2
    plans = ByRank(light, heavy, *[light] * rest)

    def agreed(wanted: int) -> list[int]:
        wants: Any = ByRank(wanted, 0, *[0] * rest)
        job = partial(agree_on_blocks, wants, block_size=16, utilization=0.9)
        return rank_pool.run(job, [2], plans)

    assert agreed(7) == [7, 7]
    one, other = agreed(10**9)
    assert one == other
    sharing = dataclasses.replace(alone, world=Group((0, 1), 0))
    fullest = agree_on_blocks(10**9, sharing, heavy, block_size=16, utilization=0.9)
    assert one == pytest.approx(fullest, rel=0.1)
