"""The plan of a tensor model as text for a terminal. Whether it fits is `graph_fit_text`; one rank
of it in full is `plan_text.describe_rank`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from parallel.fit import format_bytes
from parallel.graph_plan import GraphPlan, GraphStagePlan
from parallel.plan import Carry, RankPlan
from runner.cli.table import table
from runner.drawing.graph_words import ends_of, flops_share, format_time, passed_stages
from runner.drawing.plan_words import headline
from runner.drawing.words import plural

if TYPE_CHECKING:
    from runner.pipeline.measure import Measured

_RANK_COLUMNS = (
    "rank>",
    "stage>",
    "tp rank>",
    "device>",
    "modules",
    "weights>",
    "activations>",
    "est. time>",
    "FLOPs>",
)
_CARRY_COLUMNS = ("stages", "tensor", "dtype", "shape", "size>", "ranks", "")
_ESTIMATES = (
    "Estimated times are for H200s and one batch of the largest bucket; --measure finds those here."
)
_MAX_SIZES = 6
"""So many sizes of a dim are listed; of more only the ends."""


def describe_graph_plan(plan: GraphPlan, measured: "Measured | None" = None) -> str:
    """Who holds what, at which shapes it runs, and what crosses between the stages.

    Args:
        measured: times of the stages, shown beside the estimates.
    """
    lines = [headline(plan), "", *_ranks(plan, measured), "", buckets_line(plan)]
    if len(plan.stages) > 1:
        lines += ["", *_carries(plan), "", _bubble(plan, measured)]
    lines += [_shared_line(name, stages) for name, stages in plan.shared.items()]
    lines += ["", outputs_line(plan)]
    if warnings := measured.warnings if measured else plan.warnings:
        lines += ["", *(f"Warning: {warning}." for warning in warnings)]
    return "\n".join(lines)


def describe_modules(stage: GraphStagePlan) -> str:
    """The first module of a stage and its last, and how much they compute.

    >>> describe_modules(GraphStagePlan(("stem", "body", "head"), (), 0, 12, 0, 0.0))
    'stem .. head (12 operations)'
    """
    return f"{' .. '.join(ends_of(stage))} ({plural(stage.num_ops, 'operation')})"


def buckets_line(plan: GraphPlan) -> str:
    """The inputs, with all sizes of a dim: `6 buckets: image float32 [1|2|4, 3, 16|32, 32]`."""
    inputs = [
        f"{carries[-1].name} {carries[-1].dtype} "
        f"[{', '.join(_sizes(column) for column in zip(*(c.shape for c in carries), strict=True))}]"
        for carries in zip(*plan.buckets, strict=True)
    ]
    batched = "the first dim counts samples" if plan.is_batched else "one sample at a time"
    return f"{plural(len(plan.buckets), 'bucket')}: {', '.join(inputs)}; {batched}"


def outputs_line(plan: GraphPlan) -> str:
    """What the model returns in the largest bucket."""
    return f"Outputs: {', '.join(f'{o.name} {o.dtype} {shape_of(o)}' for o in plan.outputs)}"


def shape_of(carry: Carry) -> str:
    return f"[{', '.join(map(str, carry.shape))}]"


def _ranks(plan: GraphPlan, measured: "Measured | None") -> list[str]:
    if measured is None:
        rows = [_rank_row(plan, rank) for rank in plan.ranks]
        return [*table(_RANK_COLUMNS, rows), "", _ESTIMATES]
    times = [format_time(measured.stage_times_s[rank.stage]) for rank in plan.ranks]
    rows = [[*_rank_row(plan, r), time] for r, time in zip(plan.ranks, times, strict=True)]
    return table((*_RANK_COLUMNS, "measured>"), rows)


def _bubble(plan: GraphPlan, measured: "Measured | None") -> str:
    bubble = measured.bubble(plan) if measured else plan.bubble
    return (
        f"Pipeline: with {plan.num_microbatches} micro-batches of the largest bucket, the "
        f"{len(plan.stages)} stages wait {bubble * 100:.0f} % of the time, by "
        f"{'measured' if measured else 'estimated'} times."
    )


def _rank_row(plan: GraphPlan, rank: RankPlan) -> list[str]:
    stage = plan.stages[rank.stage]
    return [
        str(rank.rank),
        str(rank.stage),
        str(rank.tp_rank),
        str(rank.device),
        describe_modules(stage),
        format_bytes(rank.weight_bytes),
        format_bytes(rank.activation_bytes),
        format_time(stage.time_s),
        f"{flops_share(plan, rank.stage) * 100:.1f} %",
    ]


def _sizes(column: Sequence[int | str]) -> str:
    sizes = list(dict.fromkeys(column))
    if len(sizes) > _MAX_SIZES:
        sizes = [*sizes[:2], "..", sizes[-1]]
    return "|".join(map(str, sizes))


def _carries(plan: GraphPlan) -> list[str]:
    rows, sums = [], []
    for index, stage in enumerate(plan.stages[:-1]):
        receivers = plan.topology.ranks(index + 1)
        routes = ", ".join(f"{plan.topology.carry_source(r)} -> {r}" for r in receivers)
        place = f"{index} -> {index + 1}"
        rows += [_carry_row(plan, index, carry, place, routes) for carry in stage.carries]
        sums.append(f"{place} {format_bytes(sum(c.num_bytes for c in stage.carries))}")
    title = "Between the stages, in the largest bucket:"
    return [title, "", *table(_CARRY_COLUMNS, rows), "", f"In all: {', '.join(sums)}"]


def _carry_row(plan: GraphPlan, stage: int, carry: Carry, place: str, routes: str) -> list[str]:
    passed = passed_stages(plan, stage, carry)
    note = f"passes through {_stages(passed)}" if passed else ""
    size = format_bytes(carry.num_bytes)
    return [place, carry.name, carry.dtype, shape_of(carry), size, routes, note]


def _shared_line(name: str, stages: Sequence[int]) -> str:
    return f"Shared: {name} is held by {_stages(stages)}."


def _stages(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"stage {numbers[0]}"
    return f"stages {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
