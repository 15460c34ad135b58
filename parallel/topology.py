"""Which rank is where: pipeline stages in a row, each with its own tensor-parallel group.

Pure arithmetic. Ranks are numbered stage by stage: stage 0 has ranks 0 .. tp0 - 1, stage 1 the
next tp1, and so on. Process groups and devices that are opened belong to `parallel.context`.

    >>> topology = Topology.of([2, 1])
    >>> topology.coordinate(2)
    Coordinate(stage=1, tp_rank=0)
    >>> topology.carry_source(2), topology.carry_targets(0)
    (0, (2,))
"""

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.errors import ConfigError


@dataclass(frozen=True)
class Coordinate:
    """The place of a rank: its stage, and its place within the stage's tensor-parallel group."""

    stage: int
    tp_rank: int


@dataclass(frozen=True)
class Topology:
    """The tensor-parallel size of every stage, and the device index of every rank."""

    tp_sizes: tuple[int, ...]
    devices: tuple[int, ...]

    @classmethod
    def of(cls, tp_sizes: Sequence[int], devices: Sequence[int] | None = None) -> "Topology":
        """Check the sizes; without `devices`, rank r gets device r.

        Raises:
            ConfigError: no stage, a size below 1, or not exactly one distinct device a rank.
        """
        if not tp_sizes or min(tp_sizes) < 1:
            raise ConfigError(
                f"tensor-parallel sizes {list(tp_sizes)}: give one number of at least 1 for every "
                f"stage"
            )
        world_size = sum(tp_sizes)
        chosen = tuple(devices) if devices is not None else tuple(range(world_size))
        if len(chosen) != world_size or len(set(chosen)) != world_size or min(chosen) < 0:
            raise ConfigError(
                f"devices {list(chosen)}: the stages have {world_size} ranks in all, so give "
                f"{world_size} different device indices"
            )
        return cls(tuple(tp_sizes), chosen)

    @property
    def num_stages(self) -> int:
        return len(self.tp_sizes)

    @property
    def world_size(self) -> int:
        return sum(self.tp_sizes)

    @property
    def last_stage(self) -> int:
        return self.num_stages - 1

    def ranks(self, stage: int) -> range:
        """The ranks of `stage`, in the order of their tp_rank."""
        first = sum(self.tp_sizes[:stage])
        return range(first, first + self.tp_sizes[stage])

    def coordinate(self, rank: int) -> Coordinate:
        for stage in range(self.num_stages):
            ranks = self.ranks(stage)
            if rank in ranks:
                return Coordinate(stage, rank - ranks.start)
        raise ConfigError(f"rank {rank} is not in a world of {self.world_size} ranks")

    def carry_source(self, rank: int) -> int | None:
        """The rank that sends `rank` its carries; None on the first stage.

        A carry is equal on all ranks of the sending stage, so any of them can send it: receiver
        r takes it from sender r modulo the sender's tensor-parallel size, which spreads the sends.
        """
        here = self.coordinate(rank)
        if here.stage == 0:
            return None
        senders = self.ranks(here.stage - 1)
        return senders[here.tp_rank % len(senders)]

    def carry_targets(self, rank: int) -> tuple[int, ...]:
        """The ranks of the next stage that take their carries from `rank`; empty on the last
        stage.
        """
        here = self.coordinate(rank)
        if here.stage == self.last_stage:
            return ()
        return tuple(r for r in self.ranks(here.stage + 1) if self.carry_source(r) == rank)

    def describe(self, rank: int) -> str:
        """A rank's name for messages."""
        here = self.coordinate(rank)
        return f"rank {rank} (stage {here.stage}, tp rank {here.tp_rank})"

    def check_world_size(self, world_size: int) -> None:
        """Raises ConfigError: another number of processes was started than there are ranks."""
        if world_size != self.world_size:
            raise ConfigError(
                f"world size {world_size}: the plan has {self.world_size} ranks (tensor-parallel "
                f"sizes {list(self.tp_sizes)}); start {self.world_size} processes"
            )
