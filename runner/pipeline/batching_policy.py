"""The settings of dynamic batching, checked. Not here: what follows from them; see `batcher`."""

import math
from dataclasses import dataclass

from parallel.errors import ConfigError
from runner.config.schema import SchedulerConfig


@dataclass(frozen=True)
class BatchingPolicy:
    """When requests become a batch; the terms are those of Triton's dynamic batcher.

    Attributes:
        max_batch_size: requests of one batch.
        max_queue_delay_ms: how long a request may wait for others to join it; 0: it goes with those
            that are there.
        max_queue_size: requests that wait at once, in all buckets together; one more is refused.
        preferred_batch_sizes: run without delay as soon as they can be formed; empty: none but
            `max_batch_size`.
        deadline_margin_ms: a request is cut this long before its deadline, about what a batch
            takes.

    Raises:
        ConfigError: a value out of its range.
    """

    max_batch_size: int
    max_queue_delay_ms: float
    max_queue_size: int
    preferred_batch_sizes: tuple[int, ...] = ()
    deadline_margin_ms: float = 5.0

    @classmethod
    def of(
        cls, scheduler: SchedulerConfig, *, is_batched: bool, min_queue_size: int = 1
    ) -> "BatchingPolicy":
        """What the configuration says.

        Args:
            is_batched: see `GraphPlan`; other models run one sample at a time.
        """
        return cls(
            max_batch_size=scheduler.max_batch_size if is_batched else 1,
            max_queue_delay_ms=scheduler.max_queue_delay_ms,
            max_queue_size=max(scheduler.max_queue_size, min_queue_size),
            preferred_batch_sizes=tuple(scheduler.preferred_batch_size or ()),
        )

    def __post_init__(self) -> None:
        if self.max_batch_size < 1:
            raise ConfigError(f"max_batch_size={self.max_batch_size}; use 1 or more")
        if self.max_queue_size < self.max_batch_size:
            raise ConfigError(
                f"max_queue_size={self.max_queue_size} is less than max_batch_size="
                f"{self.max_batch_size}, so no batch would ever be full; use "
                f"{self.max_batch_size} or more"
            )
        for size in self.preferred_batch_sizes:
            if not 1 <= size <= self.max_batch_size:
                raise ConfigError(
                    f"preferred_batch_sizes has {size}; use sizes from 1 to max_batch_size="
                    f"{self.max_batch_size}"
                )
        for name in ("max_queue_delay_ms", "deadline_margin_ms"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"{name}={value}; use 0 or more milliseconds")

    def largest_preferred(self, num_waiting: int) -> int | None:
        """The largest preferred size that so many requests can form."""
        return max((s for s in self.preferred_batch_sizes if s <= num_waiting), default=None)
