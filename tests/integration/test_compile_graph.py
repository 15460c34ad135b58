"""`shardline compile` of tensor models, and `run --bundle`: what is built, what of it runs without
the model's code and without a compiler, and what is refused.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import build_jobs
import graph_builds
import numpy as np
import pytest
import torch
from barren import barren, left_in
from bundles import flip, rewrite_manifest
from graph_builds import Model, assert_equal, make_model, samples
from processes import run_command
from rank_pool import RankPool
from typer.testing import CliRunner

from parallel.errors import IncompatibleError, ShardlineError
from runner.build import compile as compile_file
from runner.bundle.bundle import Bundle
from runner.cli.app import app

pytestmark = [pytest.mark.timeout(180), pytest.mark.dist]

COUNTS = (2, 1, 2, 2, 1)
"""Samples of the batches that a bundle is run with."""


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("net"), "Net")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Model:
    parallel = {"device": "cpu", "tp_plan": graph_builds.TP_PLAN}
    return make_model(tmp_path_factory.mktemp("reader"), "Reader", parallel=parallel)


@pytest.fixture(scope="module")
def net_pp2(net: Model, rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("net-pp2") / "bundle"
    outcome = rank_pool.run(graph_builds.build, [1, 1], net.plan, out, (), graph_builds.with_files)
    assert outcome[0].parity.passed, outcome[0].parity.reason
    return out


@pytest.fixture(scope="module")
def built(net: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On one rank, in one bucket of one shape."""
    out = tmp_path_factory.mktemp("net-1") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        graph_builds.with_files(patch, 0)
        graph_builds.build_here(net.plan, out, "compile.buckets=[2]", "model.dims={height: [8]}")
    return out


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def run_arguments(bundle: Path, folder: Path, *more: str) -> list[str]:
    """Of a run over two pictures, made in `folder`."""
    (folder / "in").mkdir(parents=True)
    for index, (x,) in enumerate(samples("Net", 2)[0]):
        np.save(folder / "in" / f"{index}.npy", x.numpy())
    out = str(folder / "results")
    return ["run", "--bundle", str(bundle), str(folder / "in"), "--output", out, *more]


def results_of(folder: Path) -> list[list[torch.Tensor]]:
    """What such a run wrote."""
    files = [np.load(folder / "results" / f"{index}.npz") for index in range(2)]
    return [[torch.from_numpy(file[name]) for name in file.files] for file in files]


@pytest.mark.full
def test_a_bundle_runs_elsewhere_without_the_models_code_and_compiles_nothing(
    tmp_path: Path,
) -> None:
    model = make_model(tmp_path / "model", "Net")
    given = ["--config", str(model.plan), "-pp", "2", "--output", str(tmp_path / "out")]
    made = run_command("compile", *given)
    assert made.returncode == 0, made.stderr
    assert "parity: passed; smallest cosine " in made.stdout
    assert "12 comparisons" in made.stdout  # three outputs, two heights, batches of 1 and 2

    moved = (tmp_path / "out").rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "model")
    environment = barren(tmp_path / "barren")
    done = run_command(*run_arguments(moved, tmp_path / "run"), environment=environment)
    assert done.returncode == 0, done.stderr
    assert_equal([results_of(tmp_path / "run")], model.module, samples("Net", 2))
    said = [line for line in done.stderr.splitlines() if " compiled: " in line]
    assert sorted(said) == [f"shardline: rank {rank} compiled: nothing" for rank in (0, 1)]
    assert left_in(tmp_path / "barren") == []
    assert str(tmp_path / "model") not in (moved / "manifest.json").read_text()


@pytest.mark.parametrize("height", [8, 16])
def test_stages_run_from_a_bundle_in_every_bucket(
    height: int, net: Model, net_pp2: Path, rank_pool: RankPool
) -> None:
    batches = samples("Net", *COUNTS, height=height)
    replies = rank_pool.run(graph_builds.run_bundle, [1, 1], net_pp2, batches)
    assert_equal(replies[0][0], net.module, batches)
    assert [compiled for _, compiled in replies] == [{}, {}]


@pytest.mark.parametrize("tp_sizes", [[2], pytest.param([2, 1], marks=pytest.mark.full)], ids=str)
def test_shards_of_a_transformer_run_from_a_bundle(
    tp_sizes: list[int], reader: Model, rank_pool: RankPool, tmp_path: Path
) -> None:
    outcome = rank_pool.run(graph_builds.build, tp_sizes, reader.plan, tmp_path / "out")[0]
    assert outcome.parity.passed, outcome.parity.reason
    batches = samples("Reader", *COUNTS)
    replies = rank_pool.run(graph_builds.run_bundle, tp_sizes, tmp_path / "out", batches)
    assert_equal(replies[0][0], reader.module, batches)
    assert all(compiled == {} for _, compiled in replies)


@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.full) for name in ("inductor", "auto")]
)
def test_stages_compiled_by_inductor_run_from_a_bundle(
    backend: str, net: Model, rank_pool: RankPool, tmp_path: Path
) -> None:
    settings = (f"compile.backend={backend}", "compile.buckets=[2]", "model.dims={height: [8]}")
    outcome = rank_pool.run(graph_builds.build, [1, 1], net.plan, tmp_path / "out", settings)[0]
    assert outcome.parity.passed, outcome.parity.reason
    if backend == "auto":
        tried = [c for made in outcome.built for c in made.candidates if c.backend != "tensorrt"]
        assert [c.backend for c in tried] == ["inductor", "eager"] * 2
        assert all(c.parity and c.microseconds for c in tried), tried
    else:
        assert {made.backend for made in outcome.built} == {"inductor"}
    batches = samples("Net", *COUNTS)
    replies = rank_pool.run(graph_builds.run_bundle, [1, 1], tmp_path / "out", batches)
    assert_equal(replies[0][0], net.module, batches)
    assert [compiled for _, compiled in replies] == [{}, {}]


PLANTED = {
    "a scaled weight": ("Net", [1, 1], graph_builds.scale("head.weight", 1.02), "mask"),
    "an artefact at one bucket": ("Net", [1, 1], build_jobs.spoil("stage1@3x16x16.0", 2), "mask"),
    "not a number": ("Net", [1, 1], graph_builds.not_a_number, "mask"),
    "a lost all-reduce": ("Reader", [2], graph_builds.lose_all_reduce, "output"),
    "a scaled shard": ("Reader", [2], graph_builds.scale("layers.1.down.weight", 1.1), "output"),
}


IN_CI = ("an artefact at one bucket", "a lost all-reduce")


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, marks=[] if f in IN_CI else [pytest.mark.full]) for f in PLANTED],
)
def test_a_bundle_that_computes_something_else_fails_its_check(
    fault: str, net: Model, reader: Model, rank_pool: RankPool, tmp_path: Path
) -> None:
    name, tp_sizes, plant, output = PLANTED[fault]
    plan = {"Net": net, "Reader": reader}[name].plan
    outcome = rank_pool.run(graph_builds.build, tp_sizes, plan, tmp_path / "out", (), plant)[0]
    assert not outcome.parity.passed
    assert outcome.parity.reason.startswith(f"{output} at "), outcome.parity.reason
    if fault == "an artefact at one bucket":
        buckets = {o.bucket for o in outcome.parity.outputs if not o.passed}
        assert buckets == {"image[2, 3, 16, 16]"}
    assert Bundle.open(tmp_path / "out").manifest.parity["passed"] is False


def test_a_compile_that_fails_its_check_ends_with_7_and_so_does_a_run(
    net: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph_builds.not_a_number(monkeypatch, 0)
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["compile", "--config", str(net.plan), "--output", str(out)])
    assert getattr(done.exception, "exit_code", None) == 7, done.exception
    assert "parity: FAILED: mask at image[1, 3, 8, 16] is wrong: error -1" in done.stdout
    monkeypatch.undo()
    done = CliRunner().invoke(app, run_arguments(out, tmp_path / "run"))
    assert getattr(done.exception, "exit_code", None) == 7
    assert "--accept-parity" in str(done.exception)


def refused(arguments: list[str]) -> ShardlineError:
    """How a command ends, in this process, which is the only rank."""
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, ShardlineError), done.exception
    assert "\n" not in str(done.exception)
    return done.exception


def graph_of(bundle: Path) -> str:
    return f"model/graphs/{min(p.name for p in (bundle / 'model' / 'graphs').iterdir())}"


def artefact_of(bundle: Path) -> str:
    return f"artefacts/{min(p.name for p in (bundle / 'artefacts').iterdir())}/code.bin"


@pytest.mark.parametrize(
    ("name", "offset"),
    [
        (lambda _: "model/programs.json", 700),
        (graph_of, 3000),
        (lambda _: "weights/rank0.safetensors", -5),
        (artefact_of, 7),
    ],
    ids=["programs", "graph", "weights", "artefact"],
)
def test_a_damaged_file_is_named(name: Callable[[Path], str], offset: int, bundle: Path) -> None:
    spoilt = name(bundle)
    flip(bundle / spoilt, offset)
    error = refused(run_arguments(bundle, bundle.with_name("run")))
    assert error.exit_code == 4
    assert spoilt in str(error)
    for on_mismatch in ("eager", "rebuild"):
        rewrite_manifest(bundle, _older_torch)
        more = ("--on-mismatch", on_mismatch)
        arguments = run_arguments(bundle, bundle.with_name(on_mismatch), *more)
        if spoilt == artefact_of(bundle):  # Neither of them reads it.
            assert CliRunner().invoke(app, arguments).exception is None
        else:
            assert refused(arguments).exit_code == 4


def test_the_other_command_is_named(bundle: Path) -> None:
    asked = ["generate", "--bundle", str(bundle), "--prompt", "One"]
    error = refused(asked)
    assert (error.exit_code, str(error)) == (
        2,
        "models_of_a_user:Net is a tensor model; use shardline run",
    )


@pytest.mark.parametrize(
    ("override", "is_allowed"),
    [
        ("scheduler.max_queue_delay_ms=3", True),
        ("model.preprocess.image.resize=64", True),
        ("compile.enforce_eager=true", True),
        ("scheduler.max_batch_size=4", False),
        ("model.dims={height: [8, 16]}", False),
        ("parallel.pipeline_parallel_size=2", False),
    ],
)
def test_what_may_differ_at_run_time(override: str, is_allowed: bool, bundle: Path) -> None:
    arguments = run_arguments(bundle, bundle.with_name("run"), "--set", override)
    if is_allowed:
        done = CliRunner().invoke(app, arguments)
        assert done.exception is None, done.exception
    else:
        error = refused(arguments)
        assert error.exit_code == 2
        assert "would change what was compiled" in str(error)


def test_a_second_compile_takes_everything_over_and_another_cut_what_is_equal(
    net: Model, net_pp2: Path, rank_pool: RankPool, tmp_path: Path
) -> None:
    options = {"reuse_from": (net_pp2,)}
    job = partial(rank_pool.run, graph_builds.build)
    again = job([1, 1], net.plan, tmp_path / "again", (), None, options)[0]
    assert [made.seconds for made in again.built] == [0.0] * 8
    assert again.parity.passed

    three = job([1, 1, 1], net.plan, tmp_path / "three", (), None, options)[0]
    assert three.parity.passed, three.parity.reason
    assert len(three.built) == 12

    old, new = (Bundle.open(b) for b in (net_pp2, tmp_path / "three"))
    first = [bundle.plan.stages[0].modules for bundle in (old, new)]
    equal = {made.kind for made in three.built if made.seconds == 0}
    has_equal_start = first[0] == first[1]
    assert ("stage0@3x8x16.0" in equal) == has_equal_start


def _older_torch(manifest: dict[str, Any]) -> None:
    manifest["host"]["versions"]["torch"] = "2.12.0"


@pytest.mark.parametrize("on_mismatch", ["eager", "rebuild"])
def test_a_bundle_of_another_host_runs_otherwise_when_told_to(
    on_mismatch: str, net: Model, net_pp2: Path, rank_pool: RankPool, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(net_pp2, tmp_path / "bundle"))
    rewrite_manifest(bundle, _older_torch)
    batches = samples("Net", *COUNTS, height=16)
    with pytest.raises(IncompatibleError, match="compiled for another host: torch is 2"):
        graph_builds.run_here(bundle, batches)
    # On the pool, since `run_bundle` takes the options of `open_job`.
    job = partial(graph_builds.run_bundle, on_mismatch=on_mismatch)
    replies = rank_pool.run(job, [1, 1], bundle, batches)
    assert_equal(replies[0][0], net.module, batches)


@pytest.mark.full
def test_inductor_rebuilds_a_bundle_of_another_host(net: Model, bundle: Path) -> None:
    def of_inductor(manifest: dict[str, Any]) -> None:
        _older_torch(manifest)
        for artefact in manifest["artefacts"].values():
            artefact["backend"] = "inductor"

    rewrite_manifest(bundle, of_inductor)
    batches = samples("Net", 2, 1)
    assert_equal(graph_builds.run_here(bundle, batches, on_mismatch="rebuild"), net.module, batches)


def test_a_killed_compile_goes_on_with_its_weights_and_artefacts(
    net: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compile_file, "publish", fail)
        with pytest.raises(KeyboardInterrupt):
            graph_builds.build_here(net.plan, out, "compile.buckets=[2]")
    weights = out.with_name("out.partial") / "weights" / "rank0.safetensors"
    before = weights.stat().st_ino
    outcome = graph_builds.build_here(net.plan, out, "compile.buckets=[2]")
    assert (out / "weights" / "rank0.safetensors").stat().st_ino == before
    assert [made.seconds for made in outcome.built] == [0.0, 0.0]
