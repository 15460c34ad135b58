"""Micro-batches between the ranks of a pipeline: a header that says what comes, then the values.

A rank learns from the stage before what to run next, so stages need not move in step: the first
may be several micro-batches ahead. Headers go over the CPU, values wherever they are. Not here:
what a stage computes, and buffers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.distributed as dist

from parallel.collectives import broadcast
from parallel.context import ParallelContext

_NO_SLOT = -1
"""Of headers that no values belong to."""

RESULT_TAG = 1
"""Results must not be taken for carries, where two stages talk in both directions."""


class Order(IntEnum):
    """What a header asks for."""

    REST = 0
    """Nothing: it shows that the ranks before are well."""

    RUN = 1
    LEAVE = 2


@dataclass(frozen=True)
class Header:
    """What a stage is to do next.

    Attributes:
        bucket: index of the shapes of what comes.
        slot: of the buffers that every rank keeps for it.
    """

    order: Order
    bucket: int = 0
    slot: int = 0

    def to_tensor(self) -> torch.Tensor:
        return torch.tensor([self.order, self.bucket, self.slot])

    @classmethod
    def from_tensor(cls, values: torch.Tensor) -> "Header":
        order, bucket, slot = values.tolist()
        return cls(Order(order), bucket, slot)


class Relay:
    """This rank's ends of the boundaries before and after its stage."""

    def __init__(self, context: ParallelContext) -> None:
        self._context = context
        self._group = context.world.process_group
        topology, rank = context.topology, context.rank
        self._source = None if context.is_first_stage else topology.carry_source(rank)
        self._targets = topology.carry_targets(rank)
        # With their tensors, which must live until they are gone.
        self._in_flight: dict[int, list[tuple[dist.Work | None, torch.Tensor]]] = {}

    def receive_header(self) -> Header:
        """Wait for what the stage before says; on the first stage, for what its first rank says."""
        values = torch.zeros(3, dtype=torch.int64)
        if self._source is None:
            broadcast(values, self._context.tp.ranks[0], self._context.tp)
        else:
            dist.recv(values, src=self._source, group=self._group)
        return Header.from_tensor(values)

    def announce(self, header: Header) -> None:
        """On the first rank of the first stage: tell the others of the stage."""
        broadcast(header.to_tensor(), self._context.rank, self._context.tp)

    def share(self, values: Iterable[torch.Tensor]) -> None:
        """Give all ranks of the first stage what its first rank has; all of them call this."""
        for value in values:
            broadcast(value, self._context.tp.ranks[0], self._context.tp)

    def begin_receive(self, buffers: Iterable[torch.Tensor]) -> list[dist.Work | None]:
        """Begin to fill the buffers from the stage before; wait for what is returned."""
        assert self._source is not None, "the first stage shares"
        return [dist.irecv(b, src=self._source, group=self._group) for b in buffers]

    def send(self, header: Header, values: Iterable[torch.Tensor] = ()) -> None:
        """Pass a header, and what belongs to it, to the next stage, without waiting.

        The tensors must not change until `finish` of the slot.
        """
        slot = header.slot if header.order is Order.RUN else _NO_SLOT
        if slot == _NO_SLOT:
            self.finish(slot)
        sent = self._in_flight.setdefault(slot, [])
        message = [header.to_tensor(), *values]
        for target in self._targets:
            sent += [(dist.isend(x, dst=target, group=self._group), x) for x in message]

    def finish(self, slot: int) -> None:
        """Wait until what was sent from a slot may be overwritten."""
        wait_for(work for work, _ in self._in_flight.pop(slot, []))

    def drain(self) -> None:
        """Wait for all that was sent."""
        for slot in list(self._in_flight):
            self.finish(slot)

    def send_results(self, values: Iterable[torch.Tensor]) -> None:
        """From the last stage to rank 0, over the CPU; waits until they are gone."""
        for value in values:
            dist.send(value, dst=0, group=self._group, tag=RESULT_TAG)

    def receive_results(self, buffers: Sequence[torch.Tensor]) -> list[dist.Work | None]:
        """On rank 0: begin to receive what `send_results` sends; wait for what is returned."""
        source = self._context.topology.ranks(self._context.topology.last_stage)[0]
        return [dist.irecv(b, src=source, group=self._group, tag=RESULT_TAG) for b in buffers]


def wait_for(pending: Iterable[dist.Work | None]) -> None:
    """Wait for transfers; where a transfer is a GPU's, its compute stream waits."""
    for work in pending:
        if work is not None:
            work.wait()
