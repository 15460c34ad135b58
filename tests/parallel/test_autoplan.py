"""Which sizes are tried, what they are estimated to take, and which are chosen, up to 70 B."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from sparse_checkpoint import LLAMA_70B, make_sparse_llama

from parallel.autoplan import H200, Candidate, GpuSpeed, assess, choose, closest, ranked, sizes
from parallel.autoplan import step_s as estimate
from parallel.decoder_plan import DecoderPlan
from parallel.fit import Budget, fit_of
from parallel.planner import Limits, make_plan
from parallel.topology import Topology
from runner.models.spec import ModelSpec

GPU_80_GB = Budget(80 * 10**9, utilization=0.9, block_size=16)
READ_ONLY = GpuSpeed(bandwidth=1.0, all_reduce_s=0.0, transfer_s=0.0)

Planner = Callable[[int, int], DecoderPlan]


def planner_of(spec: ModelSpec) -> Planner:
    """Plans by (tp_size, pp_size), each made once."""
    limits = Limits(spec.config.max_positions, max_num_seqs=32, max_num_batched_tokens=8192)

    @cache
    def plan(tp_size: int, pp_size: int) -> DecoderPlan:
        return make_plan(
            spec.layout,
            spec.checkpoint,
            Topology.of([tp_size] * pp_size),
            architecture=spec.config.architecture,
            dtype=spec.config.dtype,
            limits=limits,
        )

    return plan


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return ModelSpec.open(make_sparse_llama(tmp_path_factory.mktemp("llama-70b"), LLAMA_70B))


@pytest.fixture(scope="module")
def plan_70b(llama_70b: ModelSpec) -> Planner:
    return planner_of(llama_70b)


def candidates_for(num_gpus: int, spec: ModelSpec, plan: Planner) -> list[Candidate]:
    return [assess(plan(*pair), GPU_80_GB) for pair in sizes(spec.layout, num_gpus)]


def test_head_of_70b_moves_the_cut_to_41_and_39_layers(plan_70b: Planner) -> None:
    """Its head is 1.2 layers; KV: 2 x 41 layers x 2 heads x 128 x 2 B."""
    plan = plan_70b(4, 2)
    assert [stage.layers for stage in plan.stages] == [(0, 41), (41, 80)]
    assert {rank.kv_bytes_per_token for rank in plan.ranks if rank.stage == 0} == {41_984}
    assert sum(rank.weight_bytes for rank in plan.ranks) == pytest.approx(141.1e9, rel=1e-3)


def test_sizes_are_all_that_heads_layers_and_gpus_allow(checkpoint: Callable[[str], Path]) -> None:
    layout = ModelSpec.open(checkpoint("llama")).layout  # 6 heads, 3 layers
    assert sorted(sizes(layout, 4)) == [
        (1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1), (4, 1)
    ]  # fmt: skip
    assert set(sizes(layout, 100)) == {(tp, pp) for tp in range(1, 7) for pp in range(1, 4)}


def test_every_size_can_be_planned(checkpoint: Callable[[str], Path]) -> None:
    spec = ModelSpec.open(checkpoint("llama"))
    plan = planner_of(spec)
    for tp_size, pp_size in sizes(spec.layout, 18):
        assert plan(tp_size, pp_size).tp_sizes == (tp_size,) * pp_size


def test_estimate_reads_all_weights_but_an_embedding(checkpoint: Callable[[str], Path]) -> None:
    spec = ModelSpec.open(checkpoint("llama"))
    everything = sum(tensor.num_bytes for tensor in spec.checkpoint.tensors.values())
    embedding = spec.checkpoint.tensors["model.embed_tokens.weight"].num_bytes
    assert estimate(planner_of(spec)(1, 1), READ_ONLY) == everything - embedding


def test_estimate_reads_an_embedding_that_is_the_head(checkpoint: Callable[[str], Path]) -> None:
    """In one stage the two share a tensor, in two each stage has its own."""
    spec = ModelSpec.open(checkpoint("qwen3"))
    everything = sum(tensor.num_bytes for tensor in spec.checkpoint.tensors.values())
    plan = planner_of(spec)
    assert estimate(plan(1, 1), READ_ONLY) == everything
    assert estimate(plan(1, 2), READ_ONLY) == everything


def test_estimate_waits_for_the_rank_that_reads_most(checkpoint: Callable[[str], Path]) -> None:
    """6 query and 3 KV heads over 2 ranks are 4 + 2 and 2 + 1."""
    spec = ModelSpec.open(checkpoint("llama"))
    plan = planner_of(spec)(2, 1)
    read = [
        4 * sum(math.prod(t.shape) for t in rank.tensors if t.name != "embed_tokens.weight")
        for rank in plan.ranks
    ]
    assert read[0] > read[1]
    assert estimate(plan, READ_ONLY) == read[0]


def test_estimate_counts_collectives_and_transfers(plan_70b: Planner) -> None:
    speed = GpuSpeed(bandwidth=math.inf, all_reduce_s=1.0, transfer_s=1000.0)
    assert estimate(plan_70b(1, 1), speed) == 0
    assert estimate(plan_70b(1, 4), speed) == 3000
    assert estimate(plan_70b(8, 1), speed) == 2 * 80 + 2
    assert estimate(plan_70b(4, 2), speed) == 2 * 80 + 2 + 1000


def test_70b_on_8_gpus_is_8_way_tensor_parallel(llama_70b: ModelSpec, plan_70b: Planner) -> None:
    candidates = candidates_for(8, llama_70b, plan_70b)
    assert len(candidates) == 20
    chosen = choose(candidates)
    assert chosen is not None
    assert (chosen.tp_size, chosen.pp_size, chosen.fit.fits) == (8, 1, True)
    floor_s = 141.1e9 / 8 / H200.bandwidth
    assert floor_s < chosen.step_s < 2 * floor_s
    assert chosen is ranked(candidates)[0]
    assert {c.fit.fits for c in candidates if c.num_ranks < 3} == {False}


def test_slow_links_make_a_pipeline_the_better_choice(
    llama_70b: ModelSpec, plan_70b: Planner
) -> None:
    """With 1 ms for an all-reduce, 3 stages are the fewest that fit."""
    pcie = GpuSpeed(bandwidth=4.3e12, all_reduce_s=1e-3, transfer_s=10e-6)
    candidates = [assess(plan_70b(*p), GPU_80_GB, pcie) for p in sizes(llama_70b.layout, 4)]
    chosen = choose(candidates)
    assert chosen is not None
    assert (chosen.tp_size, chosen.pp_size) == (1, 3)


def test_where_nothing_fits_the_closest_needs_the_least(
    llama_70b: ModelSpec, plan_70b: Planner
) -> None:
    candidates = candidates_for(2, llama_70b, plan_70b)
    assert choose(candidates) is None
    best = closest(candidates)
    assert (best.tp_size, best.pp_size) == (2, 1)
    assert best.fit.fullest.needed_bytes == min(c.fit.fullest.needed_bytes for c in candidates)


def test_ties_within_one_percent_go_to_fewer_ranks(plan_70b: Planner) -> None:
    def candidate(tp_size: int, pp_size: int, step_s: float) -> Candidate:
        return Candidate(fit_of(plan_70b(tp_size, pp_size), GPU_80_GB), step_s)

    eight, four, three = candidate(8, 1, 1.0), candidate(4, 1, 1.009), candidate(3, 1, 1.011)
    too_small = candidate(1, 1, 0.5)
    assert choose([eight, four, three, too_small]) is four
    assert choose([eight, three, too_small]) is eight
    assert choose([too_small]) is None
