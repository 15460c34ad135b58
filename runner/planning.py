"""From a configuration to a job: the model it names, and the `ShardPlan` that divides it.

Runs in every process and needs neither torch nor a device, so that a user's mistake is found before
any rank is started.
"""

from dataclasses import dataclass
from pathlib import Path

from parallel.fit import Budget
from parallel.plan import ShardPlan
from parallel.planner import Limits, make_plan
from parallel.topology import Topology
from runner.config.schema import RunnerConfig
from runner.models.spec import ModelSpec


@dataclass(frozen=True)
class Job:
    """What every rank of a job knows before it starts."""

    config: RunnerConfig
    spec: ModelSpec
    plan: ShardPlan

    @classmethod
    def prepare(cls, config: RunnerConfig) -> "Job":
        """Read the model's headers and divide it.

        Raises:
            ConfigError: the model, a size or a cut is not possible.
            IntegrityError: a file of the model is absent, truncated, corrupt or does not match.
        """
        spec = ModelSpec.open(Path(config.model.path))
        return cls(config, spec, plan_of(config, spec))


def topology_of(config: RunnerConfig) -> Topology:
    """Tensor-parallel sizes and devices, from `parallel.stages` or from the two sizes.

    Raises:
        ConfigError: devices that do not fit the sizes.
    """
    return Topology.of(config.parallel.tensor_parallel_sizes, config.parallel.devices)


def plan_of(config: RunnerConfig, spec: ModelSpec) -> ShardPlan:
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
