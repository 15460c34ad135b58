"""How long each part of a tensor model takes on this device, and where to cut by these times.

One process runs the whole model, part after part, by PyTorch's own kernels, and then the stages
that this leads to, compiled: what a compiler fuses differs from part to part. What it finds never
enters a plan: it is told as split points, which make the same plan on every rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from parallel.errors import ConfigError, PreflightError
from parallel.graph import Graph
from parallel.graph_cut import Boundaries, cut_by_cost, cut_warnings
from parallel.graph_modules import split_points
from parallel.graph_plan import GraphPlan
from parallel.graph_planner import bubble_of
from parallel.graph_stage import Piece, Stage
from parallel.graph_twin import trace_whole
from runner.compiler.backends import Backends, candidates_of, check_backend
from runner.compiler.segment import Segment
from runner.graph_planning import GraphJob
from runner.pipeline.compiled_stages import CompiledStages
from runner.pipeline.programs import wants_channels_last
from runner.pipeline.timing import call_seconds, random_of, spec_of, weights_of

_MOST_CUTS = 4
"""Cuts whose stages are compiled."""


@dataclass(frozen=True)
class Measured:
    """Times of a model's parts, and the cut that they lead to.

    Attributes:
        device: on which they were taken.
        backends: what compiled the stages, each named once; empty: nothing did.
        unit_names, unit_times_s: of every part that a cut can move, in order; one batch of the
            largest bucket, undivided. By PyTorch's own kernels; those of a compiled stage by as
            much less as the stage takes less than all of them.
        split_points: the modules with which stages 1, 2, ... of the cut begin.
        stage_times_s: of each of its stages, over its tensor-parallel size.
        estimated_times_s: the same of the cut by estimates.
        warnings: what a user should know of the cut.
    """

    device: str
    backends: tuple[str, ...]
    unit_names: tuple[str, ...]
    unit_times_s: tuple[float, ...]
    split_points: tuple[str, ...]
    stage_times_s: tuple[float, ...]
    estimated_times_s: tuple[float, ...]
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, job: GraphJob, *, tell: Callable[[str], None] = lambda _: None) -> "Measured":
        """Measure a model, and balance its stages.

        Only such cuts count as split points can name.

        Args:
            job: with the model, cut by estimates.
            tell: is told what begins.

        Raises:
            ConfigError: fewer places to cut at than stages need.
            PreflightError: there is no such device, or what is to compile is not usable.
            UnsupportedSegmentError: a stage cannot be compiled.
        """
        assert job.model is not None, "a bundle is cut already"
        plan, device = job.plan, _device_of(job)
        backends = _compilers(job, device) if len(plan.tp_sizes) > 1 else ()
        tp_plan = job.config.parallel.tp_plan
        graph = trace_whole(
            job.model.module, plan.buckets[-1], plan.topology, tp_plan, device=device.type
        )
        captures = not job.config.compile.enforce_eager
        tell(f"timing {len(graph.units)} parts of the model")
        times = unit_times(graph, device, captures=captures)
        balance = Balance(graph, plan.tp_sizes)
        compiled_by: tuple[str, ...] = ()
        if backends:
            made = Backends(device)
            stages = CompiledStages(
                graph,
                device,
                [made[name] for name in backends],
                captures=captures,
                channels_last=wants_channels_last(job),
            )
            times, boundaries = balance.cut_compiled(times, stages, tell)
            compiled_by = stages.backends(boundaries)
        else:
            boundaries = balance.cut(times)
        return cls(
            device=_name_of(device),
            backends=compiled_by,
            unit_names=tuple(unit.name for unit in graph.units),
            unit_times_s=times,
            split_points=tuple(balance.names[boundary] for boundary in boundaries),
            stage_times_s=balance.stage_times(times, boundaries),
            estimated_times_s=balance.stage_times(times, plan.boundaries),
            warnings=cut_warnings(graph, boundaries, plan.tp_sizes, times=times),
        )

    def bubble(self, plan: GraphPlan) -> float:
        """The share of their time that the stages of the cut are predicted to wait.

        Args:
            plan: as the split points cut it.
        """
        return bubble_of(plan.stages, self.stage_times_s)


class Balance:
    """Cuts a graph by times."""

    def __init__(self, graph: Graph, tp_sizes: Sequence[int]) -> None:
        self._graph = graph
        self._tp_sizes = tp_sizes
        self.names = split_points(graph)

    def cut(self, times: Sequence[float]) -> Boundaries:
        """The best of those that split points can name."""
        return cut_by_cost(self._graph, self._tp_sizes, times=times, allowed=self.names)

    def stage_times(self, times: Sequence[float], boundaries: Sequence[int]) -> tuple[float, ...]:
        spans = zip(_spans(times, boundaries), self._tp_sizes, strict=True)
        return tuple(sum(span) / size for span, size in spans)

    def cut_compiled(
        self,
        times: tuple[float, ...],
        stages: CompiledStages,
        tell: Callable[[str], None] = lambda _: None,
    ) -> tuple[tuple[float, ...], Boundaries]:
        """The best cut by what compiled stages take, and the times of all units within it.

        What the stages of one cut take corrects the times that the next is made by, until a cut
        comes again.
        """
        tried: dict[Boundaries, tuple[float, ...]] = {}
        boundaries = self.cut(times)
        while boundaries not in tried and len(tried) < _MOST_CUTS:
            tell(f"compiling the stages of a cut at {', '.join(self.names[b] for b in boundaries)}")
            times = _corrected(times, boundaries, stages.seconds(boundaries))
            tried[boundaries] = times
            boundaries = self.cut(times)
        best = min(tried, key=lambda cut: max(self.stage_times(tried[cut], cut)))
        return tried[best], best


def _spans(times: Sequence[float], boundaries: Sequence[int]) -> list[Sequence[float]]:
    return [times[a:b] for a, b in pairwise([0, *boundaries, len(times)])]


def _corrected(
    times: Sequence[float], boundaries: Sequence[int], seconds: Sequence[float]
) -> tuple[float, ...]:
    """Times whose sums over the stages are `seconds`."""
    spans = zip(_spans(times, boundaries), seconds, strict=True)
    return tuple(time * total / sum(span) for span, total in spans for time in span)


@torch.inference_mode()
def unit_times(graph: Graph, device: torch.device, *, captures: bool) -> tuple[float, ...]:
    """Seconds of every unit on random inputs; each works on what those before it have made.

    Takes memory for the weights of one unit at a time, and for the activations that live there.

    Args:
        graph: traced for `device`.
        captures: on a GPU, time CUDA graphs rather than calls.

    Raises:
        ConfigError: the model does collectives of its own.
    """
    generator = torch.Generator(device).manual_seed(0)
    values = {value.name: random_of(value, device, generator) for value in graph.inputs}
    times = []
    for stage in graph.stages(range(1, len(graph.units))):
        (piece,) = _pieces(stage)
        segment = Segment("unit", piece.module, tuple(map(spec_of, piece.inputs)))
        run = segment.function()
        given = tuple(values[value.name] for value in piece.inputs)
        held = weights_of(piece.module, device)
        for value, tensor in zip(piece.outputs, run(*given, *held), strict=True):
            values[value.name] = tensor
        values = {value.name: values[value.name] for value in stage.sends}
        times.append(call_seconds(run, given, held, device, captures=captures))
    return tuple(times)


def _compilers(job: GraphJob, device: torch.device) -> tuple[str, ...]:
    """The backends that are to compile the stages, if any does more than PyTorch itself.

    Raises:
        PreflightError: there is one, and it is not usable on this host.
    """
    names = candidates_of(job.config.compile.backend)
    usable = tuple(name for name in names if device.type != "cpu" or name != "tensorrt")
    if set(usable) <= {"eager"}:
        return ()
    if len(usable) == 1:
        check_backend(usable[0], device.type)
    return usable


def _device_of(job: GraphJob) -> torch.device:
    """That of rank 0."""
    if job.device_type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise PreflightError(
            "--measure times the model on the device that it is for, and torch finds no GPU here; "
            "run it on a host with one, or give --device cpu if the ranks are to run on CPUs"
        )
    return torch.device("cuda", job.plan.devices[0])


def _name_of(device: torch.device) -> str:
    return "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _pieces(stage: Stage) -> tuple[Piece, ...]:
    if len(stage.pieces) != len(stage.steps):
        raise ConfigError(
            "--measure runs in one process, and the model does collectives of its own; leave "
            "--measure out, or give parallel.split_points"
        )
    return stage.pieces
