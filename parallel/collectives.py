"""What ranks tell one another within a group; each is the identity in a group of one rank.

`all_reduce` and `all_gather` belong to a model: they are functional ops, so `torch.export` and
`torch.compile` see them as nodes of the graph. The others carry a few bytes between steps.
Point-to-point transfers between stages are `parallel.transfer`.

A group of several ranks without a process group is for tracing: one process can trace what every
rank runs. The nodes then name the group `SYMBOLIC`, which whoever runs the graph replaces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F

from parallel.annotate import Annotate, unnamed

SYMBOLIC = "symbolic"
"""Stands in a traced graph for the name of a group; to run a collective with it is an error."""


class SmallSums(Protocol):
    """A way to add up small tensors of ranks whose GPUs can reach one another's memory."""

    def takes(self, x: torch.Tensor) -> bool:
        """Whether `x` can be added up this way; the same on all ranks, whose tensors are alike."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of `x` over the group, in fresh memory."""


@dataclass(frozen=True)
class Group:
    """Ranks that communicate with one another, seen from one of them.

    Attributes:
        ranks: global ranks, in the group's order.
        rank: this rank's place in the group.
        process_group: None in a group of one rank, and where a model is traced for ranks that are
            not running.
        small_sums: how small tensors are added up; None: by the process group, as large ones are.
        annotate: names the group's collectives for a profiler.
    """

    ranks: tuple[int, ...]
    rank: int
    process_group: dist.ProcessGroup | None = None
    small_sums: SmallSums | None = None
    annotate: Annotate = unnamed

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def name(self) -> str:
        """What functional ops call the group."""
        return SYMBOLIC if self.process_group is None else self.process_group.group_name

    @classmethod
    def alone(cls, rank: int = 0) -> "Group":
        return cls((rank,), 0)


def all_reduce(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum of `x` over the group, on every rank."""
    if group.size == 1:
        return x
    with group.annotate("all_reduce"):
        if group.small_sums and group.small_sums.takes(x):
            return group.small_sums.all_reduce(x)
        return _wait(torch.ops._c10d_functional.all_reduce(x, "sum", group.name))


def all_gather(x: torch.Tensor, group: Group) -> torch.Tensor:
    """(num_rows, columns) of every rank side by side: (num_rows, columns * size), on every rank."""
    if group.size == 1:
        return x
    rows, columns = x.shape
    return stack(x, group).transpose(0, 1).reshape(rows, columns * group.size)


def all_gather_parts(
    x: torch.Tensor, extents: Sequence[int], group: Group, *, dim: int = -1
) -> torch.Tensor:
    """The parts of a tensor that the ranks hold, joined along `dim`, on every rank.

    Parts travel as long as the longest one; what fills up the others is dropped.

    Args:
        x: this rank's part.
        extents: of the part of every rank, in `dim`.
        dim: negative.
    """
    if group.size == 1:
        return x
    missing = max(extents) - extents[group.rank]
    if missing:
        x = F.pad(x, (0, 0) * (-dim - 1) + (0, missing))
    stacked = stack(x.contiguous(), group)
    parts = [stacked[rank].narrow(dim, 0, extent) for rank, extent in enumerate(extents)]
    return torch.cat(parts, dim)


def broadcast(x: torch.Tensor, source: int, group: Group) -> torch.Tensor:
    """Overwrite `x` on every rank with that of global rank `source`, and return it."""
    if group.process_group is not None:
        with group.annotate("broadcast"):
            dist.broadcast(x, src=source, group=group.process_group)
    return x


def broadcast_bytes(message: bytes | None, source: int, group: Group) -> bytes:
    """The message of global rank `source`, on every rank; sent over the CPU.

    Args:
        message: on the source; None elsewhere.
    """
    if group.process_group is None:
        return message or b""
    length = int(broadcast(torch.tensor([len(message or b"")]), source, group).item())
    if length == 0:
        return b""
    buffer = torch.empty(length, dtype=torch.uint8)
    if message:
        buffer = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    return broadcast(buffer, source, group).numpy().tobytes()


def all_gather_bytes(message: bytes, group: Group) -> list[bytes]:
    """The messages of all ranks of the group, in its order, on every rank; sent over the CPU."""
    return [
        broadcast_bytes(message if rank == group.ranks[group.rank] else None, rank, group)
        for rank in group.ranks
    ]


def minimum(value: int, group: Group) -> int:
    """The smallest `value` in the group; a host number, agreed on the CPU."""
    agreed = torch.tensor([value])
    if group.process_group is not None:
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=group.process_group)
    return int(agreed.item())


def stack(x: torch.Tensor, group: Group) -> torch.Tensor:
    """`x`, contiguous and of one shape on all ranks, of every rank: (size, *x.shape)."""
    with group.annotate("all_gather"):
        gathered = torch.ops._c10d_functional.all_gather_into_tensor(x, group.size, group.name)
        return _wait(gathered).view(group.size, *x.shape)


def _wait(x: torch.Tensor) -> torch.Tensor:
    ready: torch.Tensor = torch.ops._c10d_functional.wait_tensor(x)
    return ready
