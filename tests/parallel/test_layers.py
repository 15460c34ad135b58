"""Sharded layers equal the unsharded module, with uneven shares, biases and several tokens."""

from itertools import pairwise

import parallel_jobs
import pytest
import torch
from rank_pool import RankPool
from torch import nn

from parallel.slicing import split_heads

pytestmark = pytest.mark.dist

# The last one has two groups side by side: a reduce over the whole world would show.
TOPOLOGIES = pytest.mark.parametrize("tp_sizes", [[2], [3], [4], [2, 3]], ids=str)

# 11 and 13 features divide by none of the sizes.
IN, OUT, NUM_TOKENS = 11, 13, 5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def by_stage(results: list[torch.Tensor], tp_sizes: list[int]) -> list[list[torch.Tensor]]:
    ends = [sum(tp_sizes[: i + 1]) for i in range(len(tp_sizes))]
    return [results[a:b] for a, b in pairwise([0, *ends])]


def assert_everywhere(
    results: list[torch.Tensor], tp_sizes: list[int], expected: torch.Tensor
) -> None:
    """The ranks of a group agree to the bit, and with the unsharded module as far as sums can."""
    for group in by_stage(results, tp_sizes):
        for result in group:
            assert torch.equal(result, group[0])
            torch.testing.assert_close(result, expected)


@TOPOLOGIES
@pytest.mark.parametrize("bias", [False, True])
def test_column_parallel_outputs_lie_side_by_side(
    tp_sizes: list[int], bias: bool, rank_pool: RankPool
) -> None:
    full, x = nn.Linear(IN, OUT, bias=bias), torch.randn(NUM_TOKENS, IN)
    parts = rank_pool.run(parallel_jobs.column_parallel, tp_sizes, full, x)
    for group in by_stage(parts, tp_sizes):
        assert {part.shape[1] for part in group} == {OUT // len(group), OUT // len(group) + 1}
        torch.testing.assert_close(torch.cat(group, dim=1), full(x))


@TOPOLOGIES
@pytest.mark.parametrize("bias", [False, True])
def test_row_parallel_sums_up_and_adds_its_bias_once(
    tp_sizes: list[int], bias: bool, rank_pool: RankPool
) -> None:
    """A bias added before the reduce would count tp times."""
    full, x = nn.Linear(IN, OUT, bias=bias), torch.randn(NUM_TOKENS, IN)
    results = rank_pool.run(parallel_jobs.row_parallel, tp_sizes, full, x)
    assert_everywhere(results, tp_sizes, full(x))


@TOPOLOGIES
def test_gate_and_up_merged_then_down(tp_sizes: list[int], rank_pool: RankPool) -> None:
    gate, up, down = nn.Linear(IN, OUT), nn.Linear(IN, OUT), nn.Linear(OUT, IN)
    x = torch.randn(NUM_TOKENS, IN)
    results = rank_pool.run(parallel_jobs.gated_mlp, tp_sizes, gate, up, down, x)
    expected = down(nn.functional.silu(gate(x)) * up(x))
    assert_everywhere(results, tp_sizes, expected)


@TOPOLOGIES
@pytest.mark.parametrize("num_kv_heads", [1, 3, 9])
def test_each_rank_projects_its_own_heads(
    tp_sizes: list[int], num_kv_heads: int, rank_pool: RankPool
) -> None:
    """Nine query heads of two features; KV heads are split, or replicated where they are few."""
    projections = [nn.Linear(IN, 2 * heads) for heads in (9, num_kv_heads, num_kv_heads)]
    x = torch.randn(NUM_TOKENS, IN)
    whole = [full(x).view(NUM_TOKENS, -1, 2) for full in projections]
    results = rank_pool.run(parallel_jobs.qkv, tp_sizes, projections, num_kv_heads, x)
    for group in by_stage(results, tp_sizes):
        for share, local in zip(split_heads(9, num_kv_heads, len(group)), group, strict=True):
            for heads, full, part in zip(
                (share.query, share.kv, share.kv), whole, local, strict=True
            ):
                torch.testing.assert_close(part, full[:, slice(*heads)])


@TOPOLOGIES
def test_each_token_is_embedded_by_the_rank_that_holds_it(
    tp_sizes: list[int], rank_pool: RankPool
) -> None:
    """Every id of a padded vocabulary, so the first and last row of every rank among them."""
    weight = torch.randn(OUT, IN)
    token_ids = torch.cat([torch.arange(OUT), torch.tensor([0, OUT - 1, 0])])
    results = rank_pool.run(parallel_jobs.embedding, tp_sizes, weight, token_ids)
    for result in results:
        assert torch.equal(result, weight[token_ids])


@TOPOLOGIES
@pytest.mark.parametrize("vocab_size", [OUT, 5])
def test_logits_of_a_padded_vocabulary_are_whole_everywhere(
    tp_sizes: list[int], vocab_size: int, rank_pool: RankPool
) -> None:
    """Five rows over four ranks leave the last one nothing but padding."""
    weight, x = torch.randn(vocab_size, IN), torch.randn(NUM_TOKENS, IN)
    results = rank_pool.run(parallel_jobs.lm_head, tp_sizes, weight, x)
    assert_everywhere(results, tp_sizes, nn.functional.linear(x, weight))


def test_a_row_parallel_layer_can_be_exported(rank_pool: RankPool) -> None:
    """The reduce is a node of the graph, after the matrix product."""
    args = (nn.Linear(IN, OUT), torch.randn(NUM_TOKENS, IN))
    for ops in rank_pool.run(parallel_jobs.row_parallel_ops, [2], *args):
        assert ops == [
            "aten.linear.default",
            "_c10d_functional.all_reduce.default",
            "_c10d_functional.wait_tensor.default",
        ]
