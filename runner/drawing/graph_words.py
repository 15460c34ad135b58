"""The words for a tensor model's plan that its text and its picture share."""

from parallel.graph_plan import GraphPlan, GraphStagePlan
from parallel.plan import Carry


def ends_of(stage: GraphStagePlan) -> list[str]:
    """The first module of a stage, and its last if that is another."""
    return list(dict.fromkeys((stage.modules[0], stage.modules[-1])))


def format_time(seconds: float) -> str:
    """With three digits: `12.3 us`, `4.56 ms`, `7.89 s`.

    >>> format_time(12.34e-6), format_time(0.00456), format_time(7.891), format_time(0)
    ('12.3 us', '4.56 ms', '7.89 s', '0 us')
    """
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def flops_share(plan: GraphPlan, stage: int) -> float:
    """What one rank of a stage computes of the whole model, 0 to 1."""
    total = sum(s.flops for s in plan.stages)
    return plan.stages[stage].flops / plan.tp_sizes[stage] / total if total else 0.0


def passed_stages(plan: GraphPlan, stage: int, carry: Carry) -> list[int]:
    """The stages that have received what `stage` sends, and send it on."""
    passed: list[int] = []
    for index in range(stage, 0, -1):
        if carry.name not in [before.name for before in plan.stages[index - 1].carries]:
            break
        passed.insert(0, index)
    return passed
