"""How long each part of a tensor model takes on this device, and where to cut by these times.

One process runs the whole model, part after part, by PyTorch's own kernels. What it finds never
enters a plan: it is told as split points, which make the same plan on every rank.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch

from parallel.errors import ConfigError, PreflightError
from parallel.graph import Graph
from parallel.graph_cut import cut_by_cost, cut_warnings
from parallel.graph_modules import split_points
from parallel.graph_plan import GraphPlan
from parallel.graph_planner import bubble_of
from parallel.graph_stage import Piece, Stage, Value
from parallel.graph_twin import trace_whole
from runner.compiler.segment import Segment, TensorSpec, named_tensors
from runner.graph_planning import GraphJob

_ROUNDS = 7
_GPU_CALLS = 8
"""Calls in one round on a GPU, where a part may take less than an event can tell."""

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Measured:
    """Times of a model's parts, and the cut that they lead to.

    Attributes:
        device: on which they were taken.
        unit_names, unit_times_s: of every part that a cut can move, in order; one batch of the
            largest bucket, undivided.
        split_points: the modules with which stages 1, 2, ... of the cut begin.
        stage_times_s: of each of its stages, over its tensor-parallel size.
        estimated_times_s: the same of the cut by estimates.
        warnings: what a user should know of the cut.
    """

    device: str
    unit_names: tuple[str, ...]
    unit_times_s: tuple[float, ...]
    split_points: tuple[str, ...]
    stage_times_s: tuple[float, ...]
    estimated_times_s: tuple[float, ...]
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, job: GraphJob) -> "Measured":
        """Measure a model, and balance its stages.

        Only such cuts count as split points can name.

        Args:
            job: with the model, cut by estimates.

        Raises:
            ConfigError: fewer places to cut at than stages need.
            PreflightError: there is no such device.
        """
        assert job.model is not None, "a bundle is cut already"
        plan, device = job.plan, _device_of(job)
        tp_plan = job.config.parallel.tp_plan
        graph = trace_whole(
            job.model.module, plan.buckets[-1], plan.topology, tp_plan, device=device.type
        )
        times = unit_times(graph, device, captures=not job.config.compile.enforce_eager)
        names = split_points(graph)
        boundaries = cut_by_cost(graph, plan.tp_sizes, times=times, allowed=names)
        return cls(
            device=_name_of(device),
            unit_names=tuple(unit.name for unit in graph.units),
            unit_times_s=times,
            split_points=tuple(names[boundary] for boundary in boundaries),
            stage_times_s=_stage_times(times, boundaries, plan.tp_sizes),
            estimated_times_s=_stage_times(times, plan.boundaries, plan.tp_sizes),
            warnings=cut_warnings(graph, boundaries, plan.tp_sizes, times=times),
        )

    def bubble(self, plan: GraphPlan) -> float:
        """The share of their time that the stages of the cut are predicted to wait.

        Args:
            plan: as the split points cut it.
        """
        return bubble_of(plan.stages, self.stage_times_s)


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
    values = {value.name: _random(value, device, generator) for value in graph.inputs}
    times = []
    for stage in graph.stages(range(1, len(graph.units))):
        (piece,) = _pieces(stage)
        segment = Segment("unit", piece.module, tuple(_spec(v) for v in piece.inputs))
        run = segment.function()
        given = tuple(values[value.name] for value in piece.inputs)
        held = tuple(t.detach().contiguous().to(device) for _, t in named_tensors(piece.module))
        for value, tensor in zip(piece.outputs, run(*given, *held), strict=True):
            values[value.name] = tensor
        values = {value.name: values[value.name] for value in stage.sends}
        if device.type == "cpu":
            times.append(_cpu_seconds(run, (*given, *held)))
        else:
            sets = [(*given, *weights) for weights in _copies(held, device)]
            times.append(_gpu_seconds(run, sets, device, captures=captures))
    return tuple(times)


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


def _stage_times(
    times: Sequence[float], boundaries: Sequence[int], tp_sizes: Sequence[int]
) -> tuple[float, ...]:
    spans = pairwise([0, *boundaries, len(times)])
    return tuple(sum(times[a:b]) / size for (a, b), size in zip(spans, tp_sizes, strict=True))


def _pieces(stage: Stage) -> tuple[Piece, ...]:
    if len(stage.pieces) != len(stage.steps):
        raise ConfigError(
            "--measure runs in one process, and the model does collectives of its own; leave "
            "--measure out, or give parallel.split_points"
        )
    return stage.pieces


def _spec(value: Value) -> TensorSpec:
    return TensorSpec(value.shape, value.torch_dtype)


def _random(value: Value, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    empty = _spec(value).empty(device)
    if empty.is_floating_point():
        return empty.normal_(generator=generator)
    return empty.random_(0, 2, generator=generator)  # 0 and 1 are in range, whatever they index.


def _copies(weights: Tensors, device: torch.device) -> list[Tensors]:
    """The weights of each call of a round.

    In a model they come from main memory; a few copies of small ones are not in the cache, either.
    """
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    if sum(tensor.nbytes for tensor in weights) > cache_bytes:
        return [weights] * _GPU_CALLS
    return [tuple(tensor.clone() for tensor in weights) for _ in range(_GPU_CALLS)]


def _cpu_seconds(run: Callable[..., object], arguments: Tensors) -> float:
    """The shortest time of a call: what else the CPU does only adds to it."""
    seconds = []
    for _ in range(_ROUNDS + 1):
        started = time.perf_counter()
        run(*arguments)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def _gpu_seconds(
    run: Callable[..., object], sets: Sequence[Tensors], device: torch.device, *, captures: bool
) -> float:
    """The median time of a call; with `captures` without the host's share."""

    def call() -> None:
        for arguments in sets:
            run(*arguments)

    with torch.cuda.device(device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize()
        if captures:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                call()
        seconds: list[float] = []
        for _ in range(_ROUNDS + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            if captures:
                graph.replay()
            else:
                call()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
    return median(seconds[1:]) / len(sets)
