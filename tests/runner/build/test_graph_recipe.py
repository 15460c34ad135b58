"""What a bundle of a tensor model is made of: distinct segments, weights, and samples to time."""

from pathlib import Path

import graph_builds
import pytest
import torch
from graph_jobs import CASES, make_job
from torch import nn

from runner.build.agreement import LEAST_ERROR
from runner.build.choice import Chooser
from runner.build.graph_recipe import GraphRecipe
from runner.build.measure import Samples, error_of
from runner.build.worklist import Work
from runner.bundle.builder import BundleBuilder
from runner.bundle.weights_file import read_weights
from runner.compiler.backends import Backends
from runner.compiler.segment import Segment, TensorSpec
from runner.config.load import load
from runner.graph_planning import GraphJob

CPU = torch.device("cpu")


def recipe_of(plan: Path, *overrides: str) -> GraphRecipe:
    return GraphRecipe(GraphJob.prepare(load(plan, overrides=overrides).config), "cpu")


def test_a_segment_of_several_ranks_is_one_work() -> None:
    recipe = GraphRecipe(make_job(CASES["text"], [2]), "cpu")
    works = recipe.works()
    used = [use for work in works for use in work.uses]
    assert len(set(used)) == len(used) == sum(len(p[0].computations) for p in recipe.programs)
    shared = [work for work in works if {use.rank for use in work.uses} == {0, 1}]
    assert shared
    assert len(works) < len(used)


def test_every_bucket_has_works_of_its_own() -> None:
    job = make_job(CASES["unet"], [1, 1], compile={"buckets": [1, 4]})
    works = GraphRecipe(job, "cpu").works()
    assert sorted((work.segment.kind, work.num_rows) for work in works) == [
        (f"stage{stage}@2x{height}x16.0", rows)
        for stage in (0, 1)
        for height in ("16", "8")
        for rows in (1, 4)
    ]


def test_weights_of_all_buckets_and_dtypes_are_written(tmp_path: Path) -> None:
    """The constants of a net at its smaller height, and the integers of a transformer."""
    for name in ("Net", "Reader"):
        recipe = recipe_of(graph_builds.make_model(tmp_path / name, name).plan)
        out = tmp_path / f"{name}-bundle"
        with BundleBuilder.lead(out, recipe.job.plan) as builder:
            recipe.write_weights(0, builder, source="source")
            file = builder.folder / "weights" / "rank0.safetensors"
            found = dict(read_weights(file, device=CPU))
        held = {n: t for program in recipe.programs[0] for n, t in program.tensors()}
        assert found.keys() == held.keys()
        assert all(torch.equal(found[n], held[n]) for n in held)
        planned = {tensor.name for tensor in recipe.job.plan.ranks[0].tensors}
        assert planned <= found.keys()
        assert (planned < found.keys()) == (name == "Net")


def test_random_weights_of_a_factory_are_written_too(tmp_path: Path) -> None:
    """A run from the bundle has no factory that could draw them again."""
    plan = graph_builds.make_model(tmp_path / "model", "Net").plan
    recipe = recipe_of(plan, "model.load_format=dummy")
    (code,) = recipe.source_files
    assert code.suffix == ".py"
    with BundleBuilder.lead(tmp_path / "out", recipe.job.plan) as builder:
        recipe.write_weights(0, builder, source="source")
        found = dict(read_weights(builder.folder / "weights" / "rank0.safetensors", device=CPU))
    assert recipe.job.model is not None
    drawn = dict(recipe.job.model.module.named_parameters())
    assert drawn.keys() <= found.keys()
    assert all(torch.equal(found[name], drawn[name]) for name in drawn)


def test_weights_are_kept_until_the_models_code_computes_others(tmp_path: Path) -> None:
    plan = graph_builds.make_model(tmp_path / "model", "Net").plan
    recipe = recipe_of(plan)
    with BundleBuilder.lead(tmp_path / "out", recipe.job.plan) as builder:
        file = builder.folder / "weights" / "rank0.safetensors"
        recipe.write_weights(0, builder, source="source")
        first = file.stat().st_ino
        recipe_of(plan).write_weights(0, builder, source="source")
        assert file.stat().st_ino == first
        other = recipe_of(plan)
        assert other.job.model is not None
        other.job.model.module.stem[1].running_mean += 1
        other.write_weights(0, builder, source="source")
        weights = dict(read_weights(file, device=CPU))
        assert torch.equal(
            weights["stem.1.running_mean"], other.job.model.module.stem[1].running_mean
        )


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.conv(x))
        return y


class Lookup(nn.Module):
    """No floating-point input, and integers among the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([2, 0, 1]))

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.order[ids], ids > 0


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.arange(6.0))

    def forward(self) -> torch.Tensor:
        return self.grid * 2


class Scalar(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.log().expand(3).contiguous()


SEGMENTS = {
    "norm": (Norm, [TensorSpec((2, 3, 8, 8), torch.float32)]),
    "lookup": (Lookup, [TensorSpec((4, 2), torch.int64)]),
    "constant": (Constant, []),
    "scalar": (Scalar, [TensorSpec((), torch.float32)]),
}


def make_segment(name: str) -> Segment:
    make, activations = SEGMENTS[name]
    torch.manual_seed(0)
    return Segment(name, make().eval(), tuple(activations))


@pytest.mark.parametrize("name", SEGMENTS)
def test_samples_hold_the_segments_own_weights(name: str) -> None:
    segment = make_segment(name)
    samples = Samples.draw(segment, CPU)
    run = segment.function()
    for drawn in samples.inputs[:3]:
        for spec, tensor in zip(segment.inputs, drawn, strict=True):
            assert TensorSpec.of(tensor) == spec
        own = [*segment.module.parameters(), *segment.module.buffers()]
        for mine, theirs in zip(drawn[len(segment.activations) :], own, strict=True):
            assert torch.equal(mine, theirs)
            assert mine.data_ptr() != theirs.data_ptr()
    assert samples.error_ratio(run) <= 1
    if segment.kind == "norm":
        assert all(output.isfinite().all() for output in samples.exact)
        assert samples.eager_error <= LEAST_ERROR / 4


@pytest.mark.parametrize(
    "name",
    ["scalar", *(pytest.param(n, marks=pytest.mark.full) for n in SEGMENTS if n != "scalar")],
)
def test_auto_measures_every_kind_of_segment(name: str, tmp_path: Path) -> None:
    segment = make_segment(name)
    plan = make_job(CASES["chain"], [1]).plan
    backends = Backends(CPU)
    with BundleBuilder.lead(tmp_path / "out", plan) as builder:
        chooser = Chooser([backends[n] for n in ("inductor", "eager")], builder, CPU, 4.0)
        built = chooser.build(Work(segment, 1))
    assert [(c.backend, c.parity, c.note) for c in built.candidates] == [
        ("inductor", True, ""),
        ("eager", True, ""),
    ]
    assert all(c.microseconds and c.microseconds > 0 for c in built.candidates)


def test_labels_may_differ_a_little_and_what_is_no_number_tells_nothing() -> None:
    exact = torch.zeros(1000, dtype=torch.int64)
    found = exact.clone()
    found[:10] = 1
    assert error_of((found,), (exact,)) == 0
    found[:30] = 1
    assert error_of((found,), (exact,)) == pytest.approx(0.02)
    exact = torch.tensor([1.0, torch.nan, torch.inf])
    assert error_of((torch.tensor([1.0, 7.0, torch.nan]),), (exact,)) == 0
    assert error_of((torch.tensor([torch.nan, 7.0, 1.0]),), (exact,)) == float("inf")
