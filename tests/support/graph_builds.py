"""Bundles of tensor models: what they are made from, made on the ranks of a `RankPool` or of a
command, with faults planted where a test asks, and run.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bundled_models
import pytest
import torch
import yaml
from build_jobs import Plant
from graph_jobs import Outputs, Sample, submit_all
from safetensors.torch import save_file
from torch import nn
from torch.utils import _pytree as pytree

from parallel.collectives import Group
from parallel.context import ParallelContext
from parallel.launch import RankEnv
from parallel.topology import Topology
from runner.build import graph_recipe
from runner.build.compile import Destination, Outcome, compile_together
from runner.build.recipe import recipe_of
from runner.bundle.weights_file import read_weights
from runner.bundled import open_job
from runner.compiler.backend import Compiled
from runner.compiler.counter import compilations
from runner.compiler.eager import EagerBackend
from runner.compiler.segment import Segment
from runner.config.load import load
from runner.graph_planning import GraphJob
from runner.joining import Phase
from runner.pipeline import stage_worker
from runner.pipeline.loading import load_worker
from runner.pipeline.pipeline import Pipeline
from runner.pipeline.rank import run_worker

INPUTS = {
    "Net": [{"name": "image", "shape": ["batch", 3, "height", 16]}],
    "Reader": [
        {"name": "ids", "shape": ["batch", 6], "dtype": "int64"},
        {"name": "mask", "shape": ["batch", 6], "dtype": "bool"},
    ],
}
DIMS: dict[str, dict[str, list[int]]] = {"Net": {"height": [8, 16]}, "Reader": {}}
LAYERS = {"query": "colwise", "key": "colwise", "value": "colwise", "output": "rowwise"}
TP_PLAN = {f"layers.*.{name}": style for name, style in LAYERS.items()} | {
    "layers.*.up": "colwise",
    "layers.*.down": "rowwise",
}


@dataclass(frozen=True)
class Model:
    """A model in a folder of its own.

    Attributes:
        plan: its configuration.
        code: what its factory lies in.
        module: the same, for comparing.
    """

    plan: Path
    code: Path
    module: nn.Module


def make_model(folder: Path, name: str, **sections: dict[str, Any]) -> Model:
    """Write a model of `bundled_models` with random weights and a configuration of it.

    Args:
        sections: of the configuration, merged with what there is.
    """
    code = folder / "code"
    code.mkdir(parents=True)
    shutil.copyfile(bundled_models.__file__, code / "models_of_a_user.py")
    torch.manual_seed(0)
    module = getattr(bundled_models, name)().eval()
    for key, tensor in module.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            tensor.uniform_(0.5, 2.0)
    save_file(module.state_dict(), folder / "weights.safetensors")
    factory = f"models_of_a_user:{name}"
    config: dict[str, Any] = {
        "model": {
            "path": str(folder / "weights.safetensors"),
            "factory": factory,
            "factory_path": str(code),
            "inputs": INPUTS[name],
            "dims": DIMS[name],
        },
        "security": {"factories": [factory]},
        "parallel": {"device": "cpu"},
        "scheduler": {"max_batch_size": 2},
        "compile": {"backend": "eager", "buckets": [1, 2]},
    }
    merged = {key: config.get(key, {}) | sections.get(key, {}) for key in config | sections}
    plan = folder / "plan.yaml"
    plan.write_text(yaml.safe_dump({"version": 1, **merged}))
    return Model(plan, code, module)


def stages(tp_sizes: Sequence[int]) -> str:
    """The override that makes a job have such stages."""
    given = ", ".join(f"{{tensor_parallel_size: {size}}}" for size in tp_sizes)
    return f"parallel.stages=[{given}]"


def build(
    context: ParallelContext,
    plan: Path,
    out: Path,
    overrides: Sequence[str] = (),
    plant: Plant | None = None,
    options: dict[str, Any] | None = None,
) -> Outcome:
    """Compile on this rank.

    Args:
        plant: its fault is there for as long as this takes.
        options: of `Destination`.
    """
    cut = stages(context.topology.tp_sizes)
    job = GraphJob.prepare(load(plan, overrides=[cut, *overrides]).config)
    with pytest.MonkeyPatch.context() as patch:
        if plant:
            plant(patch, context.rank)
        phase = Phase(RankEnv(context.rank, context.topology.world_size))
        return compile_together(recipe_of(job), context, Destination(out, **options or {}), phase)


def build_here(plan: Path, out: Path, *overrides: str, **options: Any) -> Outcome:
    """Compile on one rank, which is this process."""
    alone = ParallelContext.open(Topology.of([1]), RankEnv(0, 1), device_type="cpu")
    outcome = build(alone, plan, out, overrides, options=options)
    alone.close()
    return outcome


def run_bundle(
    context: ParallelContext, bundle: Path, batches: list[list[Sample]], **options: Any
) -> tuple[list[list[Outputs]] | None, dict[str, int]]:
    """The outputs of batches of samples, known on rank 0, and what this rank compiled meanwhile.

    Args:
        options: of `open_job`.
    """
    before = compilations()
    job = open_job(bundle, **options)
    assert isinstance(job, GraphJob)
    found: list[list[Outputs]] = []

    def use(pipeline: Pipeline) -> None:
        found.extend(future.result(60) for future in submit_all(pipeline, job, batches))

    run_worker(job, load_worker(job, context), context, use if context.rank == 0 else None)
    after = compilations()
    made = {kind: after[kind] - before.get(kind, 0) for kind in after}
    return found or None, {kind: count for kind, count in made.items() if count}


def run_here(bundle: Path, batches: list[list[Sample]], **options: Any) -> list[list[Outputs]]:
    """The same on one rank, which is this process."""
    alone = ParallelContext.open(Topology.of([1]), RankEnv(0, 1), device_type="cpu")
    found, _ = run_bundle(alone, bundle, batches, **options)
    alone.close()
    assert found is not None
    return found


def samples(name: str, *counts: int, height: int = 8) -> list[list[Sample]]:
    """Batches of so many samples of a model."""
    generator = torch.Generator().manual_seed(len(counts) + height)
    if name == "Net":
        return [
            [[torch.randn(3, height, 16, generator=generator)] for _ in range(n)] for n in counts
        ]
    mask = torch.tensor([True] * 4 + [False] * 2)
    return [
        [[torch.randint(11, (6,), generator=generator), mask] for _ in range(n)] for n in counts
    ]


def assert_equal(
    found: list[list[Outputs]], module: nn.Module, batches: list[list[Sample]]
) -> None:
    """Every sample came to what plain PyTorch makes of it."""
    assert len(found) == len(batches)
    for answers, batch in zip(found, batches, strict=True):
        for answer, sample in zip(answers, batch, strict=True):
            with torch.no_grad():
                wanted = pytree.tree_leaves(module(*(x[None] for x in sample)))
            for got, expected in zip(answer, wanted, strict=True):
                torch.testing.assert_close(got[None], expected, rtol=1e-4, atol=1e-4)


def scale(name: str, factor: float) -> Plant:
    """Every rank that holds this tensor finds another one in the bundle."""
    return partial(_change_weights, name=name, factor=factor)


def lose_all_reduce(patch: pytest.MonkeyPatch, rank: int) -> None:
    """The ranks of a stage no longer add up their parts of a layer."""
    del rank
    patch.setattr(stage_worker, "all_reduce", _not_reduced)


def not_a_number(patch: pytest.MonkeyPatch, rank: int) -> None:
    """The last element of whatever a compiled segment makes of floats is NaN."""
    del rank
    load_right = EagerBackend.load

    def load_wrong(self: EagerBackend, folder: Path, segment: Segment) -> Compiled:
        run = load_right(self, folder, segment)

        def run_wrongly(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            outputs = run(*inputs)
            for output in outputs:
                if output.is_floating_point():
                    output.view(-1)[-1] = torch.nan
            return outputs

        return run_wrongly

    patch.setattr(EagerBackend, "load", load_wrong)


def with_files(patch: pytest.MonkeyPatch, rank: int) -> None:
    """An artefact of eager has no files; here it gets one, to be spoilt."""
    del rank
    patch.setattr(EagerBackend, "build", _write_code)


def _write_code(self: EagerBackend, segment: Any, program: Any, folder: Path) -> None:
    del self, segment, program
    (folder / "code.bin").write_bytes(b"code" * 100)


def _change_weights(patch: pytest.MonkeyPatch, rank: int, *, name: str, factor: float) -> None:
    del rank

    def read(path: Path, *, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        for held, tensor in read_weights(path, device=device):
            yield held, tensor * factor if held == name else tensor

    patch.setattr(graph_recipe, "read_weights", read)


def _not_reduced(x: torch.Tensor, group: Group) -> torch.Tensor:
    del group
    return x
