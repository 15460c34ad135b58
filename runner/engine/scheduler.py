"""Who runs in the next step. Deterministic, so that every rank comes to the same answer by itself.

First come, first served. A sequence is admitted when the KV blocks of its whole length are free, so
it never has to give way. Long prompts run in chunks, beside the sequences that are decoding.
"""

from collections import deque
from dataclasses import dataclass

from parallel.errors import DoesNotFitError
from runner.engine.request import Request
from runner.engine.sequence import FinishReason, Sequence


@dataclass(frozen=True)
class Scheduled:
    """A sequence's part in a step: its next `num_tokens` pending tokens."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's end, so that its next token can be chosen."""
        return self.num_tokens == self.sequence.num_pending


@dataclass(frozen=True)
class Output:
    """A token that a step produced for a request."""

    request_id: int
    token_id: int
    finish_reason: FinishReason | None


class BlockPool:
    """The free blocks of the KV cache."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(num_blocks))

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def take(self, count: int) -> list[int] | None:
        """`count` blocks; None, and nothing taken, where fewer are free."""
        if count > len(self._free):
            return None
        return [self._free.popleft() for _ in range(count)]

    def give_back(self, blocks: list[int]) -> None:
        self._free.extend(blocks)


class Scheduler:
    """The waiting and the running sequences."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        rope_switch_length: int | None = None,
    ) -> None:
        """
        Args:
            max_num_seqs: sequences that run at once.
            max_num_batched_tokens: tokens of one step.
            rope_switch_length: a sequence that grows beyond this is recomputed, with the second
                variant of its rotary frequencies.
        """
        self._pool = pool
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._rope_switch_length = rope_switch_length
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            DoesNotFitError: the KV cache could never hold it.
        """
        needed = self._pool.blocks_for(request.max_length)
        if needed > self._pool.num_blocks:
            raise DoesNotFitError(
                f"request {request.request_id} needs {needed} KV blocks of {self._pool.block_size} "
                f"tokens, the cache has {self._pool.num_blocks}; lower max_tokens, shorten the "
                "prompt, or give the cache more memory"
            )
        self._waiting.append(Sequence.of(request))

    def abort(self, request_id: int) -> None:
        """Forget a request, wherever it is; one that is gone already is not an error."""
        self._waiting = deque(s for s in self._waiting if s.request.request_id != request_id)
        for sequence in [s for s in self._running if s.request.request_id == request_id]:
            self._finish(sequence)

    def schedule(self) -> list[Scheduled]:
        """The next step: running sequences first, then as many waiting ones as fit."""
        budget = self._max_num_batched_tokens
        scheduled: list[Scheduled] = []
        for sequence in self._running:
            if budget:
                scheduled.append(self._part(sequence, budget))
                budget -= scheduled[-1].num_tokens
        while budget and self._waiting and len(self._running) < self._max_num_seqs:
            sequence = self._waiting[0]
            blocks = self._pool.take(self._pool.blocks_for(sequence.request.max_length))
            if blocks is None:
                break
            sequence.blocks = blocks
            self._running.append(self._waiting.popleft())
            scheduled.append(self._part(sequence, budget))
            budget -= scheduled[-1].num_tokens
        return scheduled

    def commit(self, scheduled: list[Scheduled], token_ids: list[int]) -> list[Output]:
        """Record what a step computed.

        Args:
            token_ids: one for each part of the step that samples, in the step's order.
        """
        outputs: list[Output] = []
        sampled = iter(token_ids)
        for part in scheduled:
            sequence, samples = part.sequence, part.samples
            sequence.num_computed += part.num_tokens
            if not samples:
                continue
            sequence.token_ids.append(next(sampled))
            reason = sequence.finish_reason()
            outputs.append(Output(sequence.request.request_id, sequence.token_ids[-1], reason))
            if reason:
                self._finish(sequence)
        return outputs

    def _part(self, sequence: Sequence, budget: int) -> Scheduled:
        switch = self._rope_switch_length
        if switch and len(sequence.token_ids) > switch and sequence.rope_variant == 0:
            sequence.rope_variant, sequence.num_computed = 1, 0
        return Scheduled(sequence, min(sequence.num_pending, budget))

    def _finish(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._pool.give_back(sequence.blocks)
