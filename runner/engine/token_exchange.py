"""Chosen tokens on their way from the rank that chose them to the hosts of all ranks.

They set out as soon as they are chosen. A host that reads them waits for nothing else: its device
may be at work on later steps.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from parallel.collectives import broadcast
from parallel.context import ParallelContext

Read = Callable[[], list[int]]
"""Waits for a step's tokens, and what is sent behind them."""


class TokenExchange:
    """One rank's end."""

    def __init__(self, context: ParallelContext) -> None:
        """All ranks must do this together."""
        self.source = context.topology.ranks(context.topology.last_stage)[0]
        self._world = context.world
        self._device = context.device
        is_gpu = context.device.type == "cuda"
        self._stream = torch.cuda.Stream(context.device) if is_gpu else None  # type: ignore[no-untyped-call]
        if is_gpu:
            # At a group's first call NCCL holds up every host until all have come, and the rank
            # that sends is steps ahead of those that read.
            broadcast(torch.zeros(1, device=self._device), self.source, context.world)

    def broadcast(self, chosen: torch.Tensor | None, count: int) -> tuple[torch.Tensor, Read]:
        """Let every device have tokens, in the order of its work, and begin to copy them to the
        host; on all ranks.

        Args:
            chosen: (count,) int64 on `source`; None elsewhere.
        """
        if chosen is None:
            chosen = torch.empty(count, dtype=torch.int64, device=self._device)
        chosen = broadcast(chosen, self.source, self._world)
        return chosen, _to_host(chosen)

    def send(self, chosen: torch.Tensor) -> Read:
        """Begin to send tokens; on `source`.

        Args:
            chosen: (n,) int64, which the next step may overwrite.
        """
        group = self._world.process_group
        if group is None:
            return _to_host(chosen)
        chosen = chosen.clone()
        with self._world.annotate("broadcast"):
            work = dist.broadcast(
                chosen, self.source, group=self._world.process_group, async_op=True
            )
        read = _to_host(chosen)

        def read_when_sent() -> list[int]:
            work.wait()
            return read()

        return read_when_sent

    def expect(self, count: int) -> Read:
        """The next numbers that are sent, so many; on the other ranks."""

        def receive() -> list[int]:
            with self._world.annotate("broadcast"), torch.cuda.stream(self._stream):
                tokens = torch.empty(count, dtype=torch.int64, device=self._device)
                dist.broadcast(tokens, self.source, group=self._world.process_group)
                return _to_host(tokens)()

        return receive


def _to_host(tokens: torch.Tensor) -> Read:
    """Begin to copy tokens off their device."""
    if tokens.device.type == "cpu":
        return tokens.tolist
    on_host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    on_host.copy_(tokens, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def read() -> list[int]:
        copied.synchronize()
        ids: list[int] = on_host.tolist()
        return ids

    return read
