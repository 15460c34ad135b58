"""Whether a step is cut, by hand and at random."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import rank_jobs
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from runner.engine.step_size import StepSizes, rows_worth_capturing

BUCKETS = (1, 8, 32, 128, 256, 2048, 8192)


@pytest.mark.parametrize(
    ("num_tokens", "num_decoding", "size"),
    [
        (20_000, 0, None),  # more than any step has
        (8192, 0, None),
        (4096, 0, 2048),  # two full ones instead of one half full
        (6000, 32, 2048),
        (7000, 0, None),  # four would take as long
        (300, 0, 256),
        (170, 42, None),
        (33, 0, None),  # as fast as 32
        (2049, 2048, None),  # all that decode must go on
        (1, 1, None),
    ],
)
def test_a_step_is_cut_where_that_saves_enough(
    num_tokens: int, num_decoding: int, size: int | None
) -> None:
    assert StepSizes(BUCKETS).cut(num_tokens, num_decoding) == size


def test_between_powers_of_two_a_step_is_cut_below_one_and_a_half() -> None:
    powers = tuple(1 << i for i in range(14))
    sizes = [StepSizes(powers).cut(n, 0) for n in (1024, 1025, 1536, 1537, 2047, 2048)]
    assert sizes == [None, 1024, 1024, None, None, None]


def test_a_small_model_on_a_gpu_waits_for_the_host_so_its_steps_are_not_cut(
    checkpoint: Callable[[str], Path],
) -> None:
    folder = checkpoint("llama")
    job = rank_jobs.prepare(str(folder), [1], {})
    num_weights = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    gpu, cpu = (StepSizes.of(job.plan, (64, 8192), device) for device in ("cuda", "cpu"))
    # The host's 0.5 ms a layer and 1 ms a step, in rows of 2 operations a weight at 7e14 a second.
    assert gpu.calls == pytest.approx(job.spec.config.num_layers * 1.75e11 / num_weights)
    assert gpu.overhead == pytest.approx(3.5e11 / num_weights)
    assert gpu.cut(100, 0) is None
    assert gpu.calls == pytest.approx(700 * cpu.calls)
    assert rows_worth_capturing(job.plan) == 1024


def test_a_large_model_s_steps_are_cut_the_sooner_if_they_are_captured() -> None:
    """Of 8e9 weights in 32 layers, whose 700 rows take 16 ms, as its calls do."""
    called = StepSizes((256, 2048), overhead=44, calls=700)
    captured = replace(called, captured=256)
    assert [called.cut(n, 0) for n in (256, 257, 600, 1024)] == [None, 256, None, None]
    assert [captured.cut(n, 0) for n in (256, 257, 600, 1024)] == [None, 256, 256, 256]
    assert captured.cut(1025, 0) is None


@given(
    buckets=st.sets(st.integers(1, 9000), min_size=1, max_size=8).map(sorted).map(tuple),
    overhead=st.sampled_from([0.0, 400.0, 1e5]),
    calls=st.sampled_from([0.0, 1000.0]),
    captured=st.sampled_from([0, 256]),
    num_tokens=st.integers(1, 20_000),
    data=st.data(),
)
def test_a_step_that_is_cut_is_full_and_has_room_for_all_that_decode(
    buckets: tuple[int, ...],
    overhead: float,
    calls: float,
    captured: int,
    num_tokens: int,
    data: st.DataObject,
) -> None:
    num_decoding = data.draw(st.integers(0, min(num_tokens, buckets[-1])))
    size = StepSizes(buckets, overhead, calls, captured).cut(num_tokens, num_decoding)
    if size is not None:
        assert size in buckets
        assert num_decoding < size < num_tokens < buckets[-1]
