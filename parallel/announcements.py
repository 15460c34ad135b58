"""What one rank tells all others, in order, without waiting for those that are behind."""

from collections import deque

import torch
import torch.distributed as dist

from parallel.collectives import Group

_TAG = 1
"""Carries between stages have 0."""


class Announcements:
    """Messages of one rank of a group to the others, over the CPU.

    A collective would hold the source up until the last stage of a pipeline has come to it.
    """

    def __init__(self, source: int, group: Group, *, most_unread: int) -> None:
        """
        Args:
            source: global rank.
            most_unread: messages that a rank may be behind before the source waits for it.
        """
        self._source = source
        self._group = group
        self._rank = group.ranks[group.rank]
        self._most_unread = most_unread
        self._unread: deque[list[tuple[dist.Work, torch.Tensor]]] = deque()

    def exchange(self, message: bytes | None) -> bytes:
        """The next message, on every rank.

        Args:
            message: on the source; None elsewhere.
        """
        if self._rank != self._source:
            return self._receive()
        told = message or b""
        if self._group.size > 1:
            self._send(told)
            self._wait(self._most_unread)
        return told

    def drain(self) -> None:
        """Wait until all messages are read."""
        self._wait(0)

    def _send(self, message: bytes) -> None:
        tensors = [torch.tensor([len(message)])]
        if message:
            tensors.append(torch.frombuffer(bytearray(message), dtype=torch.uint8))
        others = [rank for rank in self._group.ranks if rank != self._source]
        sent = []
        for rank in others:
            for tensor in tensors:
                work = dist.isend(tensor, rank, group=self._group.process_group, tag=_TAG)
                assert work is not None, "the source is in the group"
                sent.append((work, tensor))
        self._unread.append(sent)

    def _receive(self) -> bytes:
        length = int(self._receive_tensor(torch.empty(1, dtype=torch.int64)).item())
        if not length:
            return b""
        return self._receive_tensor(torch.empty(length, dtype=torch.uint8)).numpy().tobytes()

    def _receive_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.recv(tensor, self._source, group=self._group.process_group, tag=_TAG)
        return tensor

    def _wait(self, most_unread: int) -> None:
        while len(self._unread) > most_unread:
            for work, _ in self._unread.popleft():
                work.wait()
