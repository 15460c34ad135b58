"""The tensor-parallel shards compared with the whole model, before a job runs from its model.

A `tp_plan` says how layers are split, and nothing else knows whether that is what the model needs:
a wrong one can run and compute something else. A bundle was compared when it was compiled.
"""

from collections.abc import Sequence

import torch
from torch.utils import _pytree as pytree

from parallel.errors import ParityError
from parallel.graph_stage import Value
from parallel.graph_twin import values_of
from runner.graph_planning import GraphJob
from runner.pipeline.pipeline import Pipeline
from runner.pipeline.programs import batch_size

_TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest error by dtype of the model, relative to the largest value of the output."""

_MAX_OTHER = 0.01
"""Share of the elements of an integer output, such as labels, that rounding may change."""


def must_check(job: GraphJob) -> bool:
    """Whether some stage is split and the whole model is at hand."""
    return job.model is not None and max(job.plan.tp_sizes) > 1


def check_sharded(job: GraphJob, pipeline: Pipeline) -> None:
    """Run one batch of random inputs, of the smallest bucket, both ways; on rank 0.

    Raises:
        ParityError: an output differs; the error names it, the figures and the key to change.
    """
    assert job.model is not None, "whoever calls this has looked"
    inputs = random_inputs(values_of(job.plan.buckets[0]))
    found = _divided(job, pipeline, inputs)
    with torch.no_grad():
        expected = pytree.tree_leaves(job.model.module(*inputs))
    for output, got, wanted in zip(job.plan.outputs, found, expected, strict=True):
        if complaint := _difference(got, wanted, job.plan.dtype):
            raise ParityError(
                f"with tensor-parallel sizes {list(job.plan.tp_sizes)}, output {output.name} is "
                f"not that of the whole model: {complaint}; correct parallel.tp_plan, where each "
                "colwise layer needs a rowwise one that takes its output"
            )


def random_inputs(inputs: Sequence[Value], *, seed: int = 0) -> list[torch.Tensor]:
    """Normal numbers, and integers that any table of two entries knows; on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return [_random(value, generator) for value in inputs]


def _random(value: Value, generator: torch.Generator) -> torch.Tensor:
    dtype = value.torch_dtype
    if dtype.is_floating_point:
        return torch.randn(value.shape, generator=generator).to(dtype)
    return torch.randint(0, 2, value.shape, generator=generator).to(dtype)


def _divided(
    job: GraphJob, pipeline: Pipeline, inputs: list[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """What the ranks make of the inputs together."""
    if not job.plan.is_batched:
        return tuple(pipeline.submit(0, [inputs]).result()[0])
    size = batch_size(job.plan.buckets[0], job.plan)
    samples = [[tensor[index] for tensor in inputs] for index in range(size)]
    outputs = zip(*pipeline.submit(0, samples).result(), strict=True)
    return tuple(torch.stack(rows) for rows in outputs)


def _difference(found: torch.Tensor, expected: torch.Tensor, dtype: str) -> str | None:
    """What is wrong; None: nothing."""
    if found.shape != expected.shape:
        return f"its shape is {list(found.shape)}, not {list(expected.shape)}"
    if not expected.numel():
        return None
    if not expected.is_floating_point():
        share = (found != expected).float().mean().item()
        return None if share <= _MAX_OTHER else f"{share:.1%} of its elements differ"
    a, b = found.double(), expected.double()
    # NaN and infinity are equal to themselves here, and to nothing else.
    same = (a == b) | (a.isnan() & b.isnan())
    error = (a - b).abs().masked_fill(same, 0).nan_to_num(nan=torch.inf).max().item()
    largest = b.abs().nan_to_num(nan=0, posinf=0).max().item()
    allowed = _TOLERANCES[dtype] * largest
    if error <= allowed:
        return None
    return (
        f"it differs by up to {error:.3g}, where the largest value is {largest:.3g} and "
        f"{allowed:.3g} is allowed"
    )
