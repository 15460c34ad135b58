"""The engine: every rank runs one, in step with the others. `Engine.step` is the place to start
reading.
"""

from dataclasses import dataclass

import torch

from parallel.collectives import broadcast
from parallel.context import ParallelContext
from parallel.errors import ConfigError
from runner.engine.batching import make_batch
from runner.engine.control import Control
from runner.engine.sampler import sample
from runner.engine.scheduler import Output, Scheduled, Scheduler
from runner.engine.stage_runner import StageRunner


@dataclass(frozen=True)
class Engine:
    """Completes requests, one step at a time."""

    scheduler: Scheduler
    stage_runner: StageRunner
    block_size: int

    @property
    def context(self) -> ParallelContext:
        return self.stage_runner.context

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def admit(self, control: Control) -> None:
        """Take in what rank 0 said before this step."""
        for request in control.added:
            self.scheduler.add(request)
        for request_id in control.aborted:
            self.scheduler.abort(request_id)

    def step(self) -> list[Output]:
        """Schedule, run, sample, commit: at most one new token for every running sequence."""
        scheduled = self.scheduler.schedule()
        batch = make_batch(scheduled, self.block_size, self.context.device)
        logits = self.stage_runner.run(batch)
        token_ids = self._sample(scheduled, logits)
        return self.scheduler.commit(scheduled, token_ids)

    def _sample(self, scheduled: list[Scheduled], logits: torch.Tensor | None) -> list[int]:
        """The first rank of the last stage chooses; every rank learns."""
        sequences = [part.sequence for part in scheduled if part.samples]
        if not sequences:
            return []
        source = self.context.topology.ranks(self.context.topology.last_stage)[0]
        if self.context.rank == source and logits is not None:
            _check_finite(logits)
            token_ids = sample(logits, sequences)
        else:
            token_ids = torch.empty(len(sequences), dtype=torch.int64, device=self.context.device)
        chosen: list[int] = broadcast(token_ids, source, self.context.world).tolist()
        return chosen


def _check_finite(logits: torch.Tensor) -> None:
    if not logits.isfinite().all():
        raise ConfigError(
            "the model's logits are not finite numbers in "
            f"{str(logits.dtype).removeprefix('torch.')}; "
            "use --dtype bfloat16 or float32, or copy the weights again"
        )
