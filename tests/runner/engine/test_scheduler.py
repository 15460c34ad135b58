"""Who runs when: every rule by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
import torch
from scheduling import commit, request, scheduler_of, shape, token

from parallel.context import ParallelContext
from parallel.errors import DoesNotFitError
from parallel.launch import RankEnv
from parallel.topology import Topology
from runner.engine.kv_blocks import BlockPool
from runner.engine.request import Request
from runner.engine.scheduler import Output, Scheduler
from runner.engine.sequence import NOT_FINITE, Sequence
from runner.engine.step_size import StepSizes


def step(scheduler: Scheduler) -> list[tuple[int, int]]:
    scheduled = scheduler.schedule()
    commit(scheduler, scheduled)
    return shape(scheduled)


def test_first_come_first_served_and_no_more_than_may_run_at_once() -> None:
    scheduler = scheduler_of(max_num_seqs=2)
    for request_id, max_tokens in ((1, 1), (2, 3), (3, 2)):
        scheduler.add(request(request_id, 5, max_tokens))
    assert step(scheduler) == [(1, 5), (2, 5)]
    assert step(scheduler) == [(2, 1), (3, 5)]
    assert step(scheduler) == [(2, 1), (3, 1)]
    assert not scheduler.has_work


def test_long_prompts_run_in_chunks_beside_those_that_decode() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=6)
    for request_id, prompt_len in ((1, 3), (2, 13), (3, 1)):
        scheduler.add(request(request_id, prompt_len, 9))
    assert step(scheduler) == [(1, 3), (2, 3)]
    assert step(scheduler) == [(1, 1), (2, 5)]
    assert step(scheduler) == [(1, 1), (2, 5)]
    assert step(scheduler) == [(1, 1), (2, 1), (3, 1)]


def test_prompts_are_cut_where_most_of_a_step_would_be_padding() -> None:
    sizes = StepSizes((64, 256, 2048))
    scheduler = scheduler_of(BlockPool(1000, 16), max_num_batched_tokens=2048, sizes=sizes)
    for request_id, prompt_len in ((1, 200), (2, 100), (3, 30)):
        scheduler.add(request(request_id, prompt_len, 9))
    assert summaries(scheduler, 1) == [(2, 256, "tokens", (1, 2))]
    assert step(scheduler) == [(1, 1), (2, 44), (3, 30)]
    scheduler.add(request(4, 1700, 9))
    assert step(scheduler) == [(1, 1), (2, 1), (3, 1), (4, 1700)]


def test_a_prompt_takes_the_seat_of_one_that_ends_whole_and_not_in_scraps() -> None:
    sizes = StepSizes((1, 8, 32, 128, 256, 2048))
    scheduler = scheduler_of(
        BlockPool(1000, 16),
        max_num_seqs=1,
        max_num_batched_tokens=2048,
        runs_ahead=True,
        sizes=sizes,
    )
    scheduler.add(request(1, 10, 1))
    scheduler.add(request(2, 1900, 2))
    first = scheduler.schedule()
    assert shape(scheduler.schedule()) == [(2, 1900)]
    commit(scheduler, first)


def test_one_that_is_computed_again_leaves_those_behind_it_their_tokens() -> None:
    scheduler = scheduler_of(
        BlockPool(1000, 16),
        max_num_batched_tokens=2048,
        rope_switch_length=400,
        sizes=StepSizes((1, 8, 256, 2048)),
    )
    scheduler.add(request(1, 398, 50))
    scheduler.add(request(2, 10, 50))
    shapes = [step(scheduler) for _ in range(4)]
    assert shapes == [[(1, 256)], [(1, 142), (2, 10)], [(1, 1), (2, 1)], [(1, 1), (2, 1)]]
    scheduler.add(request(3, 300, 50))
    # The first has outgrown its frequencies: 256 tokens would have been all its own.
    assert step(scheduler) == [(1, 401), (2, 1), (3, 300)]


def test_a_full_server_still_says_why_a_step_took_no_more() -> None:
    scheduler = scheduler_of(
        BlockPool(1000, 16),
        max_num_seqs=8,
        sizes=StepSizes((1, 8, 100)),
        max_num_batched_tokens=100,
    )
    for request_id in range(10):
        scheduler.add(request(request_id, 10, 5))
    assert [cut for _, _, cut, _ in summaries(scheduler, 3)] == ["sequences"] * 3


def summaries(scheduler: Scheduler, count: int) -> list[tuple[int, int, str, tuple[int, ...]]]:
    found = []
    for _ in range(count):
        step(scheduler)
        last = scheduler.last_step
        assert last is not None
        found.append((last.num_sequences, last.num_tokens, last.cut, last.admitted))
    return found


def test_a_step_says_why_it_took_no_more() -> None:
    scheduler = scheduler_of(max_num_seqs=2, max_num_batched_tokens=6)
    assert scheduler.last_step is None
    for request_id, prompt_len in ((1, 3), (2, 6), (3, 1)):
        scheduler.add(request(request_id, prompt_len, 2))
    assert summaries(scheduler, 3) == [
        (2, 6, "tokens", (1, 2)),
        (2, 4, "sequences", ()),
        (2, 2, "all", (3,)),
    ]
    scheduler.schedule()
    step(scheduler)
    assert scheduler.last_step is None, "there was nothing to do"


def test_a_step_that_lacks_blocks_says_so() -> None:
    scheduler = scheduler_of(BlockPool(3, 4))
    scheduler.add(request(1, 7, 2))
    scheduler.add(request(2, 7, 2))
    assert summaries(scheduler, 2) == [(1, 7, "blocks", (1,)), (1, 1, "blocks", ())]
    assert summaries(scheduler, 1) == [(1, 7, "all", (2,))]


def test_one_of_several_groups_leaves_the_others_their_share() -> None:
    scheduler = scheduler_of(num_groups=2)
    for request_id in (1, 2, 3, 4):
        scheduler.add(request(request_id, 2, 3))
    first, second = scheduler.schedule(), scheduler.last_step
    assert (len(first), second and second.cut) == (2, "group")
    assert len(scheduler.schedule()) == 2
    assert scheduler.last_step is not None
    assert (scheduler.last_step.cut, scheduler.last_step.admitted) == ("all", (3, 4))


def test_who_gave_way_is_not_admitted_twice() -> None:
    scheduler = scheduler_of(BlockPool(4, 2))
    scheduler.add(request(1, 2, 6))
    scheduler.add(request(2, 2, 6))
    admitted: list[int] = []
    while scheduler.has_work:
        step(scheduler)
        admitted += scheduler.last_step.admitted if scheduler.last_step else ()
    assert scheduler.load().num_preempted > 0
    assert admitted == [1, 2]


def test_only_the_last_chunk_yields_a_token() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=4)
    scheduler.add(request(5, 10, 2))
    outputs = [commit(scheduler, scheduler.schedule()) for _ in range(4)]
    assert outputs == [
        [],
        [],
        [Output(5, token(5, 10), None)],
        [Output(5, token(5, 11), "length")],
    ]


def test_a_step_smaller_than_the_running_set_serves_the_first() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=2)
    for request_id in (1, 2, 3):
        scheduler.add(request(request_id, 1, 2))
    assert step(scheduler) == [(1, 1), (2, 1)]
    assert step(scheduler) == [(1, 1), (2, 1)]
    assert step(scheduler) == [(3, 1)]


def test_as_many_groups_as_steps_that_may_be_under_way() -> None:
    scheduler = scheduler_of(num_groups=2)
    for request_id in range(1, 6):
        scheduler.add(request(request_id, 3, 9))
    one, two = scheduler.schedule(), scheduler.schedule()
    assert (shape(one), shape(two)) == ([(1, 3), (2, 3), (3, 3)], [(4, 3), (5, 3)])
    assert scheduler.schedule() == [], "all wait for tokens"
    for _ in range(3):
        commit(scheduler, one)
        one = scheduler.schedule()
        assert shape(one) == [(1, 1), (2, 1), (3, 1)]
        commit(scheduler, two)
        two = scheduler.schedule()
        assert shape(two) == [(4, 1), (5, 1)]


def test_chunks_of_one_prompt_do_not_wait_for_one_another() -> None:
    scheduler = scheduler_of(num_groups=2, max_num_batched_tokens=4)
    scheduler.add(request(1, 10, 2))
    steps = [scheduler.schedule() for _ in range(4)]
    assert [shape(parts) for parts in steps] == [[(1, 4)], [(1, 4)], [(1, 2)], []]


@pytest.mark.parametrize(("max_tokens", "reason"), [(1, "length"), (3, None)])
def test_a_token_under_way_reaches_a_sequence_that_gave_way(
    max_tokens: int, reason: str | None
) -> None:
    """Its blocks are gone, but what was computed in them holds."""
    scheduler = scheduler_of(BlockPool(4, 4), num_groups=2)
    scheduler.add(request(1, 8, 5))
    scheduler.add(request(2, 7, max_tokens))
    one, two = scheduler.schedule(), scheduler.schedule()
    commit(scheduler, one)
    one = scheduler.schedule()
    assert shape(one) == [(1, 1)], "it took a block of the second one"
    assert scheduler.schedule() == [], "whose token is not known yet, so it is not admitted again"
    assert commit(scheduler, two) == [Output(2, token(2, 7), reason)]
    while scheduler.load().num_running:
        commit(scheduler, one)
        one = scheduler.schedule()
    assert not scheduler.has_work


def test_the_next_step_need_not_wait_for_tokens_to_be_read() -> None:
    scheduler = scheduler_of(runs_ahead=True)
    for request_id, max_tokens in ((1, 2), (2, 4), (3, 9)):
        scheduler.add(request(request_id, 3, max_tokens, token(3, 4)))
    one, two = scheduler.schedule(), scheduler.schedule()
    assert [(p.start, p.follows) for p in one] == [(0, None)] * 3
    assert [(p.start, p.follows) for p in two] == [(3, 0), (3, 1), (3, 2)]
    commit(scheduler, one)
    three = scheduler.schedule()
    assert shape(three) == [(2, 1), (3, 1)], "the first one has come to its length"
    assert [part.follows for part in three] == [1, 2]
    assert [output.finish_reason for output in commit(scheduler, two)] == ["length", None, "stop"]
    assert shape(scheduler.schedule()) == [(2, 1)]
    assert [output.request_id for output in commit(scheduler, three)] == [2], "3 has ended before"


def test_blocks_are_known_once_their_tokens_have_been_read() -> None:
    pool = BlockPool(100, 4)
    scheduler = scheduler_of(pool, runs_ahead=True)
    scheduler.add(request(1, 7, 9))
    steps = [scheduler.schedule(), scheduler.schedule()]
    (part,) = steps[1]
    assert part.start + part.num_tokens == 8, "the second block is full, but for its last token"
    keys = Sequence.of(Request(9, (101,) * 7 + (token(1, 7),), 1)).keys(2, 4)
    assert pool.count_known(keys) == 1
    commit(scheduler, steps[0])
    assert pool.count_known(keys) == 2


def test_what_was_aborted_gets_no_token_that_was_under_way() -> None:
    scheduler = scheduler_of(num_groups=2)
    scheduler.add(request(1, 3, 9))
    under_way = scheduler.schedule()
    scheduler.abort(1)
    assert commit(scheduler, under_way) == []
    assert not scheduler.has_work


def test_no_one_overtakes_a_request_that_waits_for_blocks() -> None:
    scheduler = scheduler_of(BlockPool(10, 4))
    for request_id, prompt_len in ((1, 22), (2, 22), (3, 2)):
        scheduler.add(request(request_id, prompt_len, 2))
    assert step(scheduler) == [(1, 22)]
    assert step(scheduler) == [(1, 1)]
    assert step(scheduler) == [(2, 22), (3, 2)]


@pytest.mark.parametrize("max_tokens", [1, 4], ids=["finished", "aborted"])
def test_blocks_come_back(max_tokens: int) -> None:
    pool = BlockPool(3, 4)
    scheduler = scheduler_of(pool)
    scheduler.add(request(1, 8, max_tokens))
    scheduled = scheduler.schedule()
    assert pool.take(2) is None
    commit(scheduler, scheduled)
    scheduler.abort(1)
    assert not scheduler.has_work
    assert sorted(pool.take(3) or []) == [0, 1, 2]


def test_a_sequence_takes_blocks_as_it_grows() -> None:
    pool = BlockPool(3, 4)
    scheduler = scheduler_of(pool)
    scheduler.add(request(1, 3, 9))
    num_blocks = []
    while scheduler.has_work:
        (part,) = scheduler.schedule()
        num_blocks.append(len(part.sequence.blocks))
        commit(scheduler, [part])
    assert num_blocks == [1, 1, 2, 2, 2, 2, 3, 3, 3]


def test_the_last_one_gives_way_and_is_computed_again() -> None:
    """Its full block is still known, and is not computed again."""
    pool = BlockPool(4, 4)
    scheduler = scheduler_of(pool)
    scheduler.add(request(1, 8, 5))
    scheduler.add(request(2, 7, 5))
    assert step(scheduler) == [(1, 8), (2, 7)]
    assert step(scheduler) == [(1, 1)], "it took the fourth block, which the second one held"
    assert step(scheduler) == [(1, 1)], "there is room for the prompt, but not for its next token"
    assert [step(scheduler) for _ in range(2)] == [[(1, 1)], [(1, 1)]]
    assert step(scheduler) == [(2, 4)], "the first of its two blocks was not needed meanwhile"
    assert [step(scheduler) for _ in range(3)] == [[(2, 1)]] * 3
    assert not scheduler.has_work


def test_nobody_is_admitted_in_the_step_in_which_another_gave_way() -> None:
    scheduler = scheduler_of(BlockPool(5, 4))
    for request_id, prompt_len in ((1, 8), (2, 8), (3, 4)):
        scheduler.add(request(request_id, prompt_len, 4))
    assert step(scheduler) == [(1, 8), (2, 8), (3, 4)]
    assert step(scheduler) == [(1, 1)]


def test_a_known_beginning_is_not_computed_again() -> None:
    scheduler = scheduler_of()
    for request_id, prompt_len in ((1, 11), (2, 11)):
        scheduler.add(request(request_id, prompt_len, 3, family=7))
    scheduler.add(request(9, 5, 1, family=9))
    assert step(scheduler) == [(1, 11), (9, 5)], "the second one waits for what the first computes"
    assert scheduler.last_step is not None
    assert scheduler.last_step.cut == "prefix"
    assert step(scheduler) == [(1, 1), (2, 3)]
    scheduler.add(request(3, 14, 3, family=7))
    scheduler.add(request(4, 8, 3, family=7))
    scheduler.add(request(5, 14, 3, family=8))
    assert step(scheduler) == [(1, 1), (2, 1), (3, 6), (4, 4), (5, 14)]
    while scheduler.has_work:
        step(scheduler)
    scheduler.add(request(6, 12, 3, family=7))
    assert step(scheduler) == [(6, 4)], "the blocks of those that have ended are still known"


def test_one_that_waits_for_a_beginning_keeps_its_place() -> None:
    scheduler = scheduler_of(max_num_seqs=2)
    for request_id, family in ((1, 7), (2, 7), (3, 9)):
        scheduler.add(request(request_id, 9, 5, family=family))
    assert step(scheduler) == [(1, 9)]
    assert step(scheduler) == [(1, 1), (2, 1)]
    assert scheduler.last_step is not None
    assert scheduler.last_step.cut == "sequences"


def test_a_beginning_of_other_frequencies_is_another_one() -> None:
    scheduler = scheduler_of(rope_switch_length=10)
    scheduler.add(request(1, 9, 2, family=7))
    scheduler.add(request(2, 12, 2, family=7))
    step(scheduler)
    scheduler.add(request(3, 9, 1, family=7))
    scheduler.add(request(4, 13, 1, family=7))
    scheduled = scheduler.schedule()
    assert shape(scheduled)[-2:] == [(3, 1), (4, 1)]
    one, two, three, four = (part.sequence.blocks for part in scheduled)
    assert (three[:2], four[:3]) == (one[:2], two[:3])
    assert not set(one) & set(two)


def test_what_was_computed_after_the_switch_is_known_as_that() -> None:
    scheduler = scheduler_of(rope_switch_length=10)
    scheduler.add(request(1, 9, 3, family=7))
    while scheduler.has_work:
        step(scheduler)
    scheduler.add(request(2, 13, 1, family=7))
    assert step(scheduler) == [(2, 5)]


def test_a_sequence_that_gets_no_token_ends_alone_and_nobody_shares_its_blocks() -> None:
    pool = BlockPool(100, 4)
    scheduler = scheduler_of(pool)
    scheduler.add(request(1, 9, 5, family=7))
    scheduler.add(request(2, 3, 5))
    outputs = scheduler.commit(scheduler.schedule(), [NOT_FINITE, 5])
    assert [(o.request_id, o.failed) for o in outputs] == [(1, True), (2, False)]
    assert pool.usage == pytest.approx(0.01)
    scheduler.add(request(3, 9, 5, family=7))
    assert step(scheduler) == [(2, 1), (3, 9)]


def test_nobody_shares_what_it_had_to_give_back_before_it_failed() -> None:
    scheduler = scheduler_of(BlockPool(4, 4), runs_ahead=True)
    scheduler.add(request(1, 8, 5))
    scheduler.add(request(2, 8, 5, family=7))
    one = scheduler.schedule()
    assert shape(scheduler.schedule()) == [(1, 1)], "the second one gave way"
    outputs = scheduler.commit(one, [5, NOT_FINITE])
    assert [output.failed for output in outputs] == [False, True]
    scheduler.abort(1)
    scheduler.add(request(3, 8, 1, family=7))
    assert shape(scheduler.schedule()) == [(3, 8)]


def test_who_waits_for_its_last_token_leaves_its_seat() -> None:
    scheduler = scheduler_of(max_num_seqs=1, runs_ahead=True)
    scheduler.add(request(1, 2, 2))
    scheduler.add(request(2, 3, 1))
    steps = [scheduler.schedule()]
    for expected in ([(1, 1)], [(2, 3)], []):
        steps.append(scheduler.schedule())
        assert shape(steps[-1]) == expected
        commit(scheduler, steps.pop(0))
    assert not scheduler.has_work


def test_an_aborted_request_is_gone_wherever_it_was() -> None:
    pool = BlockPool(100, 4)
    scheduler = scheduler_of(pool, max_num_seqs=1)
    for request_id in (1, 2, 3):
        scheduler.add(request(request_id, 2, 5))
    step(scheduler)
    assert pool.usage > 0
    for gone in (1, 2, 2, 77):
        scheduler.abort(gone)
    # At once, and so are the blocks of the one that ran.
    assert pool.usage == 0
    assert step(scheduler) == [(3, 2)]


def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    scheduler = scheduler_of(BlockPool(5, 4))
    scheduler.add(request(1, 10, 10))
    with pytest.raises(DoesNotFitError, match=r"needs 6 KV blocks of 4 tokens.* has 5;"):
        scheduler.add(request(2, 11, 10))
    assert step(scheduler) == [(1, 10)]


def test_a_stop_token_ends_a_sequence_but_not_within_the_prompt() -> None:
    def end(max_tokens: int, stop: int) -> list[Output]:
        scheduler = scheduler_of()
        scheduler.add(Request(3, (9, stop), max_tokens, stop_token_ids=frozenset({stop})))
        outputs = []
        while scheduler.has_work:
            outputs += commit(scheduler, scheduler.schedule())
        return outputs

    ids = [token(3, position) for position in (2, 3, 4)]
    assert Sequence.of(request(3, 2, 9, 1)).finish_reason() is None
    assert end(9, ids[2])[-1] == Output(3, ids[2], "stop")
    assert end(3, ids[2])[-1] == Output(3, ids[2], "stop")  # the last one allowed, too
    assert end(2, ids[2])[-1] == Output(3, ids[1], "length")


@pytest.mark.parametrize(
    ("prompt_len", "budget", "steps"),
    [
        (4, 100, [4, 1, 1, 7, 1]),
        (4, 3, [3, 1, 1, 1, 3, 3, 1, 1]),
        (6, 100, [6, 7, 1, 1, 1]),
        (7, 100, [7, 1, 1, 1, 1]),
        (7, 5, [5, 2, 1, 1, 1, 1]),
    ],
)
def test_a_sequence_is_computed_anew_once_where_its_rope_switches(
    prompt_len: int, budget: int, steps: list[int]
) -> None:
    scheduler = scheduler_of(max_num_batched_tokens=budget, rope_switch_length=6)
    scheduler.add(request(1, prompt_len, 5))
    taken = []
    while scheduler.has_work:
        (part,) = scheduler.schedule()
        assert part.sequence.rope_variant == (len(part.sequence.token_ids) > 6)
        taken.append(part.num_tokens)
        commit(scheduler, [part])
    assert taken == steps


@pytest.mark.parametrize("prompt_len", [3, 12, 20, 21])
def test_longrope_crosses_its_original_length_like_generate(
    prompt_len: int, checkpoint: Callable[[str], Path], reference: Callable[[Path], Any]
) -> None:
    """transformers throws its cache away at the crossing, and so do we."""
    folder = checkpoint("phi3")
    prompt = [3 + 5 * i % 120 for i in range(prompt_len)]
    theirs = reference(folder).generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    context = ParallelContext.open(Topology.of([1]), RankEnv(0, 1), device_type="cpu")
    limits = {"scheduler.max_num_batched_tokens": 8}
    ours = rank_jobs.complete(context, str(folder), [prompt], 24, {}, limits)
    assert ours == [theirs[0, prompt_len:].tolist()]
