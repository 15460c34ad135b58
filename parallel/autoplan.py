"""Which tensor- and pipeline-parallel size to use on a number of equal GPUs.

Pure: it is given the plans to choose from. The estimate is of one decoding step with one sequence,
in which reading the weights takes nearly all the time; attention is not in it, nor is the host.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from parallel.decoder_plan import DecoderPlan, DecoderRankPlan, DecoderStagePlan
from parallel.fit import Budget, Fit, fit_of
from parallel.layout import ModelLayout
from parallel.plan import DTYPE_BYTES

_TIE = 1.01
"""Estimates this close to the lowest are as good as the lowest."""


@dataclass(frozen=True)
class GpuSpeed:
    """What the GPUs and their links are taken to do.

    Attributes:
        bandwidth: bytes of weights read in a second.
        all_reduce_s: one all-reduce of a decoding step, in a CUDA graph.
        transfer_s: one carry from a stage to the next.
    """

    bandwidth: float
    all_reduce_s: float
    transfer_s: float


H200 = GpuSpeed(bandwidth=4.3e12, all_reduce_s=10e-6, transfer_s=10e-6)
"""Measured on H200s with NVLink before this release; the transfer is taken to be like an
all-reduce.
"""


@dataclass(frozen=True)
class Candidate:
    """A plan with equal stages, whether it fits, and its estimated time for a decoding step."""

    fit: Fit
    step_s: float

    @property
    def plan(self) -> DecoderPlan:
        return self.fit.plan

    @property
    def tp_size(self) -> int:
        return self.plan.tp_sizes[0]

    @property
    def pp_size(self) -> int:
        return len(self.plan.stages)

    @property
    def num_ranks(self) -> int:
        return len(self.plan.ranks)

    @property
    def weight_bytes(self) -> int:
        """Of the rank that holds the most weights."""
        return max(rank.weight_bytes for rank in self.plan.ranks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the plan itself is left out."""
        return {
            "tensor_parallel_size": self.tp_size,
            "pipeline_parallel_size": self.pp_size,
            "num_ranks": self.num_ranks,
            "weight_bytes": self.weight_bytes,
            "kv_tokens": self.fit.kv_tokens,
            "fits": self.fit.fits,
            "step_s": self.step_s,
        }


def sizes(layout: ModelLayout, num_gpus: int) -> list[tuple[int, int]]:
    """Every (tensor-parallel, pipeline-parallel) size that the model allows on up to `num_gpus`.

    Each rank has a query head and columns of the MLP, each stage a layer.
    """
    most_ranks = min(layout.num_heads, layout.intermediate_size)
    return [
        (tp_size, pp_size)
        for tp_size in range(1, min(num_gpus, most_ranks) + 1)
        for pp_size in range(1, min(num_gpus // tp_size, layout.num_layers) + 1)
    ]


def assess(plan: DecoderPlan, budget: Budget, speed: GpuSpeed = H200) -> Candidate:
    """Judge and time a plan."""
    return Candidate(fit_of(plan, budget), step_s(plan, speed))


def step_s(plan: DecoderPlan, speed: GpuSpeed) -> float:
    """Estimated seconds of a decoding step with one sequence.

    The stages run one after the other; in each, the rank that reads the most finishes last. With
    tp > 1 a layer has two all-reduces, and the embedding and the head have one each.
    """
    total = (len(plan.stages) - 1) * speed.transfer_s
    for index, stage in enumerate(plan.stages):
        item_bytes = DTYPE_BYTES[plan.dtype]
        read = [_read_elements(r, stage) * item_bytes for r in plan.ranks if r.stage == index]
        total += max(read) / speed.bandwidth
        if len(read) > 1:
            num_layers = stage.layers[1] - stage.layers[0]
            total += (2 * num_layers + stage.has_embedding + stage.has_head) * speed.all_reduce_s
    return total


def _read_elements(rank: DecoderRankPlan, stage: DecoderStagePlan) -> int:
    """Elements of weights that one token reads: all but embeddings, which are looked up. A head
    that shares the embedding reads it.
    """
    elements = {tensor.name: math.prod(tensor.shape) for tensor in rank.tensors}
    shared = elements.get("embed_tokens.weight", 0) if stage.has_head else 0
    read = sum(size for name, size in elements.items() if not name.startswith("embed_"))
    return read + (0 if "lm_head.weight" in elements else shared)


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Fastest first; of equal estimates the one with fewer ranks first."""
    return sorted(candidates, key=lambda c: (c.step_s, c.num_ranks))


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """Of those that fit and whose estimate is within 1 % of the lowest, the one with the fewest
    ranks. None: none fits.
    """
    fitting = [candidate for candidate in candidates if candidate.fit.fits]
    if not fitting:
        return None
    limit = min(candidate.step_s for candidate in fitting) * _TIE
    near = [candidate for candidate in fitting if candidate.step_s <= limit]
    return min(near, key=lambda c: (c.num_ranks, c.step_s))


def closest(candidates: Sequence[Candidate]) -> Candidate:
    """The one whose fullest rank needs the least memory."""
    return min(candidates, key=lambda c: (c.fit.fullest.needed_bytes, c.step_s))
