"""What a workload must at least read and compute, and how long a device that reaches its limits
would take: the floor that a measured time is held against.

Pure arithmetic on a plan. Counted are weights, keys and values, matrix products and attention;
activations, norms and communication are not. Sizes are bytes, rates are per second.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from parallel.decoder_plan import DecoderPlan, DecoderRankPlan, DecoderStagePlan
from parallel.plan import DTYPE_BYTES
from runner.bench.workload import Workload
from runner.models.config import DecoderConfig

_EMBEDDINGS = ("embed_tokens", "embed_positions")


@dataclass(frozen=True)
class Work:
    """What a rank reads from its memory, and its floating-point operations (an addition and a
    multiplication are two).
    """

    num_bytes: float
    flops: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.num_bytes + other.num_bytes, self.flops + other.flops)


@dataclass(frozen=True)
class DeviceLimits:
    """What one device was measured to do.

    Attributes:
        read_bytes_per_s: summing up a large buffer; bytes read.
        copy_bytes_per_s: copying it; bytes read and bytes written.
        flops_per_s: of a large square matrix product in the run's dtype.
        buffer_bytes: size of the buffer.
        matmul_size: rows and columns of the matrices.
    """

    read_bytes_per_s: float
    copy_bytes_per_s: float
    flops_per_s: float
    buffer_bytes: int
    matmul_size: int

    @property
    def bytes_per_s(self) -> float:
        """The faster of the two, for a floor is what cannot be beaten."""
        return max(self.read_bytes_per_s, self.copy_bytes_per_s)

    @property
    def bandwidth_from(self) -> str:
        """Which of the two that is."""
        return "read" if self.read_bytes_per_s >= self.copy_bytes_per_s else "copy"

    def seconds(self, work: Work) -> float:
        """The least time for a rank's work: reading and computing overlap."""
        return max(work.num_bytes / self.bytes_per_s, work.flops / self.flops_per_s)


@dataclass(frozen=True)
class Floor:
    """The least time of a step, and the work on the path that sets it."""

    work: Work
    seconds: float


@dataclass(frozen=True)
class RankWeights:
    """How many weights of a rank a step uses, and how.

    Attributes:
        read: read whole in every step.
        per_token: in matrices that every token is multiplied with.
        per_sample: in the head, which only tokens that end a sequence reach.
        row: what one token reads of the embedding tables.
    """

    read: int
    per_token: int
    per_sample: int
    row: int


def weights_of(rank: DecoderRankPlan, stage: DecoderStagePlan) -> RankWeights:
    """Sort a rank's parameters by their use; an embedding that is the head, too, is read whole."""
    counts = {tensor.name: math.prod(tensor.shape) for tensor in rank.tensors}
    head = "lm_head.weight" if "lm_head.weight" in counts else "embed_tokens.weight"
    per_sample = counts[head] if stage.has_head else 0
    inner = [t for t in rank.tensors if t.name.split(".")[0] not in (*_EMBEDDINGS, "lm_head")]
    return RankWeights(
        read=per_sample + sum(counts[tensor.name] for tensor in inner),
        per_token=sum(counts[tensor.name] for tensor in inner if len(tensor.shape) == 2),
        per_sample=per_sample,
        row=sum(t.shape[1] for t in rank.tensors if t.name.split(".")[0] in _EMBEDDINGS),
    )


@dataclass(frozen=True)
class WorkCount:
    """The work of a workload on each rank of a plan."""

    plan: DecoderPlan
    config: DecoderConfig
    workload: Workload

    def prefill(self) -> list[Work]:
        """All prompts, once through the weights, up to the first token of each."""
        return [self._prefill(rank) for rank in self.plan.ranks]

    def decode_step(self) -> list[Work]:
        """A step that brings one token to every request, at the mean length while decoding."""
        share = 1 / (self.workload.output_len - 1)
        ranks = self.plan.ranks
        return [self._decode(rank, num_weight_reads=1, share=share) for rank in ranks]

    def round(self, num_steps: int) -> list[Work]:
        """The workload as a whole, in so many steps, each of which reads the weights once."""
        return [
            Work(0.0, self._prefill(rank).flops)
            + self._decode(rank, num_weight_reads=num_steps, share=1.0)
            for rank in self.plan.ranks
        ]

    def _prefill(self, rank: DecoderRankPlan) -> Work:
        load, weights = self.workload, weights_of(rank, self._stage(rank))
        tokens = load.num_requests * load.input_len
        attended = load.num_requests * self._attended(rank, 1, load.input_len)
        products = tokens * weights.per_token + load.num_requests * weights.per_sample
        return Work(
            self._item_bytes * (weights.read + tokens * weights.row),
            2 * products + attended * self._flops_per_key(rank),
        )

    def _decode(self, rank: DecoderRankPlan, *, num_weight_reads: int, share: float) -> Work:
        """All decoding of a round.

        Args:
            num_weight_reads: counted as given; all else only by its share.
            share: of the tokens that are decoded.
        """
        load, weights = self.workload, weights_of(rank, self._stage(rank))
        count = load.num_requests * (load.output_len - 1) * share
        lengths = self._attended(rank, load.input_len + 1, load.length - 1)
        attended = load.num_requests * lengths * share
        return Work(
            self._item_bytes * (num_weight_reads * weights.read + count * weights.row)
            + attended * self._kv_bytes(rank),
            2 * count * (weights.per_token + weights.per_sample)
            + attended * self._flops_per_key(rank),
        )

    def _attended(self, rank: DecoderRankPlan, first: int, last: int) -> int:
        """Keys seen by the tokens at positions `first` to `last` of a sequence (1 is the first
        token), in all layers of the rank.
        """
        start, stop = self._stage(rank).layers
        return sum(attended(first, last, window) for window in self.config.windows[start:stop])

    def _flops_per_key(self, rank: DecoderRankPlan) -> int:
        """A query times a key, and a probability times a value, for every query head."""
        return 4 * self.config.head_dim * rank.heads.num_query

    def _kv_bytes(self, rank: DecoderRankPlan) -> float:
        """Key and value of one token in one layer."""
        start, stop = self._stage(rank).layers
        return rank.kv_bytes_per_token / max(1, stop - start)

    def _stage(self, rank: DecoderRankPlan) -> DecoderStagePlan:
        return self.plan.stages[rank.stage]

    @property
    def _item_bytes(self) -> int:
        return DTYPE_BYTES[self.plan.dtype]


def attended(first: int, last: int, window: int | None) -> int:
    """How many keys the tokens `first` to `last` of a sequence see together: the n-th sees n, and
    no more than the window.

    >>> attended(1, 4, None), attended(1, 4, 2), attended(3, 4, 2), attended(2, 1, None)
    (10, 7, 4, 0)
    """
    if last < first:
        return 0
    if window is None or last <= window:
        return (first + last) * (last - first + 1) // 2
    if first > window:
        return window * (last - first + 1)
    return attended(first, window, None) + window * (last - window)


def floor_of(plan: DecoderPlan, works: Sequence[Work], limits: DeviceLimits) -> Floor:
    """The ranks of a stage work at once, the stages one after the other: the slowest rank of each
    stage counts.
    """
    path = [
        max((works[rank] for rank in plan.topology.ranks(stage)), key=limits.seconds)
        for stage in range(len(plan.stages))
    ]
    return Floor(sum(path, Work(0.0, 0.0)), sum(map(limits.seconds, path)))
