"""Carries between pipeline stages: received into preallocated buffers, sent without waiting.

On GPUs NCCL moves them on its own stream; `receive` and `send` only order it against the compute
stream, the host does not wait. What crosses a boundary is listed in the plan
(`parallel.plan.Carry`).
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from parallel.context import ParallelContext
from parallel.decoder_plan import DecoderPlan


class CarryTransfer:
    """This rank's ends of the boundaries before and after its stage."""

    def __init__(self, context: ParallelContext, plan: DecoderPlan) -> None:
        """Allocate a receive buffer of `max_num_batched_tokens` rows for every incoming carry."""
        stage = context.coordinate.stage
        self._source = context.topology.carry_source(context.rank)
        self._targets = context.topology.carry_targets(context.rank)
        self._group = context.world.process_group
        self._annotate = context.annotate
        incoming = plan.stages[stage - 1].carries if stage else ()
        self._outgoing = plan.stages[stage].carries if self._targets else ()
        self._device = context.device
        self._buffers = [
            torch.empty(
                [plan.max_num_batched_tokens if s == "num_tokens" else int(s) for s in carry.shape],
                dtype=getattr(torch, carry.dtype),
                device=context.device,
            )
            for carry in incoming
        ]
        self._in_flight: list[tuple[dist.Work, torch.Tensor]] = []

    def incoming(self, num_tokens: int) -> list[torch.Tensor]:
        """Where `receive` puts the carries of one step, each (num_tokens, ...); always the same
        memory. Empty on the first stage.
        """
        return [buffer[:num_tokens] for buffer in self._buffers]

    def receive(self, num_tokens: int) -> list[torch.Tensor]:
        """The carries of one step, each (num_tokens, ...); valid until the next `receive`."""
        views = self.incoming(num_tokens)
        with self._annotate("receive"):
            pending = [dist.irecv(view, src=self._source, group=self._group) for view in views]
            for work in pending:
                if work is not None:
                    work.wait()
        return views

    def send(self, carries: Sequence[torch.Tensor]) -> None:
        """Start sending one step's carries to the next stage; the tensors are kept alive until
        they are gone.
        """
        with self._annotate("send"):
            self.drain()
            for target in self._targets:
                for carry in carries:
                    tensor = carry.contiguous()
                    work = dist.isend(tensor, dst=target, group=self._group)
                    if work is not None:
                        self._in_flight.append((work, tensor))

    def pass_nothing(self) -> None:
        """A row that means nothing, from the stage before and to the next: the links are there."""
        self.receive(1)
        empty = [
            torch.zeros(
                [1 if s == "num_tokens" else int(s) for s in carry.shape],
                dtype=getattr(torch, carry.dtype),
                device=self._device,
            )
            for carry in self._outgoing
        ]
        self.send(empty)

    def drain(self) -> None:
        """Wait for what was sent."""
        for work, _ in self._in_flight:
            work.wait()
        self._in_flight.clear()
