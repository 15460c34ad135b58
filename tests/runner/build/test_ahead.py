"""Artefacts that several processes build at once are those that one would have built."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rank_jobs import prepare
from torch import nn

from parallel.context import ParallelContext
from parallel.launch import RankEnv
from parallel.topology import Topology
from runner.build.ahead import Build, build_ahead, count_processes, shares_of
from runner.build.choice import Chooser
from runner.build.worklist import Use, Work
from runner.bundle.builder import BundleBuilder
from runner.compiler.backends import Backends
from runner.compiler.counter import compilations
from runner.compiler.segment import Segment, TensorSpec

CPU = torch.device("cpu")


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) * self.weight


def work(rows: int, width: int = 16) -> Work:
    segment = Segment("scale", Scale(width), (TensorSpec((rows, width), torch.float32),))
    return Work(segment, rows, [Use(0, "scale", rows)])


@pytest.fixture
def context() -> ParallelContext:
    return ParallelContext.open(Topology.of([1]), RankEnv(0, 1), device_type="cpu")


@pytest.fixture
def builder(checkpoint: Callable[[str], Path], tmp_path: Path) -> Iterator[BundleBuilder]:
    plan = prepare(str(checkpoint("llama")), [1], {}).plan
    with BundleBuilder.lead(tmp_path / "out", plan) as builder:
        yield builder


def test_the_chooser_finds_everything_built(
    context: ParallelContext, builder: BundleBuilder, capfd: pytest.CaptureFixture[str]
) -> None:
    works = [work(rows) for rows in (1, 2, 3, 4)]
    candidates = [Backends(CPU)[name] for name in ("inductor", "eager")]
    before = compilations().get("inductor", 0)
    seconds = build_ahead(works, candidates, builder, context, num_processes=2)
    assert len(seconds) == 4
    assert compilations()["inductor"] >= before + 4
    assert capfd.readouterr().err.count('"event": "artefact"') == 4
    here = dict(compilations())
    chooser = Chooser(candidates, builder, CPU, 4.0, seconds)
    for one in works:
        built = chooser.build(one)
        by_name = {candidate.backend: candidate for candidate in built.candidates}
        assert by_name["inductor"].parity is True
        ahead = seconds[by_name["inductor"].key]
        assert ahead - 1e-3 <= built.seconds < ahead + 1  # eager takes no time
    assert compilations() == here
    assert build_ahead(works, candidates, builder, context, num_processes=2) == {}


def test_one_process_builds_nothing_ahead(context: ParallelContext, builder: BundleBuilder) -> None:
    works = [work(rows) for rows in (1, 2, 3, 4)]
    inductor = [Backends(CPU)["inductor"]]
    assert build_ahead(works, inductor, builder, context, num_processes=1) == {}
    assert build_ahead(works[:3], inductor, builder, context, num_processes=2) == {}
    assert not any((builder.folder / "artefacts").glob("*"))


def test_what_is_tuned_by_timing_is_built_by_one_process() -> None:
    segments = [work(rows).segment for rows in (1, 2, 1, 3, 4, 1, 5)]
    program = segments[0].export("cpu")
    builds = [Build("inductor", segment, program, str(i)) for i, segment in enumerate(segments)]
    shares = shares_of(builds, 3)
    assert [[build.key for build in share] for share in shares] == [
        ["0", "2", "5"],
        ["1", "4"],
        ["3", "6"],
    ]
    assert [len(share) for share in shares_of(builds[:1], 8)] == [1]


def test_ranks_share_the_cores() -> None:
    assert count_processes(10_000) == 0
    assert 0 <= count_processes(1) <= 8
