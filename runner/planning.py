"""From a configuration, or a bundle, to a job: the model, and the `DecoderPlan` that divides it.

Runs in every process and needs neither torch nor a device, so that a user's mistake is found before
any rank is started.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.decoder_plan import DecoderPlan
from parallel.fit import Budget
from parallel.planner import Limits, make_plan
from parallel.topology import Topology
from runner.bundle.bundle import Bundle
from runner.compiler.buckets import buckets_of
from runner.config.schema import RunnerConfig
from runner.job import Job
from runner.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class DecoderJob(Job):
    """A language model, divided."""

    plan: DecoderPlan
    spec: ModelSpec

    @classmethod
    def prepare(cls, config: RunnerConfig) -> "DecoderJob":
        """Read the model's headers and divide it.

        Raises:
            ConfigError: the model, a size or a cut is not possible.
            IntegrityError: a file of the model is absent, truncated, corrupt or does not match.
        """
        spec = ModelSpec.open(Path(config.model.path), load_format=config.model.load_format)
        return cls(config=config, spec=spec, plan=plan_of(config, spec))

    @classmethod
    def from_bundle(cls, bundle: Bundle, config: RunnerConfig) -> "DecoderJob":
        """Run what `shardline compile` made.

        Args:
            config: the bundle's own, with whatever may differ at run time.

        Raises:
            IntegrityError: the bundle does not hold together.
        """
        spec = ModelSpec.open(bundle.model_folder, load_format="dummy")
        assert isinstance(bundle.plan, DecoderPlan), "whoever calls this has looked"
        return cls(config=config, spec=spec, plan=bundle.plan, bundle=bundle)

    @property
    def has_random_weights(self) -> bool:
        """Whether no file holds the weights."""
        return self.config.model.load_format == "dummy"

    @property
    def source_files(self) -> list[Path]:
        """What the weights are read from; none where they are random, or a bundle's."""
        if self.has_random_weights or self.bundle:
            return []
        return sorted({info.file for info in self.spec.checkpoint.tensors.values()})

    @property
    def buckets(self) -> tuple[int, ...]:
        """Numbers of tokens that compiled steps are padded to."""
        limit = self.config.scheduler.max_num_batched_tokens
        return buckets_of(self.config.compile.buckets, limit)

    def weights(
        self, rank: int, *, dtype: "torch.dtype", device: "torch.device"
    ) -> Iterator[tuple[str, "torch.Tensor"]]:
        """The parameters of a rank by name, from wherever this job has them.

        Raises:
            IntegrityError: a file cannot be read.
        """
        from parallel.random_weights import random_weights
        from parallel.weights import stream

        rank_plan = self.plan.ranks[rank]
        if self.has_random_weights:
            return random_weights(rank_plan, dtype=dtype, device=device)
        if self.bundle:
            return self.bundle.weights(rank, device=device)
        return stream(self.spec.checkpoint, rank_plan, dtype=dtype, device=device)


def topology_of(config: RunnerConfig) -> Topology:
    """Tensor-parallel sizes and devices, from `parallel.stages` or from the two sizes.

    Raises:
        ConfigError: devices that do not fit the sizes.
    """
    return Topology.of(config.parallel.tensor_parallel_sizes, config.parallel.devices)


def plan_of(config: RunnerConfig, spec: ModelSpec) -> DecoderPlan:
    """Divide a model as the configuration says.

    Raises:
        ConfigError: a size or cut that is not possible for this model.
        IntegrityError: tensors that do not match the model's config.
    """
    patterns = [stage.modules for stage in config.parallel.stages or [] if stage.modules]
    limits = Limits(
        max_model_len=spec.max_model_len(config.model.max_model_len),
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
    )
    return make_plan(
        spec.layout,
        spec.checkpoint,
        topology_of(config),
        architecture=spec.config.architecture,
        dtype=spec.dtype if config.model.dtype == "auto" else config.model.dtype,
        limits=limits,
        stages=patterns or None,
    )


def with_sizes(config: RunnerConfig, *, tp_size: int, pp_size: int) -> RunnerConfig:
    """The configuration with these sizes, for equal stages that are cut by cost."""
    sizes = {"tensor_parallel_size": tp_size, "pipeline_parallel_size": pp_size, "stages": None}
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=sizes)})


def budget_of(config: RunnerConfig, memory_bytes: int) -> Budget:
    """What a GPU of this memory offers to a job."""
    kv_cache = config.kv_cache
    return Budget(memory_bytes, kv_cache.gpu_memory_utilization, kv_cache.block_size)
