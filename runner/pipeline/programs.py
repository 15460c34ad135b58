"""The programs of a rank, one a bucket: traced from the model, or read from a bundle."""

from collections.abc import Iterator

import torch

from parallel.graph_plan import Bucket, GraphPlan
from parallel.graph_twin import Tracer
from runner.compiler.backends import candidates_of
from runner.graph_planning import GraphJob
from runner.pipeline.stage_program import StageProgram
from runner.pipeline.stored_programs import read_programs


def programs_of(job: GraphJob, rank: int, *, device: str) -> list[StageProgram]:
    """What a rank runs in every bucket of the plan.

    Args:
        device: type of the device that it will run on.

    Raises:
        ConfigError: the model does not run the planned modules at some shapes.
        IntegrityError: a file of the bundle is not what it says.
    """
    if job.model is None:
        assert job.bundle is not None
        return read_programs(job.bundle.model_folder, rank, device=device)
    return _programs(job.plan, _tracer(job, device=device), rank)


def programs_to_compile(job: GraphJob, *, device: str) -> list[list[StageProgram]]:
    """Those of every rank, traced from the model."""
    tracer = _tracer(job, device=device, channels_last=wants_channels_last(job))
    return [_programs(job.plan, tracer, rank.rank) for rank in job.plan.ranks]


def wants_channels_last(job: GraphJob) -> bool:
    """Whether what is compiled may take and make feature maps sooner with their channels last, and
    all ranks see the same of them: a stage that splits a layer has a sum where another has none.
    """
    is_even = len(set(job.plan.topology.tp_sizes)) == 1
    may_be_engines = "tensorrt" in candidates_of(job.config.compile.backend)
    return is_even and may_be_engines and job.device_type == "cuda"


def _tracer(job: GraphJob, *, device: str, channels_last: bool = False) -> Tracer:
    """What traces the model of a job that has one."""
    assert job.model is not None
    return Tracer(
        job.model.module,
        job.plan,
        job.config.parallel.tp_plan,
        # Traced for where the job runs.
        traced=job.traced if device == job.device_type else None,
        device=device,
        channels_last=channels_last,
    )


def _programs(plan: GraphPlan, tracer: Tracer, rank: int) -> list[StageProgram]:
    stage = plan.topology.coordinate(rank).stage
    return [
        StageProgram.of(
            *tracer.stage(bucket, rank), prefix=f"stage{stage}{suffix_of(bucket, plan)}"
        )
        for bucket in plan.buckets
    ]


def batch_size(bucket: Bucket, plan: GraphPlan) -> int:
    """How many samples it takes."""
    return int(bucket[0].shape[0]) if plan.is_batched else 1


def sample_shapes(bucket: Bucket, plan: GraphPlan) -> tuple[tuple[int, ...], ...]:
    """Of every input of one sample."""
    first = 1 if plan.is_batched else 0
    return tuple(tuple(map(int, value.shape[first:])) for value in bucket)


def suffix_of(bucket: Bucket, plan: GraphPlan) -> str:
    """What tells a bucket's segments from those of other shapes; nothing where there is one."""
    if len({sample_shapes(b, plan) for b in plan.buckets}) == 1:
        return ""
    return "@" + ",".join("x".join(map(str, s)) for s in sample_shapes(bucket, plan))


def weights_of(
    job: GraphJob, rank: int, programs: list[StageProgram], *, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a rank by name, contiguous and on `device`.

    Raises:
        IntegrityError: the bundle's file was changed.
    """
    if job.bundle is not None:
        yield from job.bundle.weights(rank, device=device)
        return
    seen = set()
    for program in programs:
        for name, tensor in program.tensors():
            if name not in seen:
                seen.add(name)
                yield name, tensor.detach().contiguous().to(device)
