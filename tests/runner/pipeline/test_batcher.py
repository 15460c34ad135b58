"""Dynamic batching under a clock that the test turns: nothing here waits."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import ConfigError
from runner.pipeline.batcher import Batch, Batcher, QueueFullError
from runner.pipeline.batching_policy import BatchingPolicy
from runner.pipeline.bucket_queue import BatchRequest, CutReason

# Times are multiples of this, which binary fractions hold exactly.
TICK_S = 2**-10
DELAY_S = 64 * TICK_S


def policy(
    max_batch_size: int = 8,
    preferred: tuple[int, ...] = (),
    *,
    delay_s: float = DELAY_S,
    max_queue_size: int = 100,
    margin_s: float = 0.0,
) -> BatchingPolicy:
    return BatchingPolicy(
        max_batch_size, delay_s * 1000, max_queue_size, preferred, margin_s * 1000
    )


@dataclass
class Clocked:
    """A batcher with its clock, and requests numbered as they come."""

    batcher: Batcher[str]
    now: float = 0.0
    sent: dict[int, BatchRequest[str]] = field(default_factory=dict)

    def send(
        self, bucket: Hashable = "a", *, priority: int = 0, timeout_s: float | None = None
    ) -> int:
        number = len(self.sent)
        deadline_s = None if timeout_s is None else self.now + timeout_s
        request = BatchRequest(number, bucket, f"p{number}", self.now, priority, deadline_s)
        self.sent[number] = request
        self.batcher.add(request)
        return number

    def cut(self) -> tuple[list[int], str] | None:
        batch = self.batcher.due(self.now)
        return None if batch is None else (ids(batch), batch.reason.value)


def clocked(chosen: BatchingPolicy) -> Clocked:
    return Clocked(Batcher(chosen))


def ids(batch: Batch[str]) -> list[int]:
    return [request.request_id for request in batch.requests]


def test_a_full_bucket_is_cut_at_once() -> None:
    it = clocked(policy(max_batch_size=3))
    for _ in range(4):
        it.send()
    assert it.cut() == ([0, 1, 2], "full")
    assert it.cut() is None
    assert it.batcher.num_waiting == 1


def test_a_request_alone_waits_for_the_delay_and_no_longer() -> None:
    it = clocked(policy())
    it.send()
    assert it.batcher.next_due(it.now) == DELAY_S
    it.now = DELAY_S - TICK_S
    it.send()
    assert it.cut() is None
    assert it.batcher.next_due(it.now) == TICK_S
    it.now = DELAY_S
    assert it.batcher.next_due(it.now) == 0
    assert it.cut() == ([0, 1], "delay")
    assert it.batcher.next_due(it.now) is None


def test_without_a_delay_requests_go_with_those_that_are_there() -> None:
    it = clocked(policy(delay_s=0))
    for _ in range(5):
        it.send()
    assert it.cut() == ([0, 1, 2, 3, 4], "delay")


def test_the_largest_preferred_size_is_cut_without_delay() -> None:
    it = clocked(policy(preferred=(4, 2)))
    it.send()
    assert it.cut() is None
    for _ in range(4):
        it.send()
    assert it.cut() == ([0, 1, 2, 3], "preferred")
    assert it.cut() is None


def test_an_overdue_request_takes_all_with_it_rather_than_a_preferred_size() -> None:
    it = clocked(policy(preferred=(4,)))
    for _ in range(6):
        it.send()
    it.now = DELAY_S
    assert it.cut() == ([0, 1, 2, 3, 4, 5], "delay")


def test_without_a_delay_a_preferred_size_goes_before_the_rest() -> None:
    it = clocked(policy(preferred=(4,), delay_s=0))
    for _ in range(6):
        it.send()
    assert it.cut() == ([0, 1, 2, 3], "preferred")
    assert it.cut() == ([4, 5], "delay")


def test_draining_waits_for_nobody() -> None:
    it = clocked(policy(max_batch_size=4, preferred=(2,)))
    for _ in range(7):
        it.send()
    it.batcher.drain()
    assert it.batcher.next_due(it.now) == 0
    assert it.cut() == ([0, 1, 2, 3], "full")
    assert it.cut() == ([4, 5, 6], "drain")
    assert it.cut() is None


def test_a_close_deadline_cuts_early_and_takes_the_others_along() -> None:
    it = clocked(policy(margin_s=4 * TICK_S))
    it.send()
    it.send(timeout_s=20 * TICK_S)
    assert it.batcher.next_due(it.now) == 16 * TICK_S
    it.now = 16 * TICK_S
    assert it.cut() == ([0, 1], "deadline")


def test_a_short_deadline_does_not_pass_a_bucket_that_is_overdue() -> None:
    it = clocked(policy(margin_s=10 * TICK_S))
    it.send("old")
    it.now = DELAY_S + TICK_S
    it.send("hasty", timeout_s=2 * TICK_S)
    assert it.cut() == ([0], "delay")
    assert it.cut() == ([1], "deadline")


def test_an_expired_request_is_returned_once_and_never_runs() -> None:
    it = clocked(policy(max_batch_size=2))
    it.send(timeout_s=TICK_S)
    it.now = TICK_S
    it.send()
    assert it.cut() is None, "the expired request fills no batch"
    assert it.batcher.next_expiry(it.now) == it.batcher.next_due(it.now) == 0
    assert [r.request_id for r in it.batcher.take_expired(it.now)] == [0]
    assert it.batcher.take_expired(it.now) == []
    assert it.batcher.next_expiry(it.now) is None
    assert it.batcher.num_waiting == 1


def test_buckets_do_not_mix_and_the_one_due_first_goes_first() -> None:
    it = clocked(policy(max_batch_size=4))
    it.send("slow")
    it.now = TICK_S
    for _ in range(4):
        it.send("busy")
    assert it.cut() == ([1, 2, 3, 4], "full"), "the other bucket cannot be cut yet"
    for _ in range(4):
        it.send("busy")
    it.now = DELAY_S
    assert it.cut() == ([0], "delay")
    assert it.cut() == ([5, 6, 7, 8], "full")


def test_lower_priorities_run_first_and_arrival_decides_between_equals() -> None:
    it = clocked(policy(max_batch_size=3))
    for priority in (1, 2, 0, 1):
        it.send(priority=priority)
    assert it.cut() == ([2, 0, 3], "full")


def test_an_overdue_request_is_in_the_next_batch_whatever_its_priority() -> None:
    it = clocked(policy(max_batch_size=2))
    it.send(priority=9)
    for _ in range(2):
        it.send()
    assert it.cut() == ([1, 2], "full"), "not overdue yet"
    it.now = DELAY_S
    for _ in range(2):
        it.send()
    assert it.cut() == ([3, 0], "full")


def test_a_cancelled_request_takes_no_place() -> None:
    it = clocked(policy(max_batch_size=2))
    it.send(timeout_s=1.0)
    assert it.batcher.cancel(0)
    assert not it.batcher.cancel(0)
    assert it.batcher.next_due(it.now) is None
    it.send()
    assert it.cut() is None
    it.send()
    assert it.cut() == ([1, 2], "full")


def test_a_full_queue_refuses_and_says_what_to_raise() -> None:
    it = clocked(policy(max_batch_size=2, max_queue_size=2))
    it.send("a")
    it.send("b", timeout_s=TICK_S)
    with pytest.raises(QueueFullError, match="max_queue_size is 2; send again later"):
        it.send("a")
    it.now = TICK_S
    it.send("a")
    assert it.batcher.num_waiting == 2, "an expired request makes room"


def test_an_id_that_waits_cannot_be_added_again() -> None:
    it = clocked(policy())
    it.send()
    with pytest.raises(ConfigError, match="request 0 waits already"):
        it.batcher.add(it.sent[0])


@pytest.mark.parametrize(
    ("settings_of", "message"),
    [
        ((0, 1.0, 10), "max_batch_size=0; use 1 or more"),
        ((8, 1.0, 7), "max_queue_size=7 is less than max_batch_size=8"),
        ((8, -1.0, 10), "max_queue_delay_ms=-1.0; use 0 or more"),
        ((8, float("nan"), 10), "max_queue_delay_ms=nan"),
        ((8, 1.0, 10, (4, 9)), "preferred_batch_sizes has 9; use sizes from 1 to"),
        ((8, 1.0, 10, (), -1.0), "deadline_margin_ms=-1.0"),
    ],
)
def test_a_policy_out_of_range_is_refused(settings_of: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchingPolicy(*settings_of)


POLICIES = st.integers(1, 6).flatmap(
    lambda size: st.builds(
        policy,
        st.just(size),
        st.lists(st.integers(1, size), max_size=3).map(tuple),
        delay_s=st.integers(0, 20).map(lambda ticks: ticks * TICK_S),
        max_queue_size=st.integers(size, 20),
        margin_s=st.integers(0, 5).map(lambda ticks: ticks * TICK_S),
    )
)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("send"),
            st.sampled_from("ab"),
            st.integers(0, 2),
            st.none() | st.integers(1, 30).map(lambda ticks: ticks * TICK_S),
        ),
        st.tuples(st.just("wait"), st.integers(1, 25)),
        st.tuples(st.just("poll")),
        st.tuples(st.just("cancel"), st.integers(0, 40)),
    ),
    max_size=60,
)


@dataclass
class Audit:
    """Carries actions out, and checks every batch as it is cut."""

    it: Clocked
    waiting: dict[int, BatchRequest[str]] = field(default_factory=dict)
    num_refused: int = 0

    def send(self, bucket: str, priority: int, timeout_s: float | None) -> None:
        self.expire()
        number = len(self.it.sent)
        is_full = len(self.waiting) == self.it.batcher.policy.max_queue_size
        try:
            self.it.send(bucket, priority=priority, timeout_s=timeout_s)
        except QueueFullError:
            assert is_full
            return
        assert not is_full
        self.waiting[number] = self.it.sent[number]

    def wait(self, ticks: int) -> None:
        self.it.now += ticks * TICK_S

    def cancel(self, number: int) -> None:
        was_there = self.it.batcher.cancel(number)
        assert was_there == (self.waiting.pop(number, None) is not None)

    def expire(self) -> None:
        expired = [r.request_id for r in self.it.batcher.take_expired(self.it.now)]
        late = [
            number
            for number, request in self.waiting.items()
            if request.deadline_s is not None and request.deadline_s <= self.it.now
        ]
        assert sorted(expired) == late
        for number in expired:
            del self.waiting[number]

    def poll(self) -> None:
        self.expire()
        while batch := self.it.batcher.due(self.it.now):
            self.check(batch)
        now, chosen = self.it.now, self.it.batcher.policy
        for request in self.waiting.values():
            assert now - request.arrived_s < chosen.max_queue_delay_ms / 1000
        wait_s = self.it.batcher.next_due(now)
        assert (wait_s is None) == (not self.waiting)
        assert wait_s is None or wait_s > 0, "due() said that nothing can be cut"

    def check(self, batch: Batch[str]) -> None:
        chosen, now = self.it.batcher.policy, self.it.now
        bucket = [r for r in self.waiting.values() if r.bucket == batch.bucket]
        cut = [self.waiting.pop(number) for number in ids(batch)]
        assert 1 <= len(cut) <= chosen.max_batch_size
        assert all(mine is theirs for mine, theirs in zip(cut, batch.requests, strict=True))
        assert {request.bucket for request in cut} == {batch.bucket}
        ranks = [(request.priority, request.request_id) for request in cut]
        assert ranks == sorted(ranks)
        best = sorted((r.priority, r.request_id) for r in bucket)[: len(cut)]
        assert ranks[:-1] == best[:-1], "at most one gives its place up to the most urgent"
        oldest = min(bucket, key=lambda request: request.request_id)
        is_overdue = oldest.arrived_s + chosen.max_queue_delay_ms / 1000 <= now
        assert ranks == best or is_overdue or any(r.deadline_s is not None for r in cut)
        assert (batch.reason is CutReason.FULL) == (len(bucket) >= chosen.max_batch_size)
        if batch.reason is CutReason.PREFERRED:
            assert len(cut) == chosen.largest_preferred(len(bucket))
        elif batch.reason is not CutReason.FULL:
            assert len(cut) == len(bucket)
        assert batch.reason is not CutReason.DELAY or is_overdue


@settings(deadline=None, max_examples=300)
@given(POLICIES, ACTIONS)
def test_no_request_is_lost_doubled_mixed_or_late(
    chosen: BatchingPolicy, actions: list[tuple[object, ...]]
) -> None:
    audit = Audit(clocked(chosen))
    for name, *arguments in actions:
        getattr(audit, str(name))(*arguments)
        assert audit.it.batcher.num_waiting <= len(audit.waiting)
    audit.it.batcher.drain()
    audit.poll()
    assert audit.waiting == {}
    assert audit.it.batcher.num_waiting == 0
    assert audit.it.batcher.next_due(audit.it.now) is None


@settings(deadline=None, max_examples=200)
@given(POLICIES, ACTIONS)
def test_a_polled_batcher_keeps_its_own_appointments(
    chosen: BatchingPolicy, actions: list[tuple[object, ...]]
) -> None:
    """A thread that sleeps as long as `next_due` says runs every request in time."""
    audit = Audit(clocked(chosen))
    for name, *arguments in actions:
        if name == "wait":
            until = audit.it.now + float(str(arguments[0])) * TICK_S
            while (wait_s := audit.it.batcher.next_due(audit.it.now)) is not None:
                if audit.it.now + wait_s > until:
                    break
                audit.it.now += wait_s
                before = len(audit.waiting)
                audit.poll()
                assert len(audit.waiting) < before, "something happens when it said so"
            audit.it.now = until
        else:
            getattr(audit, str(name))(*arguments)
            audit.poll()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_low_priority_is_reached_under_a_flood_of_high_priority(flood: list[int]) -> None:
    """Two requests of priority 0 arrive for every place that a batch has; the queue only grows."""
    it = clocked(policy(max_batch_size=2, max_queue_size=1000))
    for bucket in flood:
        it.send(bucket % 2)
    slow = it.send(0, priority=9)
    it.now = DELAY_S
    for _ in range(len(flood) + 1):
        for _ in range(4):
            it.send(0)
        cut = it.cut()
        assert cut is not None
        if slow in cut[0]:
            return
    pytest.fail("it was passed by more batches than requests were due before it")
