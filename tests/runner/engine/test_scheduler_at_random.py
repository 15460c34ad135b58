"""The scheduler at random: what must never happen, whatever comes."""

import copy
from collections import deque
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import STOP, commit, request, scheduler_of, token

from parallel.errors import DoesNotFitError
from runner.compiler.buckets import buckets_of
from runner.engine.kv_blocks import BlockPool
from runner.engine.request import Request
from runner.engine.scheduler import Scheduled
from runner.engine.sequence import Sequence
from runner.engine.step_size import StepSizes

EVENTS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.integers(1, 20), st.integers(1, 12), st.sampled_from([None, 3, 4])
        ),
        st.tuples(st.just("abort"), st.integers(0, 8), st.just(0), st.none()),
        st.tuples(st.just("step"), st.just(0), st.just(0), st.none()),
    ),
    max_size=40,
)


class Twins:
    """Two schedulers that are told the same, what each request has produced, and what a KV cache
    would hold: by slot, all tokens up to the one there, and the variant of its frequencies.
    """

    def __init__(self, sizes: dict[str, Any], num_blocks: int, block_size: int) -> None:
        self.pools = [BlockPool(num_blocks, block_size) for _ in range(2)]
        self.schedulers = [scheduler_of(pool, **sizes) for pool in self.pools]
        self.sizes = sizes
        self.requests: list[Request] = []
        self.ids: dict[int, list[int]] = {}
        self.ended: dict[int, str] = {}
        self.admitted: dict[int, Sequence] = {}
        self.cache: dict[int, tuple[int, ...]] = {}
        self.under_way: deque[tuple[list[Scheduled], list[Scheduled]]] = deque()

    def add(self, prompt_len: int, max_tokens: int, family: int | None) -> None:
        asked = request(len(self.requests), prompt_len, max_tokens, STOP, family=family)
        if self.pools[0].blocks_for(asked.max_length) > self.pools[0].num_blocks:
            for scheduler in self.schedulers:
                with pytest.raises(DoesNotFitError):
                    scheduler.add(asked)
            return
        self.requests.append(asked)
        self.ids[asked.request_id] = []
        for scheduler in self.schedulers:
            scheduler.add(asked)

    def abort(self, request_id: int) -> None:
        for scheduler in self.schedulers:
            scheduler.abort(request_id)
        if request_id in self.ids:
            self.ended.setdefault(request_id, "aborted")

    @property
    def have_work(self) -> bool:
        return bool(self.under_way) or self.schedulers[0].has_work

    def step(self) -> None:
        """Schedule; commit the oldest step where there are enough, or where all wait for one."""
        unpadded = copy.deepcopy(self.schedulers[0])
        unpadded._sizes = None
        one, other = (scheduler.schedule() for scheduler in self.schedulers)
        # To cut a step keeps nobody waiting that decodes.
        assert _decoding(unpadded.schedule()) <= _decoding(one)
        assert [part[1:] for part in one] == [part[1:] for part in other]
        assert [part.sequence for part in one] == [part.sequence for part in other]
        self._check(one)
        if one:
            self.under_way.append((one, other))
        most = self.sizes["num_groups"] + self.sizes["runs_ahead"]
        if len(self.under_way) == most or not one:
            self._commit()

    def _commit(self) -> None:
        parts = zip(self.schedulers, self.under_way.popleft(), strict=True)
        outputs = [commit(scheduler, of_one, failing=True) for scheduler, of_one in parts]
        assert outputs[0] == outputs[1]
        for output in outputs[0]:
            assert output.request_id not in self.ended
            if output.failed:
                self.ended[output.request_id] = "failed"
                continue
            self.ids[output.request_id].append(output.token_id)
            if output.finish_reason:
                self.ended[output.request_id] = output.finish_reason

    def _check(self, scheduled: list[Scheduled]) -> None:
        assert scheduled or self.under_way
        assert all(part.num_tokens > 0 for part in scheduled)
        assert sum(part.num_tokens for part in scheduled) <= self.sizes["max_num_batched_tokens"]
        waiting = [p.sequence for step, _ in self.under_way for p in step if p.samples]
        for part in scheduled:
            places = [place for place, sequence in enumerate(waiting) if sequence is part.sequence]
            # A token that was not read is taken from where the step under way puts it.
            assert places == ([] if part.follows is None else [part.follows])
            assert self.sizes["runs_ahead"] or not places
            self.admitted.setdefault(part.sequence.request.request_id, part.sequence)
        # One of a family may wait for what another of it computes.
        alone = [n for n, s in self.admitted.items() if s.request.prompt_ids[0] >= 100]
        assert alone == sorted(alone)
        running = [
            s
            for request_id, s in self.admitted.items()
            if request_id not in self.ended and not s.will_be_over
        ]
        assert len(running) <= self.sizes["max_num_seqs"]
        self._write(scheduled)
        for part in scheduled:
            self._read(part)

    def _write(self, scheduled: list[Scheduled]) -> None:
        written: dict[int, tuple[int, ...]] = {}
        for part in scheduled:
            for position in range(part.start, part.start + part.num_tokens):
                slot = self._slot(part.sequence, position)
                assert slot not in written, "two tokens of a step go to one slot"
                written[slot] = _contents(part.sequence, position)
        self.cache |= written

    def _read(self, part: Scheduled) -> None:
        for position in range(part.start + part.num_tokens):
            slot = self._slot(part.sequence, position)
            assert self.cache[slot] == _contents(part.sequence, position)

    def _slot(self, sequence: Sequence, position: int) -> int:
        size = self.pools[0].block_size
        return sequence.blocks[position // size] * size + position % size

    def check_end(self) -> None:
        for asked in self.requests:
            first, ids = len(asked.prompt_ids), self.ids[asked.request_id]
            assert ids == [token(asked.request_id, first + i) for i in range(len(ids))]
            end = self.ended[asked.request_id]
            assert end != "length" or len(ids) == asked.max_tokens
            assert (end == "stop") == (STOP in ids)
            assert STOP not in ids[:-1]
        for pool in self.pools:
            assert sorted(pool.take(pool.num_blocks) or []) == list(range(pool.num_blocks))


def _decoding(scheduled: list[Scheduled]) -> set[int]:
    """Requests that are beyond their prompts and their first token, and have a part in the step."""
    return {
        part.sequence.request.request_id
        for part in scheduled
        if part.num_tokens == 1 and part.start >= len(part.sequence.request.prompt_ids)
    }


def _contents(sequence: Sequence, position: int) -> tuple[int, ...]:
    ids, known = sequence.request.prompt_ids[: position + 1], len(sequence.request.prompt_ids)
    chosen = (token(sequence.request.request_id, n) for n in range(known, position + 1))
    return (sequence.rope_variant, *ids, *chosen)


@settings(max_examples=200, deadline=None)
@given(
    events=EVENTS,
    max_num_seqs=st.integers(1, 4),
    max_num_batched_tokens=st.integers(1, 25),
    groups=st.sampled_from([(1, False), (2, False), (3, False), (1, True)]),
    rope_switch_length=st.sampled_from([None, 9]),
    is_padded=st.booleans(),
    num_blocks=st.integers(2, 12),
    block_size=st.sampled_from([1, 4]),
)
def test_whatever_happens(
    events: list[tuple[str, int, int, int | None]],
    num_blocks: int,
    block_size: int,
    groups: tuple[int, bool],
    is_padded: bool,
    **sizes: Any,
) -> None:
    """Everyone reads what is his own, no block is lost, everyone is served in turn, and two ranks
    never differ.
    """
    sizes |= {"num_groups": groups[0], "runs_ahead": groups[1]}
    if is_padded:
        sizes["sizes"] = StepSizes(buckets_of(None, sizes["max_num_batched_tokens"]))
    twins = Twins(sizes, num_blocks, block_size)
    with patch("runner.engine.step_size._READ", 0):
        for kind, first, second, family in events:
            if kind == "add":
                twins.add(first, second, family)
            elif kind == "abort":
                twins.abort(first)
            elif twins.have_work:
                twins.step()
        while twins.have_work:
            twins.step()
    assert not twins.schedulers[1].has_work
    twins.check_end()
