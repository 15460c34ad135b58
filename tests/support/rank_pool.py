"""A pool of ranks, by gloo or NCCL, that lives as long as the test session.

Starting a rank takes seconds (it imports torch), so tests send jobs to ranks that are there
already. A job is a function of `rank_jobs`; it runs on the first `topology.world_size` ranks. A
job that fails leaves its peers waiting for one another, so the pool starts anew after it.
"""

import faulthandler
import multiprocessing
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.topology import Topology

if TYPE_CHECKING:
    import torch

    from parallel.collectives import Group
    from parallel.context import ParallelContext

JOB_TIMEOUT_S = 100

MAX_TOPOLOGIES = 3
"""Whose groups a rank keeps: each has a thread of gloo that wakes up a hundred times a second."""


class RankPool:
    """Ranks that wait for jobs."""

    def __init__(
        self, size: int, folder: Path, *, device_type: str = "cpu", share_gpu: bool = False
    ) -> None:
        """
        Args:
            device_type: "cuda": each rank has a GPU of its own, and they talk by NCCL.
            share_gpu: all have the first GPU, and talk by gloo, since NCCL allows no such thing.
        """
        self.size = size
        self._device_type = device_type
        self._share_gpu = share_gpu
        self._folder = folder
        self._starts = 0
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def run(self, job: Callable[..., Any], tp_sizes: list[int], *args: Any) -> list[Any]:
        """`job(context, *args)` on every rank of a topology; the results in rank order."""
        topology = Topology.of(tp_sizes)
        assert topology.world_size <= self.size
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((job, topology, args))
        try:
            return self._replies()[: topology.world_size]
        except Exception:
            self.close()
            raise

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        store = str(self._folder / f"store{self._starts}")
        self._starts += 1
        for rank in range(self.size):
            ours, theirs = spawn.Pipe()
            args = rank, self.size, store, theirs, self._device_type, self._share_gpu
            process = spawn.Process(target=_serve, args=args)
            process.daemon = True
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def _replies(self) -> list[Any]:
        replies: dict[int, Any] = {}
        deadline = time.monotonic() + JOB_TIMEOUT_S
        while len(replies) < self.size:
            open_pipes = [p for rank, p in enumerate(self._pipes) if rank not in replies]
            ready = wait(open_pipes, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = [rank for rank in range(self.size) if rank not in replies]
                raise TimeoutError(f"ranks {missing} did not finish within {JOB_TIMEOUT_S} s")
            for rank, pipe in enumerate(self._pipes):
                if pipe in ready:
                    ok, replies[rank] = self._receive(rank)
                    if not ok:
                        raise RuntimeError(replies[rank])
        return [replies[rank] for rank in range(self.size)]

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            reply: tuple[bool, Any] = self._pipes[rank].recv()
        except EOFError:
            process = self._processes[rank]
            process.join()
            raise RuntimeError(f"rank {rank} ended with exit code {process.exitcode}") from None
        return reply

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _serve(
    rank: int, size: int, store: str, pipe: Connection, device_type: str, share_gpu: bool
) -> None:
    import torch
    import torch.distributed as dist

    from parallel import collectives
    from parallel.context import ParallelContext

    faulthandler.enable()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", 0 if share_gpu else rank)
        torch.cuda.set_device(device)
    backend = "gloo" if device_type == "cpu" or share_gpu else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    if share_gpu:
        collectives.stack = _stack_by_list
    contexts: OrderedDict[Topology, ParallelContext] = OrderedDict()
    while True:
        job, topology, args = pipe.recv()
        if topology not in contexts:
            if len(contexts) == MAX_TOPOLOGIES:
                _leave(contexts.popitem(last=False)[1])
            contexts[topology] = ParallelContext.over_initialized(
                topology, rank, device, all_reduce="nccl" if share_gpu else "auto"
            )
        contexts.move_to_end(topology)
        try:
            result = job(contexts[topology], *args) if rank < topology.world_size else None
            pipe.send((True, result))
        except Exception:
            pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}"))


def _leave(context: "ParallelContext") -> None:
    """Let go of a topology's groups; all ranks do so between the same two jobs."""
    import torch.distributed as dist

    for group in (context.world, context.setup, context.tp):
        if group.process_group is not None:
            dist.destroy_process_group(group.process_group)


def _stack_by_list(x: "torch.Tensor", group: "Group") -> "torch.Tensor":
    """As `collectives.stack`: gloo has no functional form of it for tensors on a GPU."""
    import torch
    import torch.distributed as dist

    parts = [torch.empty_like(x) for _ in range(group.size)]
    dist.all_gather(parts, x.contiguous(), group=group.process_group)
    return torch.stack(parts)
