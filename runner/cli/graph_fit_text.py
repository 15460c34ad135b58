"""Whether the plan of a tensor model fits, which numbers of stages there are to choose from, and
where measured times say to cut, as text for a terminal.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from parallel.fit import format_bytes
from parallel.graph_fit import GraphFit
from parallel.plan import RankPlan
from runner.cli.table import table
from runner.drawing.graph_words import format_time
from runner.drawing.words import plural

if TYPE_CHECKING:
    from runner.pipeline.measure import Measured

_FIT_COLUMNS = ("rank>", "needs>", "room left>", "verdict")
_TRIED_COLUMNS = ("stages>", "ranks>", "needs of the fullest rank>", "fits", "")
_SHOWN_PARTS = 5


def describe_graph_fit(fit: GraphFit, origin: str) -> str:
    """The verdict on each rank.

    Args:
        origin: where the size of the memory comes from.
    """
    budget = fit.budget
    return "\n".join(
        [
            f"Memory of a GPU: {format_bytes(budget.memory_bytes)} ({origin}); "
            f"{format_bytes(budget.usable_bytes)} of it may be used "
            f"(kv_cache.gpu_memory_utilization {budget.utilization:g})",
            "",
            *table(_FIT_COLUMNS, [_fit_row(fit, rank) for rank in fit.plan.ranks]),
            "",
            "A rank needs its weights, and its activations in the largest bucket. The CUDA context "
            "and NCCL's buffers come on top.",
        ]
    )


def describe_tried(tried: Sequence[GraphFit], chosen: GraphFit, num_gpus: int) -> str:
    """The numbers of stages that were tried, which one was chosen, and what to write for it."""
    size = len(chosen.plan.stages)
    mark = "<- chosen" if chosen.fits else "<- closest"
    rows = [_tried_row(fit, mark if fit is chosen else "") for fit in tried]
    reason = (
        f"Chosen: pipeline_parallel_size={size}, the smallest that fits."
        if chosen.fits
        else f"None of them fits; the closest is pipeline_parallel_size={size}."
    )
    return "\n".join(
        [
            f"Stages for up to {plural(num_gpus, 'GPU')}, until they fit:",
            "",
            *table(_TRIED_COLUMNS, rows),
            "",
            reason,
            "",
            "For the configuration:",
            "",
            "parallel:",
            f"  pipeline_parallel_size: {size}",
        ]
    )


def describe_measured(measured: "Measured") -> str:
    """What was measured, and what to write so that compile and run cut there too."""
    lines = [
        f"Measured: {plural(len(measured.unit_times_s), 'part')} of the model in the largest "
        f"bucket on {measured.device}, {_compiled_by(measured)}, "
        f"{format_time(sum(measured.unit_times_s))} in all; the longest: {_longest(measured)}."
    ]
    if not measured.split_points:
        return "\n".join([*lines, "There is one stage, so there is nothing to balance."])
    lines += [
        f"The slowest stage takes {format_time(max(measured.stage_times_s))}; if cut by estimates, "
        f"it would take {format_time(max(measured.estimated_times_s))}.",
        "",
        "For the configuration, so that compile and run cut there without measuring:",
        "",
        "parallel:",
        f"  split_points: [{', '.join(map(_quoted, measured.split_points))}]",
    ]
    return "\n".join(lines)


def _compiled_by(measured: "Measured") -> str:
    if not measured.backends:
        return "by PyTorch's own kernels"
    return f"in stages compiled by {' and '.join(measured.backends)}"


def _quoted(name: str) -> str:
    """A name as YAML takes it for text."""
    return f'"{name}"'


def _longest(measured: "Measured") -> str:
    parts = sorted(
        zip(measured.unit_times_s, measured.unit_names, strict=True), key=lambda p: -p[0]
    )
    return ", ".join(f"{name} {format_time(time)}" for time, name in parts[:_SHOWN_PARTS])


def _fit_row(fit: GraphFit, rank: RankPlan) -> list[str]:
    room = fit.room(rank)
    verdict = "fits" if room >= 0 else "does not fit"
    sizes = [format_bytes(fit.needed_bytes(rank)), format_bytes(max(room, 0))]
    return [str(rank.rank), *sizes, verdict]


def _tried_row(fit: GraphFit, note: str) -> list[str]:
    return [
        str(len(fit.plan.stages)),
        str(len(fit.plan.ranks)),
        format_bytes(fit.needed_bytes(fit.fullest)),
        "yes" if fit.fits else "no",
        note,
    ]
