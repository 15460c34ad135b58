"""The engine: every rank runs one, in step with the others. `Engine.step` is the place to start
reading.
"""

from dataclasses import dataclass

import torch

from parallel.collectives import broadcast
from parallel.context import ParallelContext
from parallel.errors import ConfigError, RankLostError
from runner.engine.batching import lay_out
from runner.engine.control import Control
from runner.engine.sampler import NOT_FINITE, sample
from runner.engine.scheduler import Output, Scheduled, Scheduler
from runner.engine.stage_runner import StageRunner, StepOutput


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
        inputs = lay_out(scheduled, self.block_size, self.stage_runner.padding)
        output = self.stage_runner.run(inputs)
        token_ids = self._sample(scheduled, output)
        return self.scheduler.commit(scheduled, token_ids)

    def _sample(self, scheduled: list[Scheduled], output: StepOutput | None) -> list[int]:
        """The first rank of the last stage chooses; every rank learns.

        Raises:
            ConfigError: logits are not finite numbers; to the rank that chose.
            RankLostError: the same, to the others.
        """
        sequences = [part.sequence for part in scheduled if part.samples]
        if not sequences:
            return []
        source = self.context.topology.ranks(self.context.topology.last_stage)[0]
        if self.context.rank == source and output is not None:
            token_ids = sample(output.logits, output.greedy, sequences)
        else:
            token_ids = torch.empty(len(sequences), dtype=torch.int64, device=self.context.device)
        chosen: list[int] = broadcast(token_ids, source, self.context.world).tolist()
        if NOT_FINITE in chosen and self.context.rank != source:
            raise RankLostError(f"rank {source} could not choose a token", peer=True)
        if NOT_FINITE in chosen:
            dtype = str(self.stage_runner.stage.dtype).removeprefix("torch.")
            raise ConfigError(
                f"the model's logits are not finite numbers in {dtype}; "
                "use --dtype bfloat16 or float32, or copy the weights again"
            )
        return chosen
