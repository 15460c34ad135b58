"""Drop-ins compute what the layers do whose place they take, at degrees that divide nothing."""

import apply_jobs
import pytest
import torch
from apply_jobs import MLP_PLAN, Mlp, assert_divides, call, groups
from rank_pool import RankPool
from torch import nn

from parallel.apply import apply
from parallel.errors import ConfigError

# The last one has two groups side by side: a collective over the whole world would show.
TOPOLOGIES = pytest.mark.parametrize("tp_sizes", [[2], [3], [2, 3]], ids=str)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.dist
@TOPOLOGIES
@pytest.mark.parametrize("bias", [False, True])
def test_colwise_then_rowwise(tp_sizes: list[int], bias: bool, rank_pool: RankPool) -> None:
    """A bias added before the reduce would count tp times."""
    mlp = Mlp(11, 13, bias=bias)
    shapes = [(11,), (5, 11), (2, 5, 11), (2, 3, 4, 11)]
    calls = [call(mlp, MLP_PLAN, torch.randn(shape)) for shape in shapes]
    assert_divides(rank_pool, tp_sizes, *calls)


@pytest.mark.dist
@TOPOLOGIES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("up", "down"),
    [
        ("colwise_gather_output", "rowwise_split_input"),
        ("colwise_rep", "rowwise_rep"),
        ("replicate", "rowwise_split_input"),
        ("colwise_gather_output", "replicate"),
    ],
)
def test_outputs_gathered_and_inputs_split(
    tp_sizes: list[int], bias: bool, up: str, down: str, rank_pool: RankPool
) -> None:
    mlp = Mlp(11, 13, bias=bias)
    shapes = [(11,), (5, 11), (2, 5, 11), (2, 3, 4, 11)]
    calls = [call(mlp, {"up": up, "down": down}, torch.randn(shape)) for shape in shapes]
    assert_divides(rank_pool, tp_sizes, *calls)


@pytest.mark.dist
def test_inputs_need_not_be_contiguous(rank_pool: RankPool) -> None:
    plan = {"": "colwise_gather_output"}
    x = torch.randn(6, 4, 3).permute(2, 1, 0)
    assert_divides(rank_pool, [3], call(nn.Linear(6, 7, bias=False), plan, x))


@pytest.mark.dist
@TOPOLOGIES
def test_colwise_leaves_its_output_split(tp_sizes: list[int], rank_pool: RankPool) -> None:
    linear, x = nn.Linear(5, 7), torch.randn(2, 4, 5)
    parts = rank_pool.run(apply_jobs.divided, tp_sizes, linear, {"": "colwise"}, x)
    for size in tp_sizes:
        local, parts = parts[:size], parts[size:]
        assert {part.shape[-1] for part in local} == {7 // size, 7 // size + 1}
        torch.testing.assert_close(torch.cat(local, dim=-1), linear(x))


@pytest.mark.dist
@TOPOLOGIES
@pytest.mark.parametrize("style", ["embedding_rowwise", "embedding_colwise"])
def test_embeddings(tp_sizes: list[int], style: str, rank_pool: RankPool) -> None:
    """Every id, so the first and the last row of every rank among them."""
    embedding = nn.Embedding(11, 7, padding_idx=3)
    ids = torch.arange(11)
    inputs = [ids, ids.int().flip(0).view(1, 11), torch.cat([ids, ids[:1]]).view(2, 3, 2)]
    calls = [call(embedding, {"": style}, x) for x in inputs]
    assert_divides(rank_pool, tp_sizes, *calls)


@pytest.mark.dist
@TOPOLOGIES
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(tp_sizes: list[int], dtype: torch.dtype, rank_pool: RankPool) -> None:
    """In small whole numbers every sum is exact in every dtype."""

    def whole_numbers(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape).to(dtype)

    layers = {style: nn.Linear(7, 5) for style in ("colwise_rep", "rowwise_rep")}
    for layer in layers.values():
        for parameter in layer.parameters():
            parameter.data = whole_numbers(*parameter.shape)
    attention = nn.MultiheadAttention(10, 5, batch_first=True, dtype=dtype)
    x = torch.ones(2, 1, 10, dtype=dtype)
    attention.in_proj_weight.data = whole_numbers(30, 10)
    attention.out_proj.weight.data = whole_numbers(10, 10) / 8
    assert_divides(
        rank_pool,
        tp_sizes,
        *[call(m, {"": style}, whole_numbers(2, 3, 7)) for style, m in layers.items()],
        call(nn.Embedding(9, 5, dtype=dtype), {"": "embedding_rowwise"}, torch.arange(9)),
        call(nn.Embedding(9, 5, dtype=dtype), {"": "embedding_colwise"}, torch.arange(9)),
        call(attention, {"": "heads"}, x, x, x),
    )


@pytest.mark.parametrize(
    ("module", "style", "parts"),
    [
        (nn.Linear(9, 3), "colwise", "3 output features"),
        (nn.Linear(3, 9), "rowwise", "3 input features"),
        (nn.Embedding(3, 9), "embedding_rowwise", "3 rows"),
        (nn.Embedding(9, 3), "embedding_colwise", "3 columns"),
        (nn.MultiheadAttention(12, 3), "heads", "3 heads"),
    ],
)
def test_more_ranks_than_parts(module: nn.Module, style: str, parts: str) -> None:
    """As many ranks as parts are fine."""
    model = nn.Sequential(module)
    apply(model, {"0": style}, groups(3)[2])
    with pytest.raises(ConfigError, match=f"size=4 exceeds the {parts} of 0; use 1 to 3"):
        apply(model, {"0": style}, groups(4)[0])


@pytest.mark.parametrize(
    ("down", "message"),
    [
        ("rowwise", "down reads 3 of 5 .* was given 5; make what feeds it colwise, or make it"),
        ("rowwise_split_input", "down reads 5 of 5 .* was given 3; .* colwise_gather_output"),
    ],
)
def test_an_input_of_another_width(down: str, message: str) -> None:
    up = "colwise_gather_output" if down == "rowwise" else "colwise"
    plan = {"down": down} | ({"up": up} if up == "colwise" else {})
    twin = apply(Mlp(4, 5), plan, groups(2)[0]).module
    with pytest.raises(ConfigError, match=message):
        twin(torch.randn(2, 4))


@pytest.mark.parametrize(("rank", "token"), [(0, -1), (2, 11)])
def test_an_id_out_of_range(rank: int, token: int) -> None:
    """It fails as it does in the whole embedding, rather than be a zero."""
    twin = apply(nn.Embedding(11, 4), {"": "embedding_rowwise"}, groups(3)[rank]).module
    with pytest.raises(IndexError):
        twin(torch.tensor([token]))
