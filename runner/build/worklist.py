"""What a job needs compiled: each distinct segment once, and who uses it for what.

Compiling needs no weights and no other rank, so any rank can build what another one will run.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from parallel.collectives import Group
from runner.compiler.segment import Segment, TensorSpec
from runner.engine.loading import make_stage
from runner.models.attention import GatherAttention
from runner.models.decoder import DecoderStage
from runner.models.part import Part
from runner.planning import DecoderJob

_Shapes = tuple[str, tuple[TensorSpec, ...], tuple[tuple[str, TensorSpec], ...]]


@dataclass(frozen=True)
class Use:
    """A kind of part of a rank at a number of rows."""

    rank: int
    kind: str
    num_rows: int


@dataclass(frozen=True)
class Work:
    """A segment to compile."""

    segment: Segment
    num_rows: int
    uses: list[Use] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.segment.kind} x {self.num_rows}"


def worklist(
    stages: Iterable[DecoderStage], buckets: tuple[int, ...], max_num_seqs: int
) -> list[Work]:
    """The segments of all ranks, the smallest number of rows first.

    Two parts of one kind compute the same if their shapes are equal, since all else about them
    comes from the one model they belong to.

    Args:
        stages: of all ranks in order, on the meta device.
        max_num_seqs: no step has more samples.
    """
    found: dict[_Shapes, Work] = {}
    for rank, stage in enumerate(stages):
        for kind, part in stage.parts_by_kind().items():
            for num_rows in rows_of(part, buckets, max_num_seqs):
                segment = part.segment(num_rows)
                shapes = (kind, segment.activations, tuple(segment.weights.items()))
                work = found.setdefault(shapes, Work(segment, num_rows))
                work.uses.append(Use(rank, kind, num_rows))
    return sorted(found.values(), key=lambda work: work.num_rows)


def rows_of(part: Part, buckets: tuple[int, ...], max_num_seqs: int) -> tuple[int, ...]:
    """The numbers of rows that a part is called with."""
    if not part.per_sample:
        return buckets
    needed = [b for b in buckets if b < max_num_seqs]
    return buckets[: len(needed) + 1]


def stages_of(job: DecoderJob) -> Iterator[DecoderStage]:
    """The stages of all ranks, on the meta device."""
    topology = job.plan.topology
    for rank in range(topology.world_size):
        here = topology.coordinate(rank)
        group = Group(tuple(topology.ranks(here.stage)), here.tp_rank)
        heads = job.plan.ranks[rank].heads
        attend = GatherAttention(heads, torch.device("cpu"))
        yield make_stage(job, rank, group, attend)
