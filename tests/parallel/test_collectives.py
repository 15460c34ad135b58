"""Collectives within one tensor-parallel group of several, and with nobody else."""

import parallel_jobs
import pytest
import torch
from rank_pool import RankPool

from parallel.collectives import (
    Group,
    all_gather,
    all_reduce,
    as_rank_error,
    broadcast,
    broadcast_bytes,
    minimum,
)
from parallel.errors import StalledError


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


@pytest.mark.parametrize(
    ("error", "is_stalled", "is_peer"),
    [
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc] Timed out waiting"), True, True),
        (torch.distributed.DistStoreError("wait timeout after 300000ms"), True, True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), False, True),
        (torch.distributed.DistNetworkError("failed to recv"), False, True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, False),
        (ValueError("Broken pipe"), False, False),
    ],
    ids=lambda value: str(value) if isinstance(value, Exception) else "",
)
def test_an_error_tells_whether_this_rank_or_another_is_at_fault(
    error: Exception, is_stalled: bool, is_peer: bool
) -> None:
    told = as_rank_error(error, "decoding")
    assert isinstance(told, StalledError) == is_stalled
    assert told.peer == is_peer
    assert str(told) == f"{type(error).__name__} while decoding: {error}"


def test_only_the_first_line_of_an_error_is_told() -> None:
    error = RuntimeError("NCCL error: unhandled\nLast error:\n a stack")
    assert str(as_rank_error(error, "loading")) == (
        "RuntimeError while loading: NCCL error: unhandled"
    )
