"""What ranks tell one another within a group; each is the identity in a group of one rank.

`all_reduce` and `all_gather` belong to a model: they are functional ops, so `torch.export` and
`torch.compile` see them as nodes of the graph. The others carry a few bytes between steps.
Point-to-point transfers between stages are `parallel.transfer`.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Group:
    """Ranks that communicate with one another, seen from one of them.

    Attributes:
        ranks: global ranks, in the group's order.
        rank: this rank's place in the group.
        process_group: None in a group of one rank.
    """

    ranks: tuple[int, ...]
    rank: int
    process_group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return len(self.ranks)

    @classmethod
    def alone(cls, rank: int = 0) -> "Group":
        return cls((rank,), 0)


def all_reduce(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum of `x` over the group, on every rank."""
    if group.process_group is None:
        return x
    reduced = torch.ops._c10d_functional.all_reduce(x, "sum", group.process_group.group_name)
    return _wait(reduced)


def all_gather(x: torch.Tensor, group: Group) -> torch.Tensor:
    """(num_rows, columns) of every rank side by side: (num_rows, columns * size), on every rank."""
    if group.process_group is None:
        return x
    name = group.process_group.group_name
    stacked = _wait(torch.ops._c10d_functional.all_gather_into_tensor(x, group.size, name))
    rows, columns = x.shape
    return (
        stacked.view(group.size, rows, columns).transpose(0, 1).reshape(rows, columns * group.size)
    )


def broadcast(x: torch.Tensor, source: int, group: Group) -> torch.Tensor:
    """Overwrite `x` on every rank with that of global rank `source`, and return it."""
    if group.process_group is not None:
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


def _wait(x: torch.Tensor) -> torch.Tensor:
    ready: torch.Tensor = torch.ops._c10d_functional.wait_tensor(x)
    return ready
