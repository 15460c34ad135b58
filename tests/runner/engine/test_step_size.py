"""How many tokens a step takes, by hand and at random."""

from collections.abc import Callable
from pathlib import Path

import pytest
import rank_jobs
from hypothesis import given
from hypothesis import strategies as st

from runner.engine.step_size import StepSizes

BUCKETS = (1, 8, 32, 128, 256, 2048, 8192)


@pytest.mark.parametrize(
    ("num_tokens", "num_decoding", "size"),
    [
        (20_000, 0, 8192),  # more than any step has
        (8192, 0, 8192),
        (4096, 0, 2048),  # two full ones instead of one half full
        (6000, 32, 2048),
        (7000, 0, 8192),  # four would take as long
        (300, 0, 256),
        (170, 42, 256),
        (33, 0, 128),  # as fast as 32
        (2049, 2048, 8192),  # all that decode must go on
        (1, 1, 1),
    ],
)
def test_a_step_is_cut_where_that_saves_a_quarter(
    num_tokens: int, num_decoding: int, size: int
) -> None:
    assert StepSizes(BUCKETS).choose(num_tokens, num_decoding) == size


def test_of_powers_of_two_the_larger_is_taken_from_one_and_a_half_on() -> None:
    powers = tuple(1 << i for i in range(14))
    sizes = [StepSizes(powers).choose(n, 0) for n in (1024, 1025, 1536, 1537, 2047, 2048)]
    assert sizes == [1024, 1024, 1024, 2048, 2048, 2048]


def test_a_small_model_on_a_gpu_waits_for_the_host_so_its_steps_are_not_cut(
    checkpoint: Callable[[str], Path],
) -> None:
    plan = rank_jobs.prepare(str(checkpoint("llama")), [1], {}).plan
    gpu, cpu = (StepSizes.of(plan, (64, 8192), device) for device in ("cuda", "cpu"))
    assert gpu.overhead == pytest.approx(1000 * cpu.overhead)
    assert gpu.choose(100, 0) == 8192
    eight_billion = StepSizes((64, 8192), overhead=400)
    assert eight_billion.choose(100, 0) == 64


@given(
    buckets=st.sets(st.integers(1, 9000), min_size=1, max_size=8).map(sorted).map(tuple),
    overhead=st.sampled_from([0.0, 400.0, 1e5]),
    num_tokens=st.integers(1, 20_000),
    data=st.data(),
)
def test_a_step_is_full_or_holds_all_and_has_room_for_all_that_decode(
    buckets: tuple[int, ...], overhead: float, num_tokens: int, data: st.DataObject
) -> None:
    num_decoding = data.draw(st.integers(0, min(num_tokens, buckets[-1])))
    size = StepSizes(buckets, overhead).choose(num_tokens, num_decoding)
    assert size in buckets
    assert size >= num_decoding
    assert size <= min([b for b in buckets if b >= num_tokens], default=buckets[-1])
