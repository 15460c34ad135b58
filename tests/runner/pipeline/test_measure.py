"""Measured parts and the cut they lead to: real modules, timed on the CPU."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

from parallel.errors import ConfigError, PreflightError
from parallel.graph_cut import cut_by_cost
from parallel.graph_modules import split_points
from parallel.graph_twin import trace_whole
from runner.compiler.counter import count_compilations
from runner.compiler.eager import EagerBackend
from runner.compiler.segment import Segment
from runner.config.load import load
from runner.graph_planning import GraphJob
from runner.pipeline.compiled_stages import CompiledStages
from runner.pipeline.measure import Balance, Measured, unit_times

SUPPORT = Path(__file__).parents[2] / "support"
LOPSIDED = """
import torch
from torch import nn

class Lopsided(nn.Module):
    '''A part in the middle has 40,000 times the elements of the others.'''

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.slow = nn.Softmax(-1)
        self.again = nn.ReLU()
        self.table = nn.Embedding(2, 8)
        self.last = nn.Linear(8, 8)

    def forward(self, x, ids):
        y = self.again(self.first(x))
        grown = y.repeat(1, 40_000)
        y = self.slow(grown)[:, :8]
        return self.last(self.again(y) + self.table(ids))

class Sort(nn.Module):
    def forward(self, x):
        return x.sort(-1).values

class Deceptive(nn.Module):
    '''Sorting reads little and computes little, and takes as long as all of the matrices.'''

    def __init__(self):
        super().__init__()
        self.wide = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))
        self.slow = Sort()
        self.last = nn.Linear(512, 8)

    def forward(self, x):
        return self.last(self.slow(self.wide(x).repeat(1, 8))[:, :512])
"""

Prepare = Callable[..., GraphJob]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for a busy core would be measured, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def within(attempts: int, holds: Callable[[], bool]) -> bool:
    """Whether something holds at least once; other processes may disturb a time, not mend it."""
    return any(holds() for _ in range(attempts))


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    """A job of a factory's module on the CPU."""
    (tmp_path / "lopsided_parts.py").write_text(LOPSIDED)

    def make(factory: str, folder: Path, inputs: list[object], **parallel: object) -> GraphJob:
        model = {"path": str(tmp_path), "factory": factory, "factory_path": str(folder)}
        values = {
            "version": 1,
            "model": model | {"load_format": "dummy", "inputs": inputs},
            "security": {"factories": [factory]},
            "parallel": {"device": "cpu"} | parallel,
            "scheduler": {"max_batch_size": 2},
        }
        file = tmp_path / "plan.yaml"
        file.write_text(yaml.safe_dump(values))
        return GraphJob.prepare(load(file).config)

    return make


@pytest.fixture
def lopsided(prepare: Prepare, tmp_path: Path) -> Callable[..., GraphJob]:
    inputs = [
        {"name": "x", "shape": ["batch", 8]},
        {"name": "ids", "dtype": "int64", "shape": ["batch"]},
    ]
    return lambda **parallel: prepare("lopsided_parts:Lopsided", tmp_path, inputs, **parallel)


@pytest.fixture
def unet(prepare: Prepare) -> Callable[..., GraphJob]:
    inputs = [{"name": "image", "shape": ["batch", 2, 32, 32]}]
    return lambda **parallel: prepare("graph_models:UNet", SUPPORT, inputs, **parallel)


def test_every_part_has_a_time_and_all_add_up_to_that_of_the_model(
    unet: Callable[..., GraphJob],
) -> None:
    job = unet()
    assert job.model is not None
    graph = trace_whole(job.model.module, job.plan.buckets[-1], job.plan.topology, None)
    module, image = job.model.module, torch.randn(2, 2, 32, 32)

    def adds_up() -> bool:
        times = unit_times(graph, torch.device("cpu"), captures=False)
        assert len(times) == len(graph.units)
        assert min(times) > 0
        whole = []
        with torch.inference_mode():
            for _ in range(9):
                started = time.perf_counter()
                module(image)
                whole.append(time.perf_counter() - started)
        return min(whole) / 4 < sum(times) < 20 * min(whole)

    assert within(5, adds_up)


def test_what_takes_long_is_seen_to(lopsided: Callable[..., GraphJob]) -> None:
    job = lopsided(pipeline_parallel_size=3)
    found = Measured.of(job)

    def is_seen() -> bool:
        """Its tensors are 40,000 times as large."""
        measured = Measured.of(job)
        times = dict(zip(measured.unit_names, measured.unit_times_s, strict=True))
        return times["slow"] > 10 * times["first"]

    assert within(5, is_seen)
    assert sum(found.stage_times_s) == pytest.approx(sum(found.unit_times_s))
    assert sum(found.estimated_times_s) == pytest.approx(sum(found.unit_times_s))
    assert found.device == "the CPU"
    assert 0 < found.bubble(job.plan) < 1


def test_a_measured_cut_is_better_where_estimates_are_deceived(
    prepare: Prepare, tmp_path: Path
) -> None:
    inputs: list[object] = [{"name": "x", "shape": ["batch", 512]}]
    job = prepare("lopsided_parts:Deceptive", tmp_path, inputs, pipeline_parallel_size=2)

    def is_better() -> bool:
        found = Measured.of(job)
        assert max(found.stage_times_s) <= max(found.estimated_times_s)
        return max(found.stage_times_s) < 0.9 * max(found.estimated_times_s)

    assert within(5, is_better)


def test_split_points_make_the_measured_cut_again(
    unet: Callable[..., GraphJob], lopsided: Callable[..., GraphJob]
) -> None:
    for make, num_stages in ((unet, 5), (lopsided, 4)):
        job = make(pipeline_parallel_size=num_stages)
        found = Measured.of(job)
        assert job.model is not None
        graph = trace_whole(job.model.module, job.plan.buckets[-1], job.plan.topology, None)
        best = cut_by_cost(
            graph, [1] * num_stages, times=found.unit_times_s, allowed=split_points(graph)
        )
        again = make(split_points=list(found.split_points))
        assert tuple(again.plan.boundaries) == best
        ends = [0, *best, len(graph.units)]
        sums = [sum(found.unit_times_s[a:b]) for a, b in pairwise(ends)]
        assert found.stage_times_s == pytest.approx(sums)


def test_nothing_measured_is_in_the_plan(unet: Callable[..., GraphJob]) -> None:
    points = list(Measured.of(unet(pipeline_parallel_size=3)).split_points)
    digests = {unet(split_points=points).plan.digest() for _ in range(2)}
    assert len(digests) == 1


def test_stages_of_several_ranks_take_their_share(prepare: Prepare) -> None:
    job = prepare(
        "graph_models:Mlp",
        SUPPORT,
        [{"name": "x", "shape": ["batch", 8]}],
        tp_plan={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"},
        stages=[{"tensor_parallel_size": 2}, {"tensor_parallel_size": 1}],
    )
    found = Measured.of(job)
    first, second = found.stage_times_s
    assert 2 * first + second == pytest.approx(sum(found.unit_times_s))


def test_one_stage_has_no_split_points(unet: Callable[..., GraphJob]) -> None:
    found = Measured.of(unet())
    assert found.split_points == ()
    assert found.stage_times_s == found.estimated_times_s


def test_more_stages_than_names_are_an_error(lopsided: Callable[..., GraphJob]) -> None:
    with pytest.raises(ConfigError, match="places to cut at"):
        Measured.of(lopsided(pipeline_parallel_size=7))


class Fused(CompiledStages):
    """Stands for a compiler that fuses the first half of the units into next to nothing."""

    def __init__(self, times: tuple[float, ...]) -> None:
        self.times = times
        self.cuts: list[Sequence[int]] = []

    def seconds(self, boundaries: Sequence[int]) -> tuple[float, ...]:
        self.cuts.append(boundaries)
        half = len(self.times) // 2
        fused = [time / 10 if unit < half else time for unit, time in enumerate(self.times)]
        return tuple(sum(fused[a:b]) for a, b in pairwise([0, *boundaries, len(fused)]))


@pytest.mark.parametrize("num_stages", [2, 3])
def test_what_stages_take_when_compiled_corrects_the_cut(
    unet: Callable[..., GraphJob], num_stages: int
) -> None:
    job = unet()
    assert job.model is not None
    graph = trace_whole(job.model.module, job.plan.buckets[-1], job.plan.topology, None)
    before = tuple(1e-3 for _ in graph.units)
    balance, compiled = Balance(graph, [1] * num_stages), Fused(before)
    times, boundaries = balance.cut_compiled(before, compiled)
    assert compiled.cuts[0] == balance.cut(before)
    assert len(set(compiled.cuts)) == len(compiled.cuts) > 1, "each cut is compiled once"
    found = compiled.seconds(boundaries)
    assert balance.stage_times(times, boundaries) == pytest.approx(found)
    assert max(found) < 0.85 * max(compiled.seconds(compiled.cuts[0]))


def test_stages_are_compiled_by_what_is_to_compile_them(prepare: Prepare) -> None:
    inputs: list[object] = [{"name": "x", "shape": ["batch", 8]}]
    job = prepare("graph_models:Mlp", SUPPORT, inputs, pipeline_parallel_size=2)
    settings = job.config.compile.model_copy(update={"backend": "inductor"})
    job = replace(job, config=job.config.model_copy(update={"compile": settings}))
    told: list[str] = []
    before = count_compilations()
    found = Measured.of(job, tell=told.append)
    assert found.backends == ("inductor",)
    assert len(found.split_points) == 1
    num_cuts = sum(line.startswith("compiling the stages of a cut at") for line in told)
    assert num_cuts >= 1
    assert count_compilations() - before >= num_cuts + 1


class Unusable(EagerBackend):
    """Stands for a backend that this host lacks something for."""

    name = "unusable"

    def build(self, segment: Segment, program: torch.export.ExportedProgram, folder: Path) -> None:
        del segment, program, folder
        raise PreflightError("its compiler is not here")


def test_a_backend_that_cannot_do_it_is_named_and_left_out(
    unet: Callable[..., GraphJob], caplog: pytest.LogCaptureFixture
) -> None:
    job = unet()
    assert job.model is not None
    graph = trace_whole(job.model.module, job.plan.buckets[-1], job.plan.topology, None)
    cut = Balance(graph, [1, 1]).cut([1e-3] * len(graph.units))
    cpu = torch.device("cpu")
    stages = CompiledStages(graph, cpu, [Unusable(), EagerBackend()], captures=False)
    assert min(stages.seconds(cut)) > 0
    assert stages.backends(cut) == ("eager",)
    assert "left out of measuring: unusable: its compiler is not here" in caplog.text
    alone = CompiledStages(graph, cpu, [Unusable()], captures=False)
    with pytest.raises(PreflightError, match="its compiler is not here"):
        alone.seconds(cut)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here_is_an_error(unet: Callable[..., GraphJob]) -> None:
    with pytest.raises(PreflightError, match="torch finds no GPU here"):
        Measured.of(unet(device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("captures", [True, False])
def test_parts_are_timed_on_a_gpu(unet: Callable[..., GraphJob], *, captures: bool) -> None:
    job = unet(device="cuda")
    assert job.model is not None
    bucket, topology = job.plan.buckets[-1], job.plan.topology
    graph = trace_whole(job.model.module, bucket, topology, None, device="cuda")
    times = unit_times(graph, torch.device("cuda", 0), captures=captures)
    assert len(times) == len(graph.units)
    assert all(0 < seconds < 0.1 for seconds in times)
    weights = [*job.model.module.parameters(), *job.model.module.buffers()]
    assert {tensor.device.type for tensor in weights} == {"cpu"}, "the model stays where it is"
