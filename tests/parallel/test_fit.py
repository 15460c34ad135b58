"""Whether a plan fits: the boundary to the byte, whole KV blocks, and the words of a refusal."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from parallel.decoder_plan import DecoderPlan
from parallel.fit import Budget, Fit, fit_of, format_bytes
from parallel.planner import Limits, make_plan
from parallel.topology import Topology
from runner.models.spec import ModelSpec

LENGTH = 100


@pytest.fixture(scope="module")
def spec(checkpoint: Callable[[str], Path]) -> ModelSpec:
    return ModelSpec.open(checkpoint("llama"))


def plan(
    spec: ModelSpec, tp_sizes: list[int], *, stages: list[list[str]] | None = None
) -> DecoderPlan:
    return make_plan(
        spec.layout,
        spec.checkpoint,
        Topology.of(tp_sizes),
        architecture="LlamaForCausalLM",
        dtype="float32",
        limits=Limits(max_model_len=LENGTH, max_num_seqs=4, max_num_batched_tokens=64),
        stages=stages,
    )


def judge(plan: DecoderPlan, memory_bytes: int, *, block_size: int = 16) -> Fit:
    return fit_of(plan, Budget(memory_bytes, utilization=1.0, block_size=block_size))


def needs(plan: DecoderPlan, rank: int, *, tokens: int) -> int:
    here = plan.ranks[rank]
    return here.weight_bytes + here.activation_bytes + tokens * here.kv_bytes_per_token


def test_fits_to_the_byte_with_a_sequence_in_whole_blocks(spec: ModelSpec) -> None:
    made = plan(spec, [1])
    enough = needs(made, 0, tokens=112)  # 100 tokens take 7 blocks of 16
    exact = judge(made, enough)
    assert exact.fits
    assert (exact.kv_tokens, exact.num_sequences) == (112, 1)
    assert exact.fullest.needed_bytes == enough
    short = judge(made, enough - 1)
    assert not short.fits
    assert (short.kv_tokens, short.num_sequences) == (96, 0)


def test_the_fullest_rank_decides(spec: ModelSpec) -> None:
    """With 3 KV heads over 2 ranks, rank 0 holds two of them."""
    made = plan(spec, [2])
    needed = [needs(made, rank, tokens=112) for rank in (0, 1)]
    assert needed[0] > needed[1]
    fit = judge(made, needed[1])
    assert [rank.fits for rank in fit.ranks] == [False, True]
    assert not fit.fits
    assert fit.fullest.rank == 0
    roomy = judge(made, 2 * needed[0])
    assert roomy.kv_tokens == min(rank.kv_tokens or 0 for rank in roomy.ranks)


def test_a_rank_without_layers_has_no_kv_cache(spec: ModelSpec) -> None:
    stages = [["model.embed_tokens", "model.layers.*"], ["model.norm", "lm_head"]]
    made = plan(spec, [1, 1], stages=stages)
    fit = judge(made, needs(made, 0, tokens=1600))
    assert (fit.ranks[1].kv_tokens, fit.ranks[1].num_sequences) == (None, None)
    assert fit.kv_tokens == 1600
    assert fit.num_sequences == 14, "100 blocks, 7 a sequence"


def test_weights_that_do_not_fit_leave_a_negative_room_and_no_tokens(spec: ModelSpec) -> None:
    fit = judge(plan(spec, [1]), 1000)
    assert fit.ranks[0].kv_room_bytes < 0
    assert (fit.kv_tokens, fit.num_sequences, fit.fits) == (0, 0, False)


def test_utilization_takes_its_share_off(spec: ModelSpec) -> None:
    made = plan(spec, [1])
    enough = needs(made, 0, tokens=112)
    budget = Budget(2 * enough, utilization=0.5, block_size=16)
    assert fit_of(made, budget).fits
    assert not fit_of(made, replace(budget, utilization=0.49)).fits


def test_a_shortage_names_rank_need_room_and_remedies(spec: ModelSpec) -> None:
    made = plan(spec, [2])
    fit = fit_of(made, Budget(200_000, utilization=0.5, block_size=16))
    message = fit.shortage()
    assert message.startswith("rank 0 (stage 0, tp rank 0) needs ")
    assert format_bytes(needs(made, 0, tokens=112)) in message
    assert "100.0 kB may be used (0.5 of 200.0 kB)" in message
    for remedy in ("more ranks", "bfloat16", "model.max_model_len", "max_num_batched_tokens"):
        assert remedy in message
    halved = replace(fit, plan=replace(made, dtype="bfloat16"))
    assert "dtype" not in halved.shortage(), "there is no smaller one to change to"


def test_to_dict_is_plain_json(spec: ModelSpec) -> None:
    values = json.loads(json.dumps(judge(plan(spec, [2]), 10**9).to_dict()))
    assert values["fits"] is True
    assert [rank["rank"] for rank in values["ranks"]] == [0, 1]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(999, "999 B"), (1000, "1.0 kB"), (538_060_032, "538.1 MB"), (141_107_412_992, "141.11 GB")],
)
def test_bytes_are_decimal(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text
