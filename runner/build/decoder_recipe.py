"""`DecoderRecipe`: how a language model becomes a bundle."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parallel import low_latency
from parallel.context import ParallelContext
from runner.build.built import Built
from runner.build.contents import uses_of
from runner.build.parity import ParityReport, compare
from runner.build.worklist import Work, stages_of, worklist
from runner.bundle import layout
from runner.bundle.builder import BundleBuilder
from runner.bundle.weights_file import read_weights
from runner.compiler.backends import Backends
from runner.engine.compiled_stage import CompiledStage
from runner.engine.kv_capacity import check_weights_fit
from runner.engine.loading import load_artefacts, make_runner, with_backends
from runner.engine.rank import capture_steps, fit_blocks
from runner.engine.stage_runner import StageRunner
from runner.models import attention_choice
from runner.planning import DecoderJob


@dataclass(frozen=True)
class DecoderRecipe:
    """See `runner.build.recipe.Recipe`."""

    job: DecoderJob

    @property
    def source_files(self) -> list[Path]:
        return self.job.source_files

    @property
    def kernels(self) -> Collection[str]:
        return (*attention_choice.KERNELS, low_latency.KERNEL)

    def works(self) -> list[Work]:
        job = self.job
        return worklist(stages_of(job), job.buckets, job.config.scheduler.max_num_seqs)

    def write_weights(self, rank: int, builder: BundleBuilder, *, source: str) -> None:
        """Random weights are made again wherever they are needed."""
        if self.job.has_random_weights or builder.finished_weights(rank, source):
            return
        dtype, device = getattr(torch, self.job.plan.dtype), torch.device("cpu")
        tensors = self.job.weights(rank, dtype=dtype, device=device)
        builder.write_weights(rank, tensors, source=source)

    def copy_files(self, builder: BundleBuilder) -> None:
        spec = self.job.spec
        builder.copy_model_files(spec.folder, [file.name for file in spec.files])

    def portable_config(self, device_type: str) -> dict[str, Any]:
        config: dict[str, Any] = self.job.config.model_dump()
        config["model"] |= {
            "path": layout.MODEL,
            "dtype": self.job.plan.dtype,
            "max_model_len": self.job.plan.max_model_len,
        }
        config["parallel"]["device"] = device_type
        return config

    def compare(
        self,
        context: ParallelContext,
        builder: BundleBuilder,
        built: list[Built],
        backends: Backends,
    ) -> ParityReport:
        runner = self._load(context, builder, built, backends)
        report = compare(self.job, runner)
        runner.transfer.drain()
        self._capture(runner)
        return report

    def _capture(self, runner: StageRunner) -> None:
        """Launch what a start launches, in all its variants; on all ranks together."""
        runner.allocate(1, fit_blocks(self.job, runner))
        capture_steps(self.job, runner)
        runner.close()

    def _load(
        self,
        context: ParallelContext,
        builder: BundleBuilder,
        built: list[Built],
        backends: Backends,
    ) -> StageRunner:
        """This rank's stage as it will run from the bundle."""
        job = self.job
        check_weights_fit(job.plan, context, job.config.kv_cache.gpu_memory_utilization)
        if job.has_random_weights:
            dtype = getattr(torch, job.plan.dtype)
            weights = job.weights(context.rank, dtype=dtype, device=context.device)
        else:
            file = builder.folder / layout.weights_file(context.rank)
            weights = read_weights(file, device=context.device)
        runner = make_runner(job, context, weights)
        keys = uses_of(built, context.world.size)[context.rank]
        uses = with_backends(keys, {made.key: made.artefact for made in built})
        artefacts = load_artefacts(uses, builder.artefact_folder, runner.stage, backends)
        runner.execute, runner.buckets = CompiledStage(runner.stage, artefacts), job.buckets
        return runner
