"""Artefacts that several processes build at once are those that one would have built."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_jobs import prepare
from spoilt_compiler import use_spoiler
from torch import nn

from parallel.context import ParallelContext
from parallel.errors import IncompatibleError, PreflightError
from parallel.launch import RankEnv
from parallel.topology import Topology
from runner.build.ahead import build_ahead, count_processes
from runner.build.build_process import BuildProcess
from runner.build.choice import Chooser
from runner.build.worklist import Use, Work
from runner.bundle.builder import BundleBuilder
from runner.compiler.backend import Compiled
from runner.compiler.backends import Backends
from runner.compiler.counter import compilations
from runner.compiler.inductor import InductorBackend
from runner.compiler.segment import Segment, TensorSpec

pytestmark = pytest.mark.timeout(400)

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


def artefacts_told(capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The lines about artefacts on standard error."""
    lines = capfd.readouterr().err.splitlines()
    return [json.loads(line) for line in lines if "artefact" in line]


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
    chooser = Chooser(candidates, builder, CPU, 4.0, seconds_ahead=seconds)
    for one in works:
        built = chooser.build(one)
        by_name = {candidate.backend: candidate for candidate in built.candidates}
        assert by_name["inductor"].parity is True
        ahead = seconds[by_name["inductor"].key]
        assert ahead - 1e-3 <= built.seconds < ahead + 20  # eager takes next to no time
    assert compilations() == here
    assert build_ahead(works, candidates, builder, context, num_processes=2) == {}


class Completing(InductorBackend):
    """It keeps in mind what it loads, as RTX keeps the kernels that it compiles then."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.loaded: list[Path] = []

    def load(self, folder: Path, segment: Segment) -> Compiled:
        self.loaded.append(folder)
        super().load(folder, segment)
        raise IncompatibleError("what is wrong with it")

    def read_caches(self, folder: Path) -> None: ...

    def write_caches(self, folder: Path) -> None: ...


def test_what_loading_completes_is_loaded_once_ahead(
    context: ParallelContext, builder: BundleBuilder
) -> None:
    works = [work(rows) for rows in (5, 6, 7, 8)]
    backend = Completing()
    candidates = [backend, Backends(CPU)["eager"]]
    seconds = build_ahead(works, candidates, builder, context, num_processes=2)
    assert sorted(backend.loaded) == sorted(map(builder.artefact_folder, seconds))
    assert len(seconds) == 4


def test_one_process_builds_nothing_ahead(context: ParallelContext, builder: BundleBuilder) -> None:
    works = [work(rows) for rows in (1, 2, 3, 4)]
    inductor = [Backends(CPU)["inductor"]]
    assert build_ahead(works, inductor, builder, context, num_processes=1) == {}
    assert build_ahead(works[:3], inductor, builder, context, num_processes=2) == {}
    assert not any((builder.folder / "artefacts").glob("*"))


def test_what_a_process_dies_of_costs_that_one_alone(
    context: ParallelContext,
    builder: BundleBuilder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The compiler of inductor ends the process that calls it, once."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n"
        f"grep -q ahead_worker /proc/$PPID/cmdline && mkdir {tmp_path}/once 2>&- && kill -9 $PPID\n"
        'exec g++ "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    # In the process itself, and not in one of a pool.
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    works = [work(rows) for rows in (1, 2, 3, 4)]
    inductor = [Backends(CPU)["inductor"]]
    seconds = build_ahead(works, inductor, builder, context, num_processes=2)
    assert (tmp_path / "once").exists()
    assert len(seconds) == 3
    told = artefacts_told(capfd)
    assert sorted(one["how"] for one in told) == [
        *["inductor"] * 3,
        "not built: its process ended with exit code -9",
    ]
    assert [one["done"] for one in told] == [1, 2, 3, 4]


@pytest.mark.full
def test_libraries_that_do_not_load_are_not_kept(
    context: ParallelContext,
    builder: BundleBuilder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    use_spoiler(tmp_path / "spoiler", monkeypatch)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    works = [work(rows) for rows in (1, 2, 3, 4)]
    inductor = [Backends(CPU)["inductor"]]
    assert build_ahead(works, inductor, builder, context, num_processes=2) == {}
    assert not any((builder.folder / "artefacts").glob("*"))
    told = artefacts_told(capfd)
    assert all(one["how"].startswith("not built: backend inductor: ") for one in told)
    assert len(told) == 4
    with pytest.raises(PreflightError, match="spoiler makes here do not load"):
        Chooser(inductor, builder, CPU, 4.0).build(works[0])


def test_a_process_has_as_many_threads_as_its_share_of_the_cores() -> None:
    with BuildProcess(CPU, [], num_threads=3) as process:
        environment = Path(f"/proc/{process._process.pid}/environ")
        # The kernel shows it a moment after the program has begun.
        while not (shown := environment.read_bytes()):
            time.sleep(0.01)
        variables = shown.split(b"\0")
    assert b"TORCHINDUCTOR_COMPILE_THREADS=3" in variables


def test_ranks_share_the_cores() -> None:
    assert count_processes(10_000) == 0
    assert 0 <= count_processes(1) <= 8
