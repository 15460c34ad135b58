"""`GraphPlan`: who holds what of a tensor model, any model that is not a language model. Made by
`parallel.graph_planner`, from the model's graph at its largest bucket.
"""

from dataclasses import dataclass
from typing import Literal

from parallel.plan import Carry, RankPlan, ShardPlan, StagePlan

Bucket = tuple[Carry, ...]
"""The inputs at one combination of shapes, in the order of the model's arguments."""


@dataclass(frozen=True)
class GraphStagePlan(StagePlan):
    """What one pipeline stage runs.

    Attributes:
        modules: names of the modules whose operations it runs, in order, each once.
        first_unit: index of the graph's unit with which it begins.
        num_ops: operations.
        flops: of one batch in the largest bucket, on all its ranks together.
        time_s: estimated seconds of one such batch on one rank.
    """

    first_unit: int
    num_ops: int
    flops: int
    time_s: float


@dataclass(frozen=True)
class GraphPlan(ShardPlan):
    """The division of one tensor model over the ranks of one job.

    Attributes:
        buckets: every shape that it runs at, the smallest first; what else a plan says of sizes is
            about the last one.
        is_batched: whether the first dim of all inputs and outputs counts samples.
        outputs: what the model returns, by the names that the model gives it.
        shared: parameters that several stages hold, and which.
        bubble: predicted share of the stages' time spent waiting, `num_microbatches` at a time.
        warnings: what a user should know of the cut.
    """

    kind: Literal["graph"]
    stages: tuple[GraphStagePlan, ...]
    ranks: tuple[RankPlan, ...]
    buckets: tuple[Bucket, ...]
    is_batched: bool
    outputs: tuple[Carry, ...]
    shared: dict[str, tuple[int, ...]]
    num_microbatches: int
    bubble: float
    warnings: tuple[str, ...]

    @property
    def boundaries(self) -> list[int]:
        """The units with which stages 1, 2, ... begin."""
        return [stage.first_unit for stage in self.stages[1:]]
