"""Whether the plan of a tensor model fits into the memory of its GPUs.

Pure arithmetic on a plan, as in `parallel.fit`. Not counted: the CUDA context, the buffers of the
communication library, and the second set of a stage's inputs, which arrives while the first is
computed.
"""

from dataclasses import dataclass
from typing import Any

from parallel.fit import Budget, format_bytes
from parallel.graph_plan import GraphPlan
from parallel.plan import RankPlan


@dataclass(frozen=True)
class GraphFit:
    """The verdict on a plan: a rank needs its weights, and its activations in the largest bucket.

    Attributes:
        budget: what each GPU offers.
    """

    plan: GraphPlan
    budget: Budget

    @property
    def fits(self) -> bool:
        return self.needed_bytes(self.fullest) <= self.budget.usable_bytes

    @property
    def fullest(self) -> RankPlan:
        """The rank that needs the most."""
        return max(self.plan.ranks, key=self.needed_bytes)

    def needed_bytes(self, rank: RankPlan) -> int:
        return rank.weight_bytes + rank.activation_bytes

    def room(self, rank: RankPlan) -> int:
        """Bytes left; negative where a rank does not fit."""
        return self.budget.usable_bytes - self.needed_bytes(rank)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the plan itself is left out."""
        return {
            "fits": self.fits,
            "memory_bytes": self.budget.memory_bytes,
            "usable_bytes": self.budget.usable_bytes,
            "ranks": [
                {
                    "rank": rank.rank,
                    "needed_bytes": self.needed_bytes(rank),
                    "fits": self.room(rank) >= 0,
                }
                for rank in self.plan.ranks
            ],
        }

    def shortage(self) -> str:
        """One line on a plan that does not fit: the fullest rank, its need, and what to change."""
        rank, budget = self.fullest, self.budget
        return (
            f"{self.plan.topology.describe(rank.rank)} needs "
            f"{format_bytes(self.needed_bytes(rank))} (weights {format_bytes(rank.weight_bytes)}, "
            f"activations {format_bytes(rank.activation_bytes)}), but "
            f"{format_bytes(budget.usable_bytes)} may be used ({budget.utilization:g} of "
            f"{format_bytes(budget.memory_bytes)}); use more stages, or a smaller "
            "scheduler.max_batch_size or smaller model.inputs"
        )
