"""Rounds of requests: what is sent, what is measured, and when it ends."""

from collections.abc import Iterator

import pytest

from parallel.decoder_plan import DecoderPlan
from parallel.errors import ConfigError
from runner.bench import front as front_module
from runner.bench.floor import DeviceLimits
from runner.bench.front import RoundsFront
from runner.bench.rounds import Repeat, Round, Step
from runner.bench.workload import Workload
from runner.engine.scheduler import Output

LIMITS = DeviceLimits(1.0, 1.0, 1.0, buffer_bytes=1, matmul_size=1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in its only element."""
    now = [0.0]
    monkeypatch.setattr(front_module.time, "perf_counter", lambda: now[0])
    return now


def make_front(workload: Workload, repeat: Repeat, calls: list[str] | None = None) -> RoundsFront:
    def measure() -> DeviceLimits:
        (calls if calls is not None else []).append("measured")
        return LIMITS

    return RoundsFront(workload, repeat, vocab_size=50, max_num_seqs=2, measure_limits=measure)


def serve(front: RoundsFront, clock: list[float], durations: Iterator[float]) -> list[list[int]]:
    """Play the engine, which gives every request a token in each step; the ids of each round."""
    rounds, open_ = [], {}
    while True:
        control = front.next()
        if control.leave:
            return rounds
        if control.added:
            rounds.append([request.request_id for request in control.added])
            open_ = {request.request_id: request.max_tokens for request in control.added}
        clock[0] += next(durations)
        open_ = {request_id: left - 1 for request_id, left in open_.items()}
        front.take([Output(i, 1, None if left else "length") for i, left in open_.items()])


def test_rounds_go_on_until_three_agree(clock: list[float]) -> None:
    """The first is warm-up; the prefill takes ten times as long as a step, and does not count."""
    steps = [9.0, 9.0, 5.0, 5.0, 1.0, 1.0, 1.01, 1.01, 1.0, 1.0]
    durations = [d for a, b in zip(steps[::2], steps[1::2], strict=True) for d in (10.0, a, b)]
    repeat = Repeat(lambda round_: round_.decode_steps_s[0], warmup_rounds=1, max_rounds=9)
    front = make_front(Workload(2, 4, 3), repeat)
    assert serve(front, clock, iter(durations)) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert repeat.metrics(front.rounds) == pytest.approx([5.0, 1.0, 1.01, 1.0])
    assert repeat.is_stable(front.rounds)
    reported = repeat.reported(front.rounds)
    assert reported == front.rounds[-3:]
    assert [round_.prefill_s for round_ in reported] == pytest.approx([10.0] * 3)
    assert reported[0].elapsed_s == pytest.approx(12.0)


def test_rounds_that_never_agree_end_at_the_most(clock: list[float]) -> None:
    repeat = Repeat(lambda round_: round_.elapsed_s, warmup_rounds=2, max_rounds=4)
    front = make_front(Workload(1, 1, 1), repeat)
    assert len(serve(front, clock, iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))) == 6
    assert not repeat.is_stable(front.rounds)


def test_limits_are_measured_once_and_outside_of_the_rounds(clock: list[float]) -> None:
    calls: list[str] = []
    repeat = Repeat(lambda round_: round_.elapsed_s, warmup_rounds=0, max_rounds=2)
    front = make_front(Workload(1, 1, 1), repeat, calls)
    assert front.kv_blocks(16) == 1
    assert calls == []
    serve(front, clock, iter([1.0, 2.0]))
    assert (calls, front.limits) == (["measured"], LIMITS)


def test_prompts_are_random_and_no_token_ends_them() -> None:
    first, second = (Workload(3, 40, 7).requests(index, 50) for index in range(2))
    assert len({request.prompt_ids for request in first + second}) == 6
    assert {len(request.prompt_ids) for request in first} == {40}
    assert {token for request in first for token in request.prompt_ids} <= set(range(50))
    assert {(r.max_tokens, r.stop_token_ids, r.sampling.temperature) for r in first} == {
        (7, frozenset(), 0.0)
    }
    assert first == Workload(3, 40, 7).requests(0, 50)


def test_blocks_are_those_of_the_sequences_that_run_at_once() -> None:
    assert Workload(5, 16, 1).kv_blocks(16, max_num_seqs=3) == 3 * 2
    assert Workload(2, 16, 16).kv_blocks(16, max_num_seqs=3) == 2 * 2


def test_prefill_ends_with_the_last_first_token() -> None:
    """Prompts in two chunks: a step without tokens, then one request after the other; the step in
    which one is complete already is no decoding step of the batch.
    """
    steps = [Step(1, 0, 0), Step(3, 1, 1), Step(6, 2, 1), Step(7, 2, 0), Step(9, 1, 0)]
    round_ = Round(2, 0.5, steps)
    assert round_.prefill_s == 5.5
    assert round_.decode_steps_s == [1]
    assert round_.elapsed_s == 8.5


@pytest.mark.parametrize("steps", [[Step(1, 1, 1)], []])
def test_a_round_that_has_not_begun_has_no_prefill(steps: list[Step]) -> None:
    with pytest.raises(ValueError, match="of 2 requests have begun"):
        _ = Round(2, 0.0, steps).prefill_s


def test_sequences_must_fit_the_length() -> None:
    plan = DecoderPlan("decoder", "", "float32", (1,), (0,), (), (), 12, 64)
    Workload(1, 8, 4).check(plan)
    with pytest.raises(ConfigError, match="sequences of 13 tokens, but max_model_len=12"):
        Workload(1, 8, 5).check(plan)
