"""The plan of a tensor model as a drawing; see `plan_picture`."""

from collections.abc import Iterator

from parallel.fit import format_bytes
from parallel.graph_plan import GraphPlan
from parallel.plan import Carry, RankPlan
from runner.drawing.graph_words import ends_of, flops_share, format_time, passed_stages
from runner.drawing.plan_picture import Picture, draw_picture, facts_of
from runner.drawing.words import plural

_GAP = 230
_MAX_CARRIES = 6
"""So many tensors are named between two stages; the smaller ones are counted."""


def draw_graph(plan: GraphPlan) -> str:
    """The SVG document."""
    picture = Picture(
        plan,
        facts=facts_of(plan, plural(len(plan.buckets), "bucket")),
        parts=(("weights", "weights"), ("activations", "activations in the largest bucket")),
        sizes=tuple((rank.weight_bytes, rank.activation_bytes) for rank in plan.ranks),
        shares=tuple(_share(plan, rank) for rank in plan.ranks),
        modules=tuple(tuple(_module_words(plan, index)) for index in range(len(plan.stages))),
        carries=tuple(tuple(_carry_lines(plan, index)) for index in range(len(plan.stages) - 1)),
        gap=_GAP,
    )
    return draw_picture(picture)


def _share(plan: GraphPlan, rank: RankPlan) -> str:
    percent = flops_share(plan, rank.stage) * 100
    return f"{plural(len(rank.tensors), 'tensor')}, {percent:.1f} % of the FLOPs"


def _module_words(plan: GraphPlan, index: int) -> Iterator[str]:
    stage = plan.stages[index]
    yield " .. ".join(ends_of(stage))
    yield plural(stage.num_ops, "operation")
    yield f"est. {format_time(stage.time_s)}"


def _carry_lines(plan: GraphPlan, stage: int) -> Iterator[str]:
    """The largest tensors, with the stage that made them if it is an earlier one."""
    carries = sorted(plan.stages[stage].carries, key=lambda c: c.num_bytes, reverse=True)
    for carry in carries[:_MAX_CARRIES]:
        yield _carry_line(plan, stage, carry)
    if rest := carries[_MAX_CARRIES:]:
        yield f"{len(rest)} more {format_bytes(sum(c.num_bytes for c in rest))}"


def _carry_line(plan: GraphPlan, stage: int, carry: Carry) -> str:
    size = format_bytes(carry.num_bytes)
    if passed := passed_stages(plan, stage, carry):
        return f"{carry.name} {size}, from stage {passed[0] - 1}"
    return f"{carry.name} {size}"
