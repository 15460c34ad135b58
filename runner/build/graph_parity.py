"""The gate of a tensor model's bundle: what its ranks return together, in every bucket, against the
whole module in a wider dtype.

How far the module is from that in its own dtype, and with products in TF32 where they may be, says
how much a compiled one may be.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from parallel.collectives import broadcast_bytes
from parallel.context import ParallelContext
from parallel.graph_plan import Bucket
from parallel.graph_twin import values_of
from parallel.records import read_record
from runner.build.agreement import LEAST_ERROR, advice, cosine_of, errors_of
from runner.build.recipe import Verdict
from runner.build.tf32 import products_in_tf32
from runner.build.widening import run_widened, wider_than
from runner.config.schema import ParityConfig
from runner.graph_planning import GraphJob
from runner.pipeline.check import random_inputs
from runner.pipeline.programs import batch_size
from runner.pipeline.rank import run_worker
from runner.pipeline.stage_worker import StageWorker

if TYPE_CHECKING:
    from runner.pipeline.pipeline import Pipeline

_FLOOR = 64
"""Errors of so many roundings are never too large: other kernels add in another order."""


@dataclass(frozen=True)
class OutputParity:
    """One output in one bucket.

    Attributes:
        bucket: the inputs' shapes.
        error: largest, relative to the root mean square of the reference; of integers, the share
            that differ from those of `eager`; -1 where it is not a finite number, and so is
            `cosine`.
        eager_error: of PyTorch's kernels in the model's dtype, undivided, from the reference.
    """

    output: str
    bucket: str
    error: float
    eager_error: float
    cosine: float
    passed: bool


@dataclass(frozen=True)
class GraphParity(Verdict):
    """What was compared, and whether it is within the bounds of the configuration."""

    outputs: tuple[OutputParity, ...] = ()

    def line(self) -> str:
        """The comparison in a line."""
        if not self.passed:
            return f"parity: {'FAILED: ' if self.outputs else ''}{self.reason}"
        worst = min(self.outputs, key=lambda output: output.cosine)
        return (
            f"parity: passed; smallest cosine {worst.cosine:.6f} ({worst.output} at "
            f"{worst.bucket}), {len(self.outputs)} comparisons"
        )


def compare(job: GraphJob, worker: StageWorker, context: ParallelContext) -> GraphParity:
    """Run the compiled stages together in every bucket and judge them; every rank gets the whole
    report.
    """
    found: list[OutputParity] = []
    if context.rank != 0:
        run_worker(job, worker, context, None)
    else:
        run_worker(job, worker, context, lambda pipeline: found.extend(_judge_all(job, pipeline)))
    told = json.dumps([asdict(output) for output in found]).encode() if found else None
    message = broadcast_bytes(told, 0, context.setup)
    outputs = tuple(read_record(OutputParity, v, "OutputParity") for v in json.loads(message))
    failed = next((output for output in outputs if not output.passed), None)
    fault = ""
    if failed:
        dtype = getattr(torch, job.plan.dtype)
        fault = _complaint(failed)
        fault += advice(job.config.compile, dtype, context.device, cosine=failed.cosine)
    return GraphParity(failed is None, fault, outputs)


def _judge_all(job: GraphJob, pipeline: "Pipeline") -> list[OutputParity]:
    assert job.model is not None
    module = job.model.module
    wide = wider_than(getattr(torch, job.plan.dtype))
    found: list[OutputParity] = []
    for index, bucket in enumerate(job.plan.buckets):
        inputs = random_inputs(values_of(bucket), seed=index)
        samples = (
            [[x[row] for x in inputs] for row in range(batch_size(bucket, job.plan))]
            if job.plan.is_batched
            else [inputs]
        )
        answers = pipeline.submit(index, samples).result()
        compiled = [torch.stack(o) for o in zip(*answers, strict=True)]
        if not job.plan.is_batched:
            compiled = [output[0] for output in compiled]
        with products_in_tf32(job.config.compile.allow_tf32):
            eager = _run(module, inputs)
        exact = run_widened(module, inputs, wide)
        found += _judge(job, bucket, compiled, eager, exact)
    return found


def _run(module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Its outputs in the plan's order."""
    with torch.no_grad():
        leaves = torch.utils._pytree.tree_leaves(module(*inputs))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _judge(
    job: GraphJob,
    bucket: Bucket,
    compiled: Sequence[torch.Tensor],
    eager: Sequence[torch.Tensor],
    wide: Sequence[torch.Tensor],
) -> list[OutputParity]:
    shapes = ", ".join(f"{c.name}{list(c.shape)}" for c in bucket)
    return [
        _judge_one(name.name, shapes, outputs, job.config.compile.parity)
        for name, outputs in zip(
            job.plan.outputs, zip(compiled, eager, wide, strict=True), strict=True
        )
    ]


def _judge_one(
    name: str,
    shapes: str,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bounds: ParityConfig,
) -> OutputParity:
    compiled, eager, wide = outputs
    if not eager.numel():
        return OutputParity(name, shapes, 0.0, 0.0, 1.0, passed=True)
    if not eager.is_floating_point():
        error, eager_error = (_share(x != y) for x, y in ((compiled, eager), (eager, wide)))
        passed = error <= max(1 - bounds.min_top1, eager_error)
        return OutputParity(name, shapes, error, eager_error, 1 - error, passed)
    error, cosine = _distance(compiled, wide)
    eager_error, _ = _distance(eager, wide)
    floor = max(_FLOOR * torch.finfo(eager.dtype).eps, LEAST_ERROR)
    allowed = max(bounds.max_error_ratio * eager_error, floor)
    # Written so that NaN fails.
    passed = error <= allowed and cosine >= bounds.min_cosine
    return OutputParity(name, shapes, _known(error), _known(eager_error), _known(cosine), passed)


def _share(flags: torch.Tensor) -> float:
    return flags.double().mean().item()


def _distance(found: torch.Tensor, wide: torch.Tensor) -> tuple[float, float]:
    """The largest error and the cosine; NaN and infinity are equal to themselves alone."""
    found = found.to(wide.dtype)
    same = (found == wide) | (found.isnan() & wide.isnan())
    if same.all():
        return 0.0, 1.0  # The cosine of zeros is 0.
    is_odd = same & ~wide.isfinite()
    found, wide = found.masked_fill(is_odd, 0), wide.masked_fill(is_odd, 0)
    nothing = torch.zeros((), dtype=wide.dtype)
    return errors_of(found, wide, rounding=nothing)[0], cosine_of(found, wide, rounding=nothing)


def _known(number: float) -> float:
    """JSON has no word for what is not a number."""
    return number if math.isfinite(number) else -1.0


def _complaint(failed: OutputParity) -> str:
    return (
        f"{failed.output} at {failed.bucket} is wrong: error {failed.error:.2g}, uncompiled "
        f"{failed.eager_error:.2g}; cosine {failed.cosine:.6f}"
    )
