"""`ShardPlan`: who holds what. The first of the four hinges that everything else hangs on.

A plan is pure data. It is made without a GPU, printed and drawn by `shardline plan`, followed by
every rank that loads weights or talks to another, and bound to a bundle by its digest. This file
has what all plans say; `parallel.decoder_plan` is that of a language model, `parallel.graph_plan`
that of any other. All sizes are bytes, all ranges are [start, stop).
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from parallel.errors import ConfigError, IntegrityError
from parallel.records import read_record
from parallel.slicing import Range
from parallel.topology import Topology

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""What weights and activations may be."""

ITEM_BYTES = DTYPE_BYTES | {"float64": 8, "int64": 8, "int32": 4, "int16": 2, "int8": 1}
ITEM_BYTES |= {"uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1}
ITEM_BYTES |= {"complex128": 16, "complex64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1}
"""What any tensor may be."""


@dataclass(frozen=True)
class Piece:
    """A block of one tensor of the checkpoint; whole where `dim` is None."""

    source: str
    dim: int | None = None
    range: Range = (0, 0)


@dataclass(frozen=True)
class LocalTensor:
    """A parameter of one rank: its pieces one after the other along `dim`, zeros where they end
    early.

    Attributes:
        name: in the stage module, with the model's global layer index.
        shape: local, as the module holds it: (out, in) for a matrix.
        dim: along which the pieces are laid; it is also the dim in which the rank's share is cut.
        transposed: the pieces are stored (in, out) and are turned when read.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    pieces: tuple[Piece, ...]
    transposed: bool = False


@dataclass(frozen=True)
class RankPlan:
    """What one rank holds.

    Attributes:
        tensors: its parameters.
        weight_bytes: of its parameters.
        activation_bytes: an upper estimate of the buffers of one step.
    """

    rank: int
    stage: int
    tp_rank: int
    device: int
    tensors: tuple[LocalTensor, ...]
    weight_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class Carry:
    """A tensor that crosses from a stage to the next; `shape` may name `num_tokens`.

    Attributes:
        dtype: as torch spells it.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def num_bytes(self) -> int:
        """Of one token, where the shape names `num_tokens`; else of all of it."""
        return math.prod(s for s in self.shape if isinstance(s, int)) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class StagePlan:
    """What one pipeline stage runs.

    Attributes:
        modules: names of its units, in order.
        carries: what it sends to the next stage; empty on the last one.
    """

    modules: tuple[str, ...]
    carries: tuple[Carry, ...]


@dataclass(frozen=True)
class ShardPlan:
    """The division of one model over the ranks of one job.

    Attributes:
        kind: of model; says which of the plans this is.
        dtype: of weights and activations, where they are floating-point numbers.
    """

    kind: Literal["decoder", "graph"]
    architecture: str
    dtype: str
    tp_sizes: tuple[int, ...]
    devices: tuple[int, ...]
    stages: tuple[StagePlan, ...]
    ranks: tuple[RankPlan, ...]

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """The plan whose `to_dict` was written as JSON; its digest is that of the original.

        Raises:
            IntegrityError: a key is missing, unknown or of another type, or the ranks, stages and
                sizes do not belong together.
        """
        plan = read_record(cls, values, "plan")
        plan._check()
        return plan

    @property
    def topology(self) -> Topology:
        return Topology(self.tp_sizes, self.devices)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, ranges as two-element lists."""
        return asdict(self)

    def _check(self) -> None:
        """Ranks are numbered stage by stage, as everything that follows a plan relies on."""
        try:
            topology = Topology.of(self.tp_sizes, self.devices)
        except ConfigError as error:
            raise IntegrityError(f"plan: {error}") from None
        if self.dtype not in DTYPE_BYTES:
            raise IntegrityError(
                f"plan.dtype is {self.dtype!r}; it must be one of {', '.join(DTYPE_BYTES)}"
            )
        if len(self.stages) != topology.num_stages or len(self.ranks) != topology.world_size:
            raise IntegrityError(
                f"plan has {len(self.stages)} stages and {len(self.ranks)} ranks; its tp_sizes "
                f"{list(self.tp_sizes)} need {topology.num_stages} and {topology.world_size}"
            )
        for number, rank in enumerate(self.ranks):
            place = topology.coordinate(number)
            needed = (number, place.stage, place.tp_rank, self.devices[number])
            found = (rank.rank, rank.stage, rank.tp_rank, rank.device)
            if found != needed:
                raise IntegrityError(
                    f"plan.ranks[{number}] has rank, stage, tp_rank, device {list(found)}; they "
                    f"must be {list(needed)}"
                )

    def digest(self) -> str:
        """sha256 of the plan's canonical JSON; equal plans have equal digests on every host."""
        # `vars` of a dataclass is what `to_dict` makes of it, without a copy.
        text = json.dumps(self, default=vars, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
