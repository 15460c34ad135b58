"""A rank's view of the job: its place, its groups, its device."""

import sys
from pathlib import Path

import parallel_jobs
import pytest
import torch
from rank_pool import RankPool

from parallel.context import ParallelContext
from parallel.errors import ConfigError, PreflightError
from parallel.launch import RankEnv, run_ranks
from parallel.topology import Topology


@pytest.mark.dist
def test_every_rank_has_its_place_and_reaches_its_groups(rank_pool: RankPool) -> None:
    """Stages of 2, 1 and 3 ranks: the groups reach these ranks and no others."""
    results = rank_pool.run(parallel_jobs.places, [2, 1, 3])
    stages = [(0, 1), (2,), (3, 4, 5)]
    for rank, place in enumerate(results):
        (stage,) = [i for i, ranks in enumerate(stages) if rank in ranks]
        ranks = stages[stage]
        assert place == {
            "stage": stage,
            "tp_rank": ranks.index(rank),
            "first": stage == 0,
            "last": stage == 2,
            "tp": (ranks, ranks.index(rank)),
            "world": ((0, 1, 2, 3, 4, 5), rank),
            "tp reaches": list(ranks),
            "world reaches": [0, 1, 2, 3, 4, 5],
        }


RANK = """
import sys
from pathlib import Path
import torch
from parallel.collectives import all_reduce
from parallel.context import ParallelContext
from parallel.launch import adopt
from parallel.topology import Topology

env = adopt()
context = ParallelContext.open(Topology.of([2, 1]), env, device_type="cpu")
ones = torch.ones(1)
counted = [int(all_reduce(ones, group)) for group in (context.world, context.tp)]
Path(sys.argv[1], str(context.rank)).write_text(f"{context.device} {counted}")
context.close()
assert not torch.distributed.is_initialized()
"""


@pytest.mark.dist
def test_launched_ranks_open_and_close_a_job(tmp_path: Path) -> None:
    run_ranks([sys.executable, "-c", RANK, str(tmp_path)], 3, describe=lambda rank: f"rank {rank}")
    written = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    assert written == ["cpu [3, 2]", "cpu [3, 2]", "cpu [3, 1]"]


def test_one_rank_needs_no_process_group() -> None:
    context = ParallelContext.open(Topology.of([1]), RankEnv(0, 1), device_type="cpu")
    assert not torch.distributed.is_initialized()
    assert context.world.process_group is None
    assert context.tp.process_group is None
    assert context.is_first_stage
    assert context.is_last_stage
    context.close()


def test_another_number_of_processes_is_refused_before_they_meet() -> None:
    with pytest.raises(ConfigError, match=r"^world size 3: the plan has 2 ranks"):
        ParallelContext.open(Topology.of([2]), RankEnv(0, 3), device_type="cpu")


def test_a_gpu_that_is_not_there_is_refused_before_ranks_meet() -> None:
    absent = 999
    with pytest.raises(PreflightError) as caught:
        ParallelContext.open(Topology.of([1], [absent]), RankEnv(0, 1), device_type="cuda")
    assert str(caught.value) == (
        f"device 999 is not there: {torch.cuda.device_count()} GPUs are visible; change "
        "parallel.stages[].devices, use fewer ranks, or pass --device cpu"
    )
