"""Who runs in the next step. Deterministic, so that every rank comes to the same answer by itself.

First come, first served, but for those that wait for what this step computes. A sequence is
admitted when there are KV blocks for the tokens that it has, and takes more as it grows. Where none
is left, the one that came last gives its own up and waits to be computed again: the first can
always go on. Long prompts run in chunks, beside the sequences that are decoding.

Several steps may be under way, one in each stage of a pipeline. A sequence whose next token such a
step will choose waits for it; the others make the next step, so that the running sequences fall
into as many groups as there are stages.

With one stage, steps can be scheduled one ahead: a token that has been chosen but not read takes
its place in the next step all the same, since the device knows it. Only the host does not know yet
whether it ends the sequence; if so, that part of the step comes to nothing.
"""

from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

from parallel.errors import DoesNotFitError
from runner.engine.kv_blocks import BlockPool
from runner.engine.logprobs import TokenLogprobs
from runner.engine.request import Request
from runner.engine.sequence import NOT_FINITE, FinishReason, Sequence
from runner.engine.step_size import StepSizes


class Scheduled(NamedTuple):
    """A sequence's part in a step.

    Attributes:
        start: place in the sequence of the first of its tokens.
        samples: whether the step reaches the sequence's end, so that its next token can be chosen.
        follows: where its token, which has not been read, stands among those that the step before
            chooses; None: its tokens are known.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    follows: int | None = None

    @classmethod
    def of(cls, sequence: Sequence, num_tokens: int) -> "Scheduled":
        """The next pending tokens."""
        start = sequence.num_computed
        follows = sequence.place_in_step if start == len(sequence.token_ids) else None
        return cls(sequence, start, num_tokens, num_tokens == sequence.num_pending, follows)


class Output(NamedTuple):
    """A token that a step produced for a request, or that there is none and will be none."""

    request_id: int
    token_id: int
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None

    @property
    def failed(self) -> bool:
        """The model has given numbers that choose no token: the request has come to its end."""
        return self.token_id == NOT_FINITE


Cut = Literal["all", "group", "tokens", "sequences", "blocks", "prefix"]
"""Why a step has no more: there was no more to do, the rest is for the other stages' steps, it has
as many tokens as it may, `max_num_seqs` run, the KV cache is full, or those that wait begin with
what this step computes. "group" is also said of one that gave way and has a token under way.
"""


@dataclass(frozen=True)
class StepSummary:
    """What the last step was made of.

    Attributes:
        admitted: ids of the requests whose first step it is.
    """

    num_sequences: int
    num_tokens: int
    cut: Cut
    admitted: tuple[int, ...]


@dataclass(frozen=True)
class Load:
    """How busy a scheduler is.

    Attributes:
        cache_usage: share of the KV blocks that sequences hold.
        num_preempted: sequences that gave way, so far.
        prompt_tokens, cached_tokens: of admitted sequences, so far: all of them, and those whose
            keys and values were known already.
    """

    num_running: int
    num_waiting: int
    cache_usage: float
    num_preempted: int
    prompt_tokens: int
    cached_tokens: int


@dataclass
class _Step:
    """A step that is being put together.

    Attributes:
        size: tokens that it may take.
        budget: of these the ones that are left.
        fresh: keys of the blocks that it fills, which nobody can read before it is over.
    """

    size: int
    block_size: int
    parts: list[Scheduled] = field(default_factory=list)
    admitted: list[int] = field(default_factory=list)
    fresh: set[bytes] = field(default_factory=set)
    cut: Cut = "all"

    def __post_init__(self) -> None:
        self.budget = self.size

    def put(self, sequence: Sequence) -> None:
        """Add the next pending tokens of a sequence."""
        num_tokens = min(sequence.num_pending, self.budget)
        self.parts.append(Scheduled.of(sequence, num_tokens))
        self.budget -= num_tokens
        end = min(sequence.num_computed + num_tokens, len(sequence.token_ids))
        if end >= sequence.num_published + self.block_size:
            keys = sequence.keys(end // self.block_size, self.block_size)
            self.fresh.update(keys[sequence.num_published // self.block_size :])


class Scheduler:
    """The waiting and the running sequences."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_groups: int = 1,
        runs_ahead: bool = False,
        rope_switch_length: int | None = None,
        sizes: StepSizes | None = None,
    ) -> None:
        """
        Args:
            max_num_seqs: sequences that run at once, in all groups together.
            max_num_batched_tokens: tokens of one step.
            num_groups: groups that running sequences fall into, each in a step of its own.
            runs_ahead: schedule a step while one before it, and no more, has not been committed;
                with one group.
            rope_switch_length: a sequence that grows beyond this is recomputed, with the second
                variant of its rotary frequencies.
            sizes: that steps are padded to; None: they are not.
        """
        assert num_groups == 1 or not runs_ahead, "groups wait for their tokens"
        self._pool = pool
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._num_groups = num_groups
        self._runs_ahead = runs_ahead
        self._rope_switch_length = rope_switch_length
        self._sizes = sizes
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._num_preempted = self._prompt_tokens = self._cached_tokens = 0
        self.last_step: StepSummary | None = None

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence that the cache can hold."""
        return self._pool.num_blocks * self._pool.block_size

    def load(self) -> Load:
        return Load(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            cache_usage=self._pool.usage,
            num_preempted=self._num_preempted,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
        )

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
        for sequence in [*self._waiting, *self._running]:
            if sequence.request.request_id == request_id:
                self._finish(sequence)

    def schedule(self) -> list[Scheduled]:
        """The next step: running sequences first, then as many waiting ones as fit.

        Nothing, where all wait for the tokens of steps that are under way.
        """
        step = _Step(self._most_tokens(), self._pool.block_size)
        if self._put_running(step):
            self._put_waiting(step)
        else:
            step.cut = "blocks"
        self.last_step = self._summary(step) if step.parts else None
        num_chosen = 0
        for part in step.parts:
            sequence = part.sequence
            sequence.num_computed += part.num_tokens
            self._publish(sequence)
            if part.samples:
                sequence.place_in_step = num_chosen
                sequence.num_unread += 1
                num_chosen += 1
        return step.parts

    def _most_tokens(self) -> int:
        """Of the next step; see `StepSizes`.

        Only prompts are cut: those that find a seat, and one for which the step before had too
        little room. Those that decode must all find room, so none is cut where another than the
        last has more than a token to compute. What waits counts whole, also what the cache knows.
        """
        if self._sizes is None:
            return self._max_num_batched_tokens
        num_free = max(0, self._max_num_seqs - self._num_seated()) if self._waiting else 0
        goes_on = self.last_step is not None and self.last_step.cut == "tokens"
        if not num_free and not goes_on:
            return self._max_num_batched_tokens  # The usual case.
        running = [s for s in self._running if self._may_go_on(s)]
        pending = [s.num_pending for s in running]
        if any(n > 1 for n in pending[:-1]) or any(map(self._outgrows_rope, running)):
            return self._max_num_batched_tokens
        num_tokens = sum(pending) + sum(s.num_pending for s in islice(self._waiting, num_free))
        return self._sizes.cut(num_tokens, pending.count(1)) or self._max_num_batched_tokens

    def _num_seated(self) -> int:
        """Who only waits for the last tokens to be read needs no seat any more."""
        return sum(not sequence.will_be_over for sequence in self._running)

    def _summary(self, step: _Step) -> StepSummary:
        is_cut = not step.budget and self._has_more(step)
        cut: Cut = "tokens" if is_cut else step.cut
        return StepSummary(len(step.parts), step.size - step.budget, cut, tuple(step.admitted))

    def _has_more(self, step: _Step) -> bool:
        """Whether a step that is full leaves something to do."""
        last = step.parts[-1]
        is_whole = last.num_tokens == last.sequence.num_pending
        return bool(self._waiting) or not is_whole or step.cut == "group"

    def commit(
        self,
        scheduled: list[Scheduled],
        token_ids: list[int],
        logprobs: list[TokenLogprobs | None] | None = None,
    ) -> list[Output]:
        """Record what a step chose; steps are committed in the order of their scheduling.

        Args:
            token_ids: one for each part of the step that samples, in the step's order; NOT_FINITE
                ends that sequence alone.
            logprobs: likewise; None: nobody asked.
        """
        outputs: list[Output] = []
        sampling = [part.sequence for part in scheduled if part.samples]
        logprobs = logprobs or [None] * len(token_ids)
        for sequence, token_id, told in zip(sampling, token_ids, logprobs, strict=True):
            sequence.num_unread -= 1
            if sequence.is_over:
                continue
            if token_id == NOT_FINITE:
                outputs.append(Output(sequence.request.request_id, token_id, None))
                # Any block may be the cause, one that was another's before, too, and one that it
                # has had to give back meanwhile.
                self._pool.forget_keys(sequence.made_keys)
                self._finish(sequence)
                continue
            sequence.token_ids.append(token_id)
            reason = sequence.finish_reason()
            outputs.append(Output(sequence.request.request_id, token_id, reason, told))
            if reason:
                self._finish(sequence)
            else:
                self._publish(sequence)
        return outputs

    def _put_running(self, step: _Step) -> bool:
        """Go on with a group's share of the running sequences.

        Returns:
            Whether there is room for others: none had to give way.
        """
        num_running, num_sampling, index = len(self._running), 0, 0
        share = self._share(num_running)
        # Whoever must give way is the last of those that run, which are fewer then.
        while step.budget and num_sampling < share and index < len(self._running):
            sequence = self._running[index]
            index += 1
            if self._may_go_on(sequence) and self._grow(sequence):
                step.put(sequence)
                num_sampling += step.parts[-1].samples
        if any(self._may_go_on(sequence) for sequence in self._running[index:]):
            step.cut = "group"
        return len(self._running) == num_running

    def _may_go_on(self, sequence: Sequence) -> bool:
        """Whether a running sequence has something to compute, as far as is known."""
        if not sequence.num_unread:
            return True
        return self._runs_ahead and not sequence.will_be_over and not self._outgrows_rope(sequence)

    def _put_waiting(self, step: _Step) -> None:
        """Admit those that came first.

        One that begins as this step's others do waits for the next step, in which that is known.
        """
        if not self._waiting:
            return  # The usual case.
        num_known, num_held = len(self._running) + len(self._waiting), 0
        num_seated = self._num_seated()
        most = self._share(min(num_known, self._max_num_seqs))
        while step.budget and num_held < len(self._waiting):
            first = self._waiting[num_held]
            # Whoever is held keeps a place, or those behind would take all of them.
            if num_seated + num_held == self._max_num_seqs:
                step.cut = "prefix" if num_held else "sequences"
                return
            # One that gave way may have a token under way.
            if len(step.parts) >= most or first.num_unread:
                step.cut = "group"
                return
            self._switch_rope(first)
            if self._begins_with_fresh(first, step):
                step.cut = "prefix"
                num_held += 1
                continue
            if not self._admit(first):
                step.cut = "blocks"
                return
            del self._waiting[num_held]
            self._running.append(first)
            num_seated += 1
            step.put(first)
            if not first.was_admitted:
                step.admitted.append(first.request.request_id)
            first.was_admitted = True

    def _begins_with_fresh(self, sequence: Sequence, step: _Step) -> bool:
        """Whether the first block that it would have to compute is one that the step fills."""
        if not step.fresh:
            return False
        keys = sequence.keys(self._num_sharable(sequence), self._pool.block_size)
        num_known = self._pool.count_known(keys)
        return num_known < len(keys) and keys[num_known] in step.fresh

    def _num_sharable(self, sequence: Sequence) -> int:
        """Blocks that may be another's: something must be left to compute, or there would be no
        logits.
        """
        return (len(sequence.token_ids) - 1) // self._pool.block_size

    def _share(self, num_seqs: int) -> int:
        """How many of so many sequences make a group."""
        return -(-num_seqs // self._num_groups)

    def _admit(self, sequence: Sequence) -> bool:
        """Give a sequence blocks for all its tokens, computed ones where they are known."""
        block_size, num_tokens = self._pool.block_size, len(sequence.token_ids)
        keys = sequence.keys(self._num_sharable(sequence), block_size)
        shared = self._pool.share(keys)
        others = self._pool.take(self._pool.blocks_for(num_tokens) - len(shared))
        if others is None:
            self._pool.give_back(shared)
            return False
        sequence.blocks = shared + others
        sequence.num_computed = sequence.num_published = len(shared) * block_size
        self._prompt_tokens += num_tokens
        self._cached_tokens += sequence.num_computed
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """Give a running sequence blocks for the tokens that it has by now.

        Returns:
            False: it had to give way itself.
        """
        if self._switch_rope(sequence):
            self._release(sequence)
        missing = self._pool.blocks_for(sequence.length) - len(sequence.blocks)
        if not missing:
            return True  # The usual case.
        while (blocks := self._pool.take(missing)) is None:
            last = self._running.pop()
            self._num_preempted += 1
            self._release(last)
            self._waiting.appendleft(last)
            if last is sequence:
                return False
        if blocks:
            # A new list: whoever has copied the old one to a device must see that it has changed.
            sequence.blocks = sequence.blocks + blocks
        return True

    def _switch_rope(self, sequence: Sequence) -> bool:
        """Let a sequence that has become too long for its rotary frequencies have the others.

        Returns:
            Whether it is so.
        """
        outgrows = self._outgrows_rope(sequence)
        if outgrows:
            sequence.switch_rope()
        return outgrows

    def _outgrows_rope(self, sequence: Sequence) -> bool:
        switch = self._rope_switch_length
        return switch is not None and sequence.length > switch and not sequence.rope_variant

    def _publish(self, sequence: Sequence) -> None:
        """Make the blocks that have been filled known to others, once all their tokens are."""
        block_size = self._pool.block_size
        num_known = min(sequence.num_computed, len(sequence.token_ids))
        if num_known < sequence.num_published + block_size:
            return
        keys = sequence.keys(num_known // block_size, block_size)
        for index in range(sequence.num_published // block_size, len(keys)):
            self._pool.publish(sequence.blocks[index], keys[index])
        sequence.num_published = len(keys) * block_size

    def _release(self, sequence: Sequence) -> None:
        """Take the blocks of a sequence, whose tokens must then be computed again."""
        self._pool.give_back(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = sequence.num_published = 0

    def _finish(self, sequence: Sequence) -> None:
        """Let go of a sequence; a token of it that is under way comes to nothing."""
        sequence.is_over = True
        (self._running if sequence.blocks else self._waiting).remove(sequence)
        self._release(sequence)
