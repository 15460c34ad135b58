"""Collectives within one tensor-parallel group of several, and with nobody else."""

import parallel_jobs
import pytest
import torch
from rank_pool import RankPool

from parallel.collectives import (
    Group,
    all_gather,
    all_reduce,
    broadcast,
    broadcast_bytes,
    minimum,
)


def numbers_of(rank: int) -> list[list[float]]:
    """What rank `rank` of a group puts in."""
    return [[10.0 * rank, 10.0 * rank + 1], [10.0 * rank + 2, 10.0 * rank + 3]]


@pytest.mark.dist
@pytest.mark.parametrize("tp_sizes", [[2], [3, 1, 2]], ids=str)
def test_each_group_talks_to_itself(tp_sizes: list[int], rank_pool: RankPool) -> None:
    results = rank_pool.run(parallel_jobs.collectives, tp_sizes)
    first = 0
    for size in tp_sizes:
        given = torch.tensor([numbers_of(rank) for rank in range(size)])
        last = first + size - 1
        for rank in range(size):
            assert results[first + rank] == {
                "all_reduce": given.sum(0).tolist(),
                "all_gather": torch.cat(list(given), dim=1).tolist(),
                "all_gather of no rows": [0, 2 * size],
                "argument": numbers_of(rank),
                "broadcast": numbers_of(size - 1),
                "broadcast_bytes": f"from {last}".encode(),
                "broadcast_bytes of nothing": b"",
                "minimum": 7 - (size - 1),
            }
        first += size


def test_a_group_of_one_is_the_identity() -> None:
    """No process group, and no copy."""
    alone, x = Group.alone(3), torch.randn(2, 3)
    assert (alone.ranks, alone.rank, alone.size) == ((3,), 0, 1)
    assert all_reduce(x, alone) is x
    assert all_gather(x, alone) is x
    assert broadcast(x, 3, alone) is x
    assert broadcast_bytes(b"message", 3, alone) == b"message"
    assert minimum(4, alone) == 4
