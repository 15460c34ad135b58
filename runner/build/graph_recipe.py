"""`GraphRecipe`: how a tensor model becomes a bundle."""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from parallel import low_latency
from parallel.context import ParallelContext
from runner.build.built import Built
from runner.build.contents import uses_of
from runner.build.graph_parity import GraphParity, compare
from runner.build.sharing import barrier
from runner.build.worklist import Use, Work
from runner.bundle import layout
from runner.bundle.builder import BundleBuilder
from runner.bundle.weights_file import TensorHeader, read_weights
from runner.compiler.backend import Compiled
from runner.compiler.backends import Backends
from runner.compiler.segment import Segment
from runner.graph_planning import GraphJob
from runner.pipeline.loading import make_worker, runs_of
from runner.pipeline.programs import batch_size, programs_to_compile, weights_of
from runner.pipeline.stage_program import StageProgram
from runner.pipeline.stored_programs import FILE, read_programs, write_programs


@dataclass(frozen=True)
class GraphRecipe:
    """See `runner.build.recipe.Recipe`.

    Attributes:
        traced_on: type of the device that its graphs name.
    """

    job: GraphJob
    traced_on: str

    @property
    def source_files(self) -> tuple[Path, ...]:
        return self.job.source_files

    @cached_property
    def programs(self) -> list[list[StageProgram]]:
        """Of all ranks, by bucket."""
        return programs_to_compile(self.job, device=self.traced_on)

    @property
    def kernels(self) -> Collection[str]:
        return (low_latency.KERNEL,)

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
        """Those of the plan, which is about the largest bucket, and then what others hold besides:
        constants of their shapes.
        """
        programs = self.programs[rank]
        weights = dict(weights_of(self.job, rank, programs, device=torch.device("cpu")))
        made_from = hashlib.sha256(f"{source} {_digest_of_buffers(programs)}".encode())
        if builder.finished_weights(rank, made_from.hexdigest()):
            return
        planned = [tensor.name for tensor in self.job.plan.ranks[rank].tensors]
        order = dict.fromkeys([*planned, *weights])
        headers = {name: TensorHeader.of(name, weights[name]) for name in order}
        tensors = ((name, weights[name]) for name in order)
        builder.write_weights(rank, tensors, source=made_from.hexdigest(), headers=headers)

    def copy_files(self, builder: BundleBuilder) -> None:
        """Those that `compare` has written are there already."""
        if (builder.folder / layout.MODEL / FILE).exists():
            return
        # A graph names devices, and those of a bundle are moved to whatever they run on.
        on_cpu = self.traced_on == "cpu"
        programs = self.programs if on_cpu else programs_to_compile(self.job, device="cpu")
        with builder.desk("programs") as desk:
            builder.copy_model_files(desk, write_programs(programs, desk))

    def portable_config(self, device_type: str) -> dict[str, Any]:
        config: dict[str, Any] = self.job.config.model_dump()
        config["model"] |= {
            "path": f"{layout.MODEL}/{FILE}",
            "format": "pt2",
            "load_format": "auto",
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
        if context.rank == 0:
            self.copy_files(builder)
        barrier(context.setup)
        folder = builder.folder / layout.MODEL
        programs = read_programs(folder, context.rank, device=context.device.type)
        uses = uses_of(built, context.world.size)[context.rank]
        backend_of: Mapping[str, str] = {made.key: made.backend for made in built}

        def load(segment: Segment, num_samples: int) -> Compiled:
            key = uses[segment.kind][num_samples]
            return backends[backend_of[key]].load(builder.artefact_folder(key), segment)

        runs = runs_of(self.job, programs, load)
        worker = make_worker(self.job, context, programs, runs, self._as_run(context, builder))
        return compare(self.job, worker, context)

    def _as_run(
        self, context: ParallelContext, builder: BundleBuilder
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """A rank's weights on its device, from the bundle."""
        file = builder.folder / layout.weights_file(context.rank)
        return read_weights(file, device=context.device)


def _identity(segment: Segment) -> Any:
    assert isinstance(segment.module, torch.fx.GraphModule), "it was traced"
    return segment.module.code, segment.activations, tuple(segment.weights.items())


def _digest_of_buffers(programs: list[StageProgram]) -> str:
    """sha256 of what the model's code may have computed, beside what its file holds."""
    digest = hashlib.sha256()
    for program in programs:
        for step in program.computations:
            for name, buffer in step.segment.module.named_buffers():
                data = buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(f"{name} {buffer.dtype} {tuple(buffer.shape)}".encode())
                digest.update(data.numpy().tobytes())
    return digest.hexdigest()
