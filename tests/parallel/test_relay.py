"""Headers and values reach the next stage in their order, and results reach rank 0 beside them."""

import graph_jobs
import pytest
import torch
from rank_pool import RankPool

from parallel.relay import Header, Order
from parallel.topology import Topology

SIZES = [5, 1, 0, 300_000, 5, 2]
"""Of the values of each micro-batch; more micro-batches than slots, in no order."""


@pytest.mark.parametrize("order", Order)
def test_a_header_survives_its_tensor(order: Order) -> None:
    header = Header(order, bucket=7, slot=1)
    assert Header.from_tensor(header.to_tensor()) == header


@pytest.mark.dist
@pytest.mark.parametrize(
    "tp_sizes", [[1, 1], [2, 1], [1, 2], [2, 3], [3, 1, 2], [1, 1, 1, 1]], ids=str
)
def test_every_stage_hears_what_the_one_before_it_says(
    tp_sizes: list[int], rank_pool: RankPool
) -> None:
    """Each stage adds 1 to what it got and sends it on; a rank of the first has it from rank 0."""
    topology = Topology.of(tp_sizes)
    found = rank_pool.run(graph_jobs.relay, tp_sizes, SIZES)
    for rank, (headers, values) in enumerate(found):
        stage = topology.coordinate(rank).stage
        expected = [Header(Order.RUN, step, step % 2) for step in range(len(SIZES))]
        assert headers == [*expected, Header(Order.REST), Header(Order.LEAVE)]
        for step, (x, flags) in enumerate(values):
            assert torch.equal(x, torch.full((SIZES[step],), float(step + stage)))
            assert flags.dtype == torch.bool
            assert flags.tolist() == [True, False]


@pytest.mark.dist
@pytest.mark.parametrize("tp_sizes", [[1, 1], [1, 2], [2, 1, 2]], ids=str)
def test_results_are_not_taken_for_carries(tp_sizes: list[int], rank_pool: RankPool) -> None:
    """Rank 0 asks for all results before the first is sent; each comes as it was asked for."""
    results = rank_pool.run(graph_jobs.relay_results, tp_sizes, SIZES)[0]
    assert [tensor.shape for tensor in results] == [(size,) for size in SIZES]
    for step, tensor in enumerate(results):
        assert (tensor == step).all()
