"""A rank's view of the running job: where it is, its device, and the groups it talks in.

Built once by `ParallelContext.open`, passed to whoever needs it, closed at the end. Starting the
processes is `parallel.launch`.
"""

import logging
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from parallel.annotate import Annotate
from parallel.collectives import Group, minimum
from parallel.errors import PreflightError
from parallel.launch import RankEnv
from parallel.low_latency import LowLatency
from parallel.one_shot import OneShot, can_read_one_another
from parallel.topology import Coordinate, Topology

_LOG = logging.getLogger(__name__)

AllReduce = Literal["auto", "nccl", "one_shot", "low_latency"]
"""How GPUs add up small tensors; "auto": in one shot, where they can read one another's memory."""


@dataclass(frozen=True)
class ParallelContext:
    """One rank of an open job.

    Attributes:
        world: all ranks.
        setup: all ranks, with the patience that loading a model needs; for tensors on the CPU.
        tp: the ranks of this rank's stage.
    """

    topology: Topology
    rank: int
    device: torch.device
    world: Group
    setup: Group
    tp: Group

    @classmethod
    def open(
        cls,
        topology: Topology,
        env: RankEnv,
        *,
        device_type: str,
        init_timeout_s: float = 300,
        collective_timeout_s: float = 30,
        all_reduce: AllReduce = "auto",
    ) -> "ParallelContext":
        """Join the other ranks; returns when all are there.

        Args:
            device_type: "cpu" or "cuda".
            init_timeout_s: how long to wait for the other ranks to appear, and to load.
            collective_timeout_s: how long a collective may take before it is an error.

        Raises:
            ConfigError: the number of ranks is not the topology's.
            PreflightError: a GPU that the topology names is not there, or the GPUs of a stage
                cannot do what `all_reduce` names.
        """
        topology.check_world_size(env.world_size)
        device = _device(topology.devices[env.rank], device_type)
        if topology.world_size == 1:
            return cls(topology, 0, device, *[Group.alone()] * 3)
        dist.init_process_group(
            "gloo" if device_type == "cpu" else "cpu:gloo,cuda:nccl",
            store=env.store(timedelta(seconds=init_timeout_s)),
            rank=env.rank,
            world_size=env.world_size,
            timeout=timedelta(seconds=collective_timeout_s),
        )
        return cls.over_initialized(
            topology,
            env.rank,
            device,
            init_timeout_s=init_timeout_s,
            collective_timeout_s=collective_timeout_s,
            all_reduce=all_reduce,
        )

    @classmethod
    def over_initialized(
        cls,
        topology: Topology,
        rank: int,
        device: torch.device,
        *,
        init_timeout_s: float = 300,
        collective_timeout_s: float = 30,
        all_reduce: AllReduce = "auto",
    ) -> "ParallelContext":
        """Make the groups of `topology` within a process group that is already initialized.

        The topology may have fewer ranks than the process group; the ranks beyond it must call
        this, too, and get a context that no one may use.
        """
        timeout = timedelta(seconds=collective_timeout_s)
        everyone = range(topology.world_size)
        world = _group(rank, everyone, timeout)
        setup = _group(rank, everyone, timedelta(seconds=init_timeout_s))
        tp = Group.alone(rank)
        for stage in range(topology.num_stages):
            group = _group(rank, topology.ranks(stage), timeout)
            if rank in topology.ranks(stage):
                tp = group
        if device.type == "cuda" and all_reduce != "nccl" and rank in everyone:
            tp = _with_small_sums(tp, topology, setup, device, all_reduce)
        return cls(topology, rank, device, world, setup, tp)

    @property
    def coordinate(self) -> Coordinate:
        return self.topology.coordinate(self.rank)

    @property
    def is_first_stage(self) -> bool:
        return self.coordinate.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.coordinate.stage == self.topology.last_stage

    @property
    def annotate(self) -> Annotate:
        """Names what this rank does for a profiler."""
        return self.world.annotate

    def annotated(self, annotate: Annotate) -> "ParallelContext":
        """The same, with names for a profiler."""
        world, setup, tp = (
            replace(group, annotate=annotate) for group in (self.world, self.setup, self.tp)
        )
        return replace(self, world=world, setup=setup, tp=tp)

    def close(self) -> None:
        """Leave the job in order."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _device(index: int, device_type: str) -> torch.device:
    if device_type == "cpu":
        return torch.device("cpu")
    if index >= torch.cuda.device_count():
        raise PreflightError(
            f"device {index} is not there: {torch.cuda.device_count()} GPUs are visible; "
            "change parallel.stages[].devices, use fewer ranks, or pass --device cpu"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _group(rank: int, ranks: range, timeout: timedelta) -> Group:
    """Every rank of the process group must call this, for every group, in the same order."""
    # Without a timeout of its own a group would wait for torch's default, half an hour.
    process_group = dist.new_group(list(ranks), timeout=timeout) if len(ranks) > 1 else None
    if rank not in ranks:
        return Group(tuple(ranks), 0)
    return Group(tuple(ranks), ranks.index(rank), process_group)


def _with_small_sums(
    tp: Group, topology: Topology, setup: Group, device: torch.device, all_reduce: AllReduce
) -> Group:
    """The group of a stage with memory that its ranks share, if all stages' GPUs can have it.

    Every rank of the job must call this.

    Args:
        all_reduce: not "nccl".

    Raises:
        PreflightError: they cannot have what `all_reduce` names.
    """
    devices = [topology.devices[rank] for rank in tp.ranks]
    if not minimum(can_read_one_another(devices), setup):
        reason = "the GPUs of a stage cannot read one another's memory"
        if all_reduce != "auto":
            raise PreflightError(f"{reason}; set distributed.all_reduce to auto or nccl")
        _LOG.warning("%s: NCCL adds up tensors of every size", reason)
        return tp
    if tp.process_group is None:
        return tp
    if all_reduce == "low_latency":
        return replace(tp, small_sums=LowLatency.open(tp.process_group, device))
    return replace(tp, small_sums=OneShot(tp.process_group, device))
