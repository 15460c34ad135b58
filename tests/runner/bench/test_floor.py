"""Bytes and operations of a workload, against numbers worked out by hand.

The model: hidden 8, MLP 12, 2 query heads of 4 on 1 KV head, 10 ids, 2 layers, float32. A layer has
QKV 16 x 8 = 128, O 8 x 8 = 64, gate and up 24 x 8 = 192, down 8 x 12 = 96 weights in matrices,
together 480, and two norms of 8; the model has another norm of 8, and a head of 10 x 8 = 80.
"""

from pathlib import Path
from typing import Any

import pytest
from dummy_model import make_dummy

from parallel.decoder_plan import DecoderPlan
from parallel.planner import Limits, make_plan
from parallel.topology import Topology
from runner.bench.floor import (
    DeviceLimits,
    RankWeights,
    Work,
    WorkCount,
    attended,
    floor_of,
    weights_of,
)
from runner.bench.workload import Workload
from runner.models.spec import ModelSpec

LIMITS = DeviceLimits(10.0, 8.0, 20.0, buffer_bytes=1, matmul_size=1)


def count_of(
    folder: Path, tp_sizes: list[int], dtype: str = "float32", **changes: Any
) -> WorkCount:
    spec = ModelSpec.open(make_dummy(folder, **changes), load_format="dummy")
    plan = make_plan(
        spec.layout,
        spec.checkpoint,
        Topology.of(tp_sizes),
        architecture="",
        dtype=dtype,
        limits=Limits(max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64),
    )
    return WorkCount(plan, spec.config, Workload(num_requests=3, input_len=5, output_len=4))


def weights(plan: DecoderPlan) -> list[RankWeights]:
    return [weights_of(rank, plan.stages[rank.stage]) for rank in plan.ranks]


@pytest.mark.parametrize("tied", [False, True])
def test_weights_by_their_use(tmp_path: Path, tied: bool) -> None:
    """A head that is the embedding, too, is read all the same."""
    count = count_of(tmp_path, [1], tie_word_embeddings=tied)
    assert weights(count.plan) == [
        RankWeights(read=2 * (480 + 16) + 8 + 80, per_token=960, per_sample=80, row=8)
    ]


def test_weights_of_two_ranks_of_a_stage(tmp_path: Path) -> None:
    """Each has one query head and its own copy of the KV head: QKV 12 x 8, O 8 x 4, MLP halves."""
    layer = 96 + 32 + 96 + 48
    rank = RankWeights(read=2 * (layer + 16) + 8 + 40, per_token=2 * layer, per_sample=40, row=8)
    assert weights(count_of(tmp_path, [2]).plan) == [rank, rank]


def test_weights_of_two_stages(tmp_path: Path) -> None:
    first, last = weights(count_of(tmp_path, [1, 1]).plan)
    assert (first.per_sample, first.row, last.row) == (0, 8, 0)
    assert first.per_token + last.per_token == 960
    assert last.per_sample == 80


def test_prefill(tmp_path: Path) -> None:
    """15 tokens; every weight and 15 rows of the embedding are read once. A sequence of 5 sees
    1 + 2 + 3 + 4 + 5 = 15 keys a layer; a key takes 4 x 4 operations for each of 2 heads.
    """
    (work,) = count_of(tmp_path, [1]).prefill()
    assert work.num_bytes == 4 * (1080 + 15 * 8)
    assert work.flops == 2 * (15 * 960 + 3 * 80) + 3 * 2 * 15 * 32


def test_a_decoding_step_at_the_mean_length(tmp_path: Path) -> None:
    """Three steps, at 6, 7 and 8 keys; a key and its value take 2 x 4 x 4 bytes a layer."""
    (work,) = count_of(tmp_path, [1]).decode_step()
    assert work.num_bytes == pytest.approx(4 * (1080 + 3 * 8) + 3 * 2 * 7 * 32)
    assert work.flops == pytest.approx(2 * 3 * (960 + 80) + 3 * 2 * 7 * 32)


def test_a_window_limits_what_is_read_and_computed(tmp_path: Path) -> None:
    """With 6 keys at most, the prompt of 5 is as before."""
    changes = {"architectures": ["MistralForCausalLM"], "sliding_window": 6}
    count = count_of(tmp_path, [1], **changes)
    (prefill,), (decode,) = count.prefill(), count.decode_step()
    assert prefill.flops == 2 * (15 * 960 + 3 * 80) + 3 * 2 * 15 * 32
    assert decode.num_bytes == pytest.approx(4 * (1080 + 3 * 8) + 3 * 2 * 6 * 32)


def test_half_precision_is_half_the_bytes(tmp_path: Path) -> None:
    (work,) = count_of(tmp_path, [1], dtype="bfloat16").decode_step()
    assert work.num_bytes == pytest.approx((4 * (1080 + 3 * 8) + 3 * 2 * 7 * 32) / 2)


def test_a_round_is_its_prefill_and_all_its_decoding(tmp_path: Path) -> None:
    """In five steps the weights are read five times; 9 tokens are decoded."""
    count = count_of(tmp_path, [1])
    (work,), (prefill,), (step,) = count.round(5), count.prefill(), count.decode_step()
    assert work.flops == pytest.approx(prefill.flops + 3 * step.flops)
    assert work.num_bytes == pytest.approx(4 * (5 * 1080 + 9 * 8) + 3 * 2 * 21 * 32)


def test_one_token_each_is_a_prefill_alone(tmp_path: Path) -> None:
    count = count_of(tmp_path, [1])
    short = WorkCount(count.plan, count.config, Workload(3, 5, 1))
    assert short.round(1)[0].flops == short.prefill()[0].flops


@pytest.mark.parametrize(
    ("first", "last", "window", "keys"),
    [
        (1, 4, None, 1 + 2 + 3 + 4),
        (3, 5, None, 3 + 4 + 5),
        (1, 4, 2, 1 + 2 + 2 + 2),
        (3, 5, 4, 3 + 4 + 4),
        (3, 4, 2, 2 + 2),
        (1, 4, 4, 1 + 2 + 3 + 4),
        (2, 1, None, 0),
    ],
)
def test_keys_that_tokens_see(first: int, last: int, window: int | None, keys: int) -> None:
    assert attended(first, last, window) == keys


def test_the_slowest_rank_of_each_stage_counts(tmp_path: Path) -> None:
    """At 10 bytes/s and 20 operations/s: 3 s for the second rank, then 2 s for the third."""
    plan = count_of(tmp_path, [2, 1]).plan
    floor = floor_of(plan, [Work(10, 0), Work(30, 40), Work(5, 40)], LIMITS)
    assert floor.seconds == 3 + 2
    assert floor.work == Work(35, 80)


def test_the_faster_way_to_use_the_memory_is_the_limit() -> None:
    assert (LIMITS.bytes_per_s, LIMITS.bandwidth_from) == (10, "read")
    copying = DeviceLimits(7.0, 8.0, 20.0, buffer_bytes=1, matmul_size=1)
    assert (copying.bytes_per_s, copying.bandwidth_from) == (8, "copy")
