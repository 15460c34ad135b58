"""From a configuration, or a bundle, to the job of a tensor model: the model, and its plan.

Everything else of this project that divides a model imports no torch before there are ranks; a
tensor model is known only when it is traced.
"""

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.errors import ConfigError
from parallel.graph_plan import Bucket, GraphPlan
from parallel.plan import DTYPE_BYTES, Carry
from parallel.topology import Topology
from runner.bundle.bundle import Bundle
from runner.compiler.buckets import buckets_of
from runner.config.model_schema import BATCH
from runner.config.schema import RunnerConfig
from runner.job import Job, device_type_of

if TYPE_CHECKING:
    from parallel.graph_twin import Traced
    from runner.sources.tensor_model import TensorModel


@dataclass(frozen=True, kw_only=True)
class GraphJob(Job):
    """A tensor model, divided.

    Attributes:
        model: None where it runs from a bundle.
        traced: graphs of the undivided model that there are already.
    """

    plan: GraphPlan
    model: "TensorModel | None" = None
    traced: "Traced" = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def prepare(cls, config: RunnerConfig) -> "GraphJob":
        """Open the model, trace it and divide it.

        Raises:
            ConfigError: the model, a size or a cut is not possible.
            IntegrityError: a file of the model is corrupt or does not match.
        """
        from runner.sources.tensor_model import TensorModel

        return cls.of(config, TensorModel.open(config))

    @classmethod
    def of(cls, config: RunnerConfig, model: "TensorModel") -> "GraphJob":
        """Trace a model that is open and divide it.

        Raises:
            ConfigError: a size or a cut is not possible.
        """
        from parallel.graph_planner import CutRequest, make_graph_plan

        parallel = config.parallel
        is_split = parallel.tp_plan or max(parallel.tensor_parallel_sizes) > 1
        if is_split and config.model.resolved_format in ("onnx", "pt2"):
            raise ConfigError(
                "parallel.tensor_parallel_size, parallel.tp_plan: ONNX graphs and exported "
                "programs are not split; cut the model into pipeline stages instead: "
                "parallel.pipeline_parallel_size"
            )
        traced: Traced = {}
        plan = make_graph_plan(
            model.module,
            graph_buckets(config, model.dtype),
            Topology.of(parallel.tensor_parallel_sizes, parallel.devices),
            architecture=model.architecture,
            dtype=model.dtype,
            is_batched=_is_batched(config),
            cut=CutRequest(
                split_points=parallel.split_points,
                stages=[s.modules for s in parallel.stages or [] if s.modules] or None,
                tp_plan=parallel.tp_plan,
            ),
            traced=traced,
            device=device_type_of(config),
        )
        return cls(config=config, plan=plan, model=model, traced=traced)

    @classmethod
    def from_bundle(cls, bundle: Bundle, config: RunnerConfig) -> "GraphJob":
        """Run what `shardline compile` made."""
        assert isinstance(bundle.plan, GraphPlan), "whoever calls this has looked"
        return cls(config=config, plan=bundle.plan, bundle=bundle)

    @property
    def source_files(self) -> tuple[Path, ...]:
        """What the model was read from; none where it runs from a bundle."""
        return self.model.files if self.model else ()


def graph_buckets(config: RunnerConfig, dtype: str) -> tuple[Bucket, ...]:
    """Every combination of a batch size and of the sizes of the named dims, in ascending order.

    Args:
        dtype: of the model, which its floating-point inputs get.

    Raises:
        ConfigError: batch sizes that do not end with the largest batch.
    """
    names = list(config.model.dims)
    batch_sizes = (
        buckets_of(
            config.compile.buckets,
            config.scheduler.max_batch_size,
            limit="scheduler.max_batch_size",
        )
        if _is_batched(config)
        else (1,)
    )
    found = []
    for sizes in product(*config.model.dims.values()):
        found += [
            _bucket(config, dict(zip(names, sizes, strict=True)) | {BATCH: batch}, dtype)
            for batch in batch_sizes
        ]
    return tuple(found)


def _is_batched(config: RunnerConfig) -> bool:
    """Whether the inputs have a batch dim: all or none.

    Raises:
        ConfigError: some have.
    """
    inputs = config.model.inputs or []
    batched = [bool(i.shape) and i.shape[0] == BATCH for i in inputs]
    if any(batched) and not all(batched):
        one = inputs[batched.index(False)].name
        raise ConfigError(
            f"model.inputs: {one} does not begin with {BATCH} and others do; give all or none"
        )
    return any(batched)


def _bucket(config: RunnerConfig, sizes: dict[str, int], dtype: str) -> Bucket:
    return tuple(
        Carry(
            given.name,
            dtype if given.dtype in DTYPE_BYTES else given.dtype,
            tuple(sizes[dim] if isinstance(dim, str) else dim for dim in given.shape),
        )
        for given in config.model.inputs or []
    )
