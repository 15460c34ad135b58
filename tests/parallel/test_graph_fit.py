"""Whether the plan of a tensor model fits: weights and activations against what may be used."""

import pytest
from graph_models import UNet

from parallel.fit import Budget
from parallel.graph_fit import GraphFit
from parallel.graph_plan import GraphPlan
from parallel.graph_planner import CutRequest, make_graph_plan
from parallel.plan import Carry
from parallel.topology import Topology


@pytest.fixture(scope="module")
def plan() -> GraphPlan:
    return make_graph_plan(
        UNet(),
        [(Carry("image", "float32", (2, 2, 32, 32)),)],
        Topology.of([1, 1]),
        architecture="UNet",
        dtype="float32",
        is_batched=True,
        cut=CutRequest(split_points=["middle"]),
    )


def needs(plan: GraphPlan) -> list[int]:
    return [rank.weight_bytes + rank.activation_bytes for rank in plan.ranks]


def test_the_fullest_rank_decides_to_the_byte(plan: GraphPlan) -> None:
    fullest = max(needs(plan))
    enough, short = (GraphFit(plan, Budget(n, 1.0, 16)) for n in (fullest, fullest - 1))
    assert enough.fits
    assert not short.fits
    assert enough.needed_bytes(enough.fullest) == fullest
    assert [enough.room(rank) for rank in plan.ranks] == [fullest - n for n in needs(plan)]


def test_only_the_share_that_may_be_used_counts(plan: GraphPlan) -> None:
    memory = 2 * max(needs(plan))
    assert GraphFit(plan, Budget(memory, 0.5, 16)).fits
    assert not GraphFit(plan, Budget(memory, 0.49, 16)).fits


def test_a_shortage_names_the_rank_its_need_and_a_way_out(plan: GraphPlan) -> None:
    line = GraphFit(plan, Budget(1000, 0.9, 16)).shortage()
    rank = needs(plan).index(max(needs(plan)))
    assert line.startswith(f"rank {rank} (stage {rank}, tp rank 0) needs ")
    assert "900 B may be used (0.9 of 1.0 kB)" in line
    assert "use more stages" in line


def test_json_has_a_verdict_a_rank(plan: GraphPlan) -> None:
    smaller, larger = sorted(needs(plan))
    values = GraphFit(plan, Budget(larger - 1, 1.0, 16)).to_dict()
    assert values["fits"] is False
    assert values["usable_bytes"] == larger - 1
    assert sorted(r["needed_bytes"] for r in values["ranks"]) == [smaller, larger]
    assert sorted(r["fits"] for r in values["ranks"]) == [False, True]
