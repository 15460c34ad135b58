"""Ranks are numbered stage by stage; carries go from every stage to all ranks of the next."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import ConfigError
from parallel.topology import Coordinate, Topology

TOPOLOGIES = st.lists(st.integers(1, 8), min_size=1, max_size=5).map(Topology.of)


def test_ranks_are_numbered_stage_by_stage() -> None:
    topology = Topology.of([3, 1, 2])
    assert topology.world_size == 6
    assert [list(topology.ranks(stage)) for stage in range(3)] == [[0, 1, 2], [3], [4, 5]]
    assert topology.coordinate(5) == Coordinate(stage=2, tp_rank=1)
    assert topology.describe(5) == "rank 5 (stage 2, tp rank 1)"


@settings(deadline=None)
@given(TOPOLOGIES)
def test_every_rank_has_one_place(topology: Topology) -> None:
    numbered = [rank for stage in range(topology.num_stages) for rank in topology.ranks(stage)]
    assert numbered == list(range(topology.world_size))
    for rank in numbered:
        here = topology.coordinate(rank)
        assert topology.ranks(here.stage)[here.tp_rank] == rank


def test_carries_spread_over_the_senders() -> None:
    """Three receivers of a stage of two: the third one takes its carry from sender 0 again."""
    topology = Topology.of([2, 3])
    assert [topology.carry_source(rank) for rank in (2, 3, 4)] == [0, 1, 0]
    assert topology.carry_targets(0) == (2, 4)
    assert topology.carry_targets(1) == (3,)


def test_a_wide_stage_feeds_a_narrow_one_from_its_first_ranks() -> None:
    topology = Topology.of([3, 1])
    assert topology.carry_targets(0) == (3,)
    assert topology.carry_targets(1) == topology.carry_targets(2) == ()


@settings(deadline=None)
@given(TOPOLOGIES)
def test_every_receiver_has_exactly_one_source(topology: Topology) -> None:
    assert [topology.carry_source(rank) for rank in topology.ranks(0)] == [None] * len(
        topology.ranks(0)
    )
    assert all(topology.carry_targets(rank) == () for rank in topology.ranks(topology.last_stage))
    for stage in range(topology.last_stage):
        senders, receivers = topology.ranks(stage), topology.ranks(stage + 1)
        sent = [(target, rank) for rank in senders for target in topology.carry_targets(rank)]
        assert sorted(target for target, _ in sent) == list(receivers)
        assert all(topology.carry_source(target) == rank for target, rank in sent)
        loads = [len(topology.carry_targets(rank)) for rank in senders]
        assert max(loads) - min(loads) <= 1


def test_devices_default_to_the_ranks() -> None:
    assert Topology.of([2, 1]).devices == (0, 1, 2)
    assert Topology.of([2, 1], [7, 0, 3]).devices == (7, 0, 3)


@pytest.mark.parametrize("devices", [[0, 1], [0, 1, 2, 3], [0, 1, 1], [0, 1, -1]])
def test_devices_must_be_one_for_each_rank(devices: list[int]) -> None:
    with pytest.raises(ConfigError) as caught:
        Topology.of([2, 1], devices)
    assert str(caught.value) == (
        f"devices {devices}: the stages have 3 ranks in all, so give 3 different device indices"
    )


@pytest.mark.parametrize("tp_sizes", [[], [0], [2, -1]])
def test_sizes_must_be_positive(tp_sizes: list[int]) -> None:
    with pytest.raises(ConfigError) as caught:
        Topology.of(tp_sizes)
    assert str(caught.value) == (
        f"tensor-parallel sizes {tp_sizes}: give one number of at least 1 for every stage"
    )


def test_a_rank_beyond_the_world_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^rank 3 is not in a world of 3 ranks$"):
        Topology.of([2, 1]).coordinate(3)


def test_the_number_of_processes_must_be_that_of_the_plan() -> None:
    topology = Topology.of([2, 1])
    topology.check_world_size(3)
    with pytest.raises(ConfigError) as caught:
        topology.check_world_size(4)
    assert str(caught.value) == (
        "world size 4: the plan has 3 ranks (tensor-parallel sizes [2, 1]); start 3 processes"
    )
