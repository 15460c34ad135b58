"""Carries arrive as they were sent, between stages of different widths and step after step."""

import parallel_jobs
import pytest
import torch
from rank_pool import RankPool

from parallel.topology import Topology

pytestmark = pytest.mark.dist

# Token counts change from step to step; the third fills the buffers, the fourth has no token.
STEPS, MAX_TOKENS = [5, 2, 7, 0, 5], 7


@pytest.mark.parametrize(
    "tp_sizes", [[1, 1], [2, 1], [1, 3], [3, 2], [2, 1, 3], [1, 1, 1, 1]], ids=str
)
def test_every_receiver_gets_what_the_stage_before_had(
    tp_sizes: list[int], rank_pool: RankPool
) -> None:
    topology = Topology.of(tp_sizes)
    results = rank_pool.run(parallel_jobs.relay, tp_sizes, STEPS, MAX_TOKENS)
    for rank, received in enumerate(results):
        stage = topology.coordinate(rank).stage
        assert len(received) == (len(STEPS) if stage else 0)
        for step, (carries, _) in enumerate(received):
            expected = parallel_jobs.carries_of(stage - 1, step, STEPS[step])
            for got, sent in zip(carries, expected, strict=True):
                assert got.dtype == sent.dtype
                assert torch.equal(got, sent)


def test_buffers_are_allocated_once(rank_pool: RankPool) -> None:
    received = rank_pool.run(parallel_jobs.relay, [1, 2], [5, 2, 7], MAX_TOKENS)[-1]
    assert len(received) == 3
    assert len({tuple(addresses) for _, addresses in received}) == 1
