"""The engine: every rank runs one, in step with the others. `Engine.step` is the place to start
reading.
"""

from collections import deque
from dataclasses import dataclass, field

import torch

from parallel.context import ParallelContext
from parallel.progress import Doing
from runner.engine.batching import lay_out
from runner.engine.control import Control
from runner.engine.logprobs import pack, packed_length, unpack
from runner.engine.sampler import sample
from runner.engine.scheduler import Output, Scheduled, Scheduler
from runner.engine.sequence import Sequence
from runner.engine.stage_runner import StageRunner, StepOutput
from runner.engine.token_exchange import Read, TokenExchange


@dataclass(frozen=True)
class _UnderWay:
    """A step whose tokens have not been read."""

    scheduled: list[Scheduled]
    sampling: list[Sequence]
    read: Read


@dataclass
class Engine:
    """Completes requests, step by step.

    As many steps are under way as there are stages, so that all have work; of one stage on a GPU a
    step more, so that the host's work on a step goes on beside the device's on the one before. What
    is scheduled, read and committed, and in which order, is the same on every rank.
    """

    scheduler: Scheduler
    stage_runner: StageRunner
    block_size: int
    exchange: TokenExchange
    num_started: int = 0
    """Steps, so far."""
    _under_way: deque[_UnderWay] = field(default_factory=deque)

    @property
    def context(self) -> ParallelContext:
        return self.stage_runner.context

    @property
    def has_work(self) -> bool:
        """Whether a request is open; what is under way of those that have ended is no work."""
        return self.scheduler.has_work

    def admit(self, control: Control) -> None:
        """Take in what rank 0 said before this step."""
        for request in control.added:
            self.scheduler.add(request)
        for request_id in control.aborted:
            self.scheduler.abort(request_id)

    def step(self) -> list[Output]:
        """Start a step, and read the tokens of the oldest one where it is its turn.

        A GPU works by itself: the host returns with the tokens of an earlier step and deals with
        them meanwhile. On a CPU a step is over when it has started.
        """
        # Of several stages, the group whose tokens are read is the next one to schedule.
        reads_first = self.context.device.type == "cuda" and not self._runs_ahead
        outputs: list[Output] = []
        if reads_first and self._is_full:
            outputs = self._finish()
        scheduled = self.scheduler.schedule()
        if scheduled:
            self._start(scheduled)
        reads_now = not scheduled or (self._is_full and not reads_first)
        if not outputs and self._under_way and reads_now:
            outputs = self._finish()
        return outputs

    def rest(self) -> None:
        """A step of nothing: every rank learns that all others are there. For when there is no
        work.
        """
        self.drain()
        self.stage_runner.rest()
        nothing = torch.zeros(1, dtype=torch.int64, device=self.context.device)
        is_source = self.context.rank == self.exchange.source
        read = self.exchange.send(nothing) if is_source else self.exchange.expect(1)
        self.stage_runner.progress.enter(Doing.READING)
        read()

    def drain(self) -> None:
        """Let all that is under way come to its end, whatever becomes of it."""
        while self._under_way:
            self._finish()

    @property
    def _runs_ahead(self) -> bool:
        """Whether a step is laid out before the tokens of the one before have been read."""
        return self.stage_runner.latest is not None

    @property
    def _is_full(self) -> bool:
        most = self.context.topology.num_stages + (1 if self._runs_ahead else 0)
        return len(self._under_way) == most

    def _start(self, scheduled: list[Scheduled]) -> None:
        """Run this rank's stage; the first rank of the last one chooses."""
        self.num_started += 1
        request_ids = (part.sequence.request.request_id for part in scheduled)
        with self.context.annotate("step of requests", request_ids):
            inputs = lay_out(scheduled, self.block_size, self.stage_runner.padding)
            output = self.stage_runner.run(inputs)
            sequences = [part.sequence for part in scheduled if part.samples]
            read = self._choose(output, sequences) if sequences else list
        self._under_way.append(_UnderWay(scheduled, sequences, read))

    def _choose(self, output: StepOutput | None, sequences: list[Sequence]) -> Read:
        """Let the ranks have the next token of each sequence, behind them what `pack` makes; on the
        device where steps run ahead, and on the host when it reads them.
        """
        num_packed = packed_length(sequences)
        chosen, count = None, len(sequences) + num_packed
        if self.context.rank == self.exchange.source:
            assert output is not None, "it is of the last stage"
            chosen = sample(output.logits, output.greedy, output.last_ids, sequences)
            if num_packed:
                chosen = torch.cat([chosen, pack(output.logits, chosen, sequences)])
        if (latest := self.stage_runner.latest) is not None:
            message, read = self.exchange.broadcast(chosen, count)
            # What marks a failure is no token; what follows it comes to nothing.
            torch.clamp(message[: len(sequences)], min=0, out=latest[: len(sequences)])
            return read
        return self.exchange.expect(count) if chosen is None else self.exchange.send(chosen)

    def _finish(self) -> list[Output]:
        """Read and commit the oldest step."""
        step = self._under_way.popleft()
        self.stage_runner.progress.enter(Doing.READING)
        message, num_tokens = step.read(), len(step.sampling)
        token_ids, packed = message[:num_tokens], message[num_tokens:]
        logprobs = unpack(packed, step.sampling) if packed else None
        return self.scheduler.commit(step.scheduled, token_ids, logprobs)
