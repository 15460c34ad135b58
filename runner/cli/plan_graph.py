"""What `shardline plan` finds out about a tensor model."""

import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from parallel.errors import ConfigError
from runner.cli.plan_inputs import Gpus, refuse_given
from runner.drawing.words import plural

if TYPE_CHECKING:
    from parallel.graph_fit import GraphFit
    from parallel.graph_plan import GraphPlan
    from runner.config.load import LoadedConfig
    from runner.config.schema import RunnerConfig
    from runner.pipeline.measure import Measured
    from runner.sources.tensor_model import TensorModel


@dataclass(frozen=True)
class GraphResult:
    """What is printed.

    Attributes:
        fit: None where the memory is not known.
        tried: with --auto, each number of stages; the last one is chosen, or no other is closer.
        num_gpus: with --auto, how many there are.
        measured: with --measure; the plan is then the one that its split points make.
    """

    loaded: "LoadedConfig"
    plan: "GraphPlan"
    gpus: Gpus
    fit: "GraphFit | None"
    tried: "tuple[GraphFit, ...]" = ()
    num_gpus: int = 0
    measured: "Measured | None" = None

    @classmethod
    def prepare(cls, loaded: "LoadedConfig", gpus: Gpus) -> "GraphResult":
        """Divide the model as the configuration says."""
        from runner.graph_planning import GraphJob

        plan = GraphJob.prepare(loaded.config).plan
        return cls(loaded, plan, gpus, _fit_of(plan, loaded.config, gpus))

    @classmethod
    def measure(cls, loaded: "LoadedConfig", gpus: Gpus) -> "GraphResult":
        """Time the model's parts here, and divide it where these times say.

        Raises:
            ConfigError: the cut is given.
            PreflightError: the device that the model is for, or what compiles for it, is not here.
            UnsupportedSegmentError: a stage cannot be compiled.
        """
        from runner.build.progress import announce
        from runner.graph_planning import GraphJob
        from runner.pipeline.measure import Measured

        by_hand = [
            f"parallel.stages.{index}.modules"
            for index, stage in enumerate(loaded.config.parallel.stages or [])
            if stage.modules
        ]
        refuse_given(loaded, ["parallel.split_points", *by_hand], "--measure", "the cut")
        job = GraphJob.prepare(loaded.config)
        assert job.model is not None, "it is not from a bundle"
        measured = Measured.of(job, tell=partial(announce, started_s=time.monotonic()))
        config = _changed(loaded.config, split_points=list(measured.split_points) or None)
        origins = loaded.origins | {"parallel.split_points": "--measure"}
        effective = replace(loaded, config=config, origins=origins)
        plan = GraphJob.of(config, job.model).plan
        return cls(effective, plan, gpus, _fit_of(plan, config, gpus), measured=measured)

    @classmethod
    def choose(cls, loaded: "LoadedConfig", gpus: Gpus, count: int | None) -> "GraphResult":
        """Take the fewest stages that fit; the closest number where none does.

        Raises:
            ConfigError: the number is given, or too little is known of the GPUs.
        """
        keys = ["parallel.pipeline_parallel_size", "parallel.split_points"]
        keys += ["parallel.stages"] if loaded.config.parallel.stages else []
        refuse_given(loaded, keys, "--auto", "the number of stages")
        num_gpus, _ = gpus.for_auto(count)
        tried = _try_sizes(loaded.config, gpus, num_gpus)
        chosen = tried[-1] if tried[-1].fits else _closest(tried)
        num_stages = len(chosen.plan.stages)
        effective = replace(
            loaded,
            config=_changed(loaded.config, pipeline_parallel_size=num_stages),
            origins=loaded.origins | {"parallel.pipeline_parallel_size": "--auto"},
        )
        return cls(effective, chosen.plan, gpus, chosen, tuple(tried), num_gpus)

    def describe(self, rank: int | None) -> list[str]:
        """The parts of the text; with a rank, that rank in full."""
        from runner.cli.graph_fit_text import describe_graph_fit, describe_measured, describe_tried
        from runner.cli.graph_plan_text import describe_graph_plan
        from runner.cli.plan_text import describe_rank

        parts = []
        if self.tried and self.fit:
            parts.append(describe_tried(self.tried, self.fit, self.num_gpus))
        parts.append(
            describe_graph_plan(self.plan, self.measured)
            if rank is None
            else describe_rank(self.plan, rank)
        )
        if self.measured:
            parts.append(describe_measured(self.measured))
        if self.fit:
            parts.append(describe_graph_fit(self.fit, self.gpus.origin))
        return parts

    def to_dict(self) -> dict[str, Any]:
        """What --json has beside the plan."""
        return {
            "fit": self.fit.to_dict() if self.fit else None,
            "candidates": [self._candidate(fit) for fit in self.tried] or None,
            "measured": self._measured_dict(),
        }

    def draw(self) -> str:
        from runner.drawing.graph_plan_svg import draw_graph

        return draw_graph(self.plan)

    def shortage(self) -> str | None:
        """Why it does not fit; None if it does, or if the memory is not known."""
        if self.fit is None or self.fit.fits:
            return None
        if not self.tried:
            return f"the plan does not fit: {self.fit.shortage()}"
        return (
            f"no number of stages for up to {plural(self.num_gpus, 'GPU')} fits; the closest is "
            f"pipeline_parallel_size={len(self.plan.stages)}: {self.fit.shortage()}"
        )

    def _candidate(self, fit: "GraphFit") -> dict[str, Any]:
        return {
            "pipeline_parallel_size": len(fit.plan.stages),
            "num_ranks": len(fit.plan.ranks),
            "needed_bytes": fit.needed_bytes(fit.fullest),
            "fits": fit.fits,
            "chosen": fit is self.fit,
        }

    def _measured_dict(self) -> dict[str, Any] | None:
        found = self.measured
        return asdict(found) | {"bubble": found.bubble(self.plan)} if found else None


def _fit_of(plan: "GraphPlan", config: "RunnerConfig", gpus: Gpus) -> "GraphFit | None":
    from parallel.graph_fit import GraphFit
    from runner.planning import budget_of

    return GraphFit(plan, budget_of(config, gpus.memory_bytes)) if gpus.memory_bytes else None


def _changed(config: "RunnerConfig", **parallel: Any) -> "RunnerConfig":
    changed = config.parallel.model_copy(update=parallel)
    return config.model_copy(update={"parallel": changed})


def _try_sizes(config: "RunnerConfig", gpus: Gpus, num_gpus: int) -> "list[GraphFit]":
    """One stage, two and so on, until it fits or there are no more GPUs or parts."""
    from runner.graph_planning import GraphJob
    from runner.sources.tensor_model import TensorModel

    tp_size = config.parallel.tensor_parallel_size
    if tp_size > num_gpus:
        raise ConfigError(
            f"tensor_parallel_size={tp_size} exceeds the {plural(num_gpus, 'GPU')} to plan for; "
            f"use 1 to {num_gpus}"
        )
    model = TensorModel.open(config)
    tried: list[GraphFit] = []
    for num_stages in range(1, min(num_gpus // tp_size, _num_parts(config, model)) + 1):
        plan = GraphJob.of(_changed(config, pipeline_parallel_size=num_stages), model).plan
        fit = _fit_of(plan, config, gpus)
        assert fit is not None, "--auto needs to know the memory"
        tried.append(fit)
        if fit.fits:
            break
    return tried


def _num_parts(config: "RunnerConfig", model: "TensorModel") -> int:
    """The most stages that the model can be cut into."""
    from parallel.graph_twin import trace_whole
    from parallel.topology import Topology
    from runner.graph_planning import graph_buckets

    topology = Topology.of([config.parallel.tensor_parallel_size])
    bucket = graph_buckets(config, model.dtype)[-1]
    return len(trace_whole(model.module, bucket, topology, config.parallel.tp_plan).units)


def _closest(tried: "list[GraphFit]") -> "GraphFit":
    return min(tried, key=lambda fit: fit.needed_bytes(fit.fullest))
