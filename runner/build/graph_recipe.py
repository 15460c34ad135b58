"""`GraphRecipe`: how a tensor model becomes a bundle."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from parallel.context import ParallelContext
from runner.build.built import Built
from runner.build.contents import uses_of
from runner.build.graph_parity import GraphParity, compare
from runner.build.worklist import Use, Work
from runner.bundle import layout
from runner.bundle.builder import BundleBuilder
from runner.bundle.weights_file import TensorHeader
from runner.compiler.backend import Compiled
from runner.compiler.backends import Backends
from runner.compiler.segment import Segment
from runner.graph_planning import GraphJob
from runner.pipeline.loading import make_worker, runs_of
from runner.pipeline.programs import batch_size, programs_of_all, weights_of
from runner.pipeline.stage_program import StageProgram
from runner.pipeline.stored_programs import FILE, write_programs


@dataclass(frozen=True)
class GraphRecipe:
    """See `runner.build.recipe.Recipe`."""

    job: GraphJob

    @property
    def source_files(self) -> tuple[Path, ...]:
        return self.job.source_files

    @cached_property
    def programs(self) -> list[list[StageProgram]]:
        """Of all ranks, by bucket."""
        return programs_of_all(self.job, device=self.job.device_type)

    def works(self) -> list[Work]:
        """Segments are equal if their code and their shapes are: constants are weights, too."""
        found: dict[Any, Work] = {}
        for rank, programs in enumerate(self.programs):
            for bucket, program in zip(self.job.plan.buckets, programs, strict=True):
                num_samples = batch_size(bucket, self.job.plan)
                for step in program.computations:
                    work = found.setdefault(
                        _identity(step.segment), Work(step.segment, num_samples)
                    )
                    work.uses.append(Use(rank, step.segment.kind, num_samples))
        return list(found.values())

    def write_weights(self, rank: int, builder: BundleBuilder, *, source: str) -> None:
        if not self.source_files or builder.finished_weights(rank, source):
            return
        programs = self.programs[rank]
        weights = dict(weights_of(self.job, rank, programs, device=torch.device("cpu")))
        order = [tensor.name for tensor in self.job.plan.ranks[rank].tensors]
        headers = {name: _header(weights[name]) for name in order}
        tensors = ((name, weights[name]) for name in order)
        builder.write_weights(rank, tensors, source=source, headers=headers)

    def copy_files(self, builder: BundleBuilder) -> None:
        with TemporaryDirectory(prefix="shardline-programs-") as name:
            files = write_programs(self.programs, Path(name))
            builder.copy_model_files(Path(name), files)

    def portable_config(self, device_type: str) -> dict[str, Any]:
        config: dict[str, Any] = self.job.config.model_dump()
        config["model"] |= {
            "path": f"{layout.MODEL}/{FILE}",
            "format": "pt2",
            "factory": None,
            "factory_path": None,
            "factory_args": {},
            "dtype": self.job.plan.dtype,
        }
        config["security"] = {"factories": []}
        config["parallel"]["device"] = device_type
        return config

    def compare(
        self,
        context: ParallelContext,
        builder: BundleBuilder,
        built: list[Built],
        backends: Backends,
    ) -> GraphParity:
        programs = self.programs[context.rank]
        uses = uses_of(built, context.world.size)[context.rank]
        backend_of: Mapping[str, str] = {made.key: made.backend for made in built}

        def load(segment: Segment, num_samples: int) -> Compiled:
            key = uses[segment.kind][num_samples]
            return backends[backend_of[key]].load(builder.artefact_folder(key), segment)

        runs = runs_of(self.job, programs, load)
        worker = make_worker(self.job, context, programs, runs)
        return compare(self.job, worker, context)


def _identity(segment: Segment) -> Any:
    code = getattr(segment.module, "code", "")
    return code, segment.activations, tuple(segment.weights.items())


def _header(tensor: torch.Tensor) -> TensorHeader:
    return TensorHeader(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
