"""nn.MultiheadAttention by heads, alone and in torch's own transformer layers."""

from typing import Any

import apply_jobs
import pytest
import torch
from apply_jobs import ENCODER_PLAN, Call, assert_divides, call, groups
from rank_pool import RankPool
from torch import nn

from parallel.apply import apply
from parallel.errors import ConfigError

pytestmark = pytest.mark.dist

# The last one has two groups side by side: a collective over the whole world would show.
TOPOLOGIES = pytest.mark.parametrize("tp_sizes", [[2], [3], [2, 3]], ids=str)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# Three features a head, in heads that no degree divides.
HEADS, SIZE, QUERIES, KEYS, BATCH = 5, 15, 4, 6, 2


def make_attention(**options: Any) -> nn.MultiheadAttention:
    options = {"batch_first": True} | options
    attention = nn.MultiheadAttention(SIZE, HEADS, **options)
    for name, parameter in attention.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)  # zero by default, which would hide a wrong slice
    return attention


def inputs() -> tuple[torch.Tensor, ...]:
    lengths = (QUERIES, KEYS, KEYS)
    return tuple(torch.randn(BATCH, length, SIZE) for length in lengths)


def check(pool: RankPool, tp_sizes: list[int], *calls: Call) -> None:
    """With attention weights by head, averaged and without, which are three ways to compute."""
    assert_divides(
        pool,
        tp_sizes,
        *(
            (module, plan, args, kwargs | wanted)
            for module, plan, args, kwargs in calls
            for wanted in (
                {"need_weights": False},
                {"need_weights": True},
                {"need_weights": True, "average_attn_weights": False},
            )
        ),
    )


@TOPOLOGIES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_self_and_cross(
    tp_sizes: list[int], bias: bool, batch_first: bool, rank_pool: RankPool
) -> None:
    attention = make_attention(bias=bias, batch_first=batch_first)
    query, key, value = inputs()
    unbatched = [x[0] for x in (query, key, value)]
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    plan = {"": "heads"}
    check(
        rank_pool,
        tp_sizes,
        call(attention, plan, query, query, query),
        call(attention, plan, query, key, value),
        call(attention, plan, query, key, key),
        call(attention, plan, *unbatched),
    )


@TOPOLOGIES
def test_masks(tp_sizes: list[int], rank_pool: RankPool) -> None:
    """Bool and added ones, of all heads or of each, of padded keys, and both together."""
    attention, args = make_attention(), inputs()
    causal = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1)
    of_heads = torch.randn(BATCH * HEADS, QUERIES, KEYS)
    padding = torch.arange(KEYS) >= torch.tensor([[KEYS], [KEYS - 2]])
    added = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)
    masks: list[dict[str, torch.Tensor]] = [
        {"attn_mask": causal},
        {"attn_mask": torch.randn(QUERIES, KEYS)},
        {"attn_mask": of_heads},
        {"attn_mask": (of_heads > 1)},
        {"key_padding_mask": padding},
        {"key_padding_mask": added, "attn_mask": of_heads},
        {"key_padding_mask": padding, "attn_mask": causal},
    ]
    calls = [call(attention, {"": "heads"}, *args, **mask) for mask in masks]
    query, key, value = (x[0] for x in args)
    unbatched: dict[str, Any] = {
        "key_padding_mask": padding[1],
        "attn_mask": of_heads[:HEADS] > 1,
    }
    calls.append(call(attention, {"": "heads"}, query, key, value, **unbatched))
    check(rank_pool, tp_sizes, *calls)


@TOPOLOGIES
@pytest.mark.parametrize("bias", [False, True])
def test_keys_and_values_of_other_sizes(
    tp_sizes: list[int], bias: bool, rank_pool: RankPool
) -> None:
    attention = make_attention(kdim=4, vdim=7, bias=bias)
    query, key, value = inputs()
    args = (query, key[..., :4], value[..., :7])
    check(rank_pool, tp_sizes, call(attention, {"": "heads"}, *args))


def test_the_causal_hint(rank_pool: RankPool) -> None:
    attention, (x, *_) = make_attention(), inputs()
    mask = nn.Transformer.generate_square_subsequent_mask(QUERIES)
    hinted = call(attention, {"": "heads"}, x, x, x, attn_mask=mask, is_causal=True)
    check(rank_pool, [2], hinted)
    twin = apply(attention, {"": "heads"}, groups(2)[0]).module
    with pytest.raises(ConfigError, match="is_causal=True needs attn_mask"):
        twin(x, x, x, is_causal=True)


PLANS = pytest.mark.parametrize(
    "names",
    [list(ENCODER_PLAN), ["layers.*.self_attn"], ["layers.*.linear1", "layers.*.linear2"]],
    ids=["both", "attention", "mlp"],
)


@PLANS
@pytest.mark.parametrize("batch_first", [False, True])
@TOPOLOGIES
def test_an_encoder(
    tp_sizes: list[int], batch_first: bool, names: list[str], rank_pool: RankPool
) -> None:
    model, x = apply_jobs.encoder(4, batch_first=batch_first), torch.randn(3, 5, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(5 if batch_first else 3)
    plan = {name: ENCODER_PLAN[name] for name in names}
    calls = [call(model, plan, x), call(model, plan, x, mask=mask, is_causal=True)]
    assert_divides(rank_pool, tp_sizes, *calls)


@PLANS
@pytest.mark.parametrize("first", [0, 1])
def test_padding(names: list[str], first: int, rank_pool: RankPool) -> None:
    """Torch's encoder nests its padded input and so returns zeros for padding; ours does not,
    also where its first layer is left alone.
    """
    model, x = apply_jobs.encoder(4), torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [1]])
    plan = {name.replace("*", f"{{{first}..1}}"): ENCODER_PLAN[name] for name in names}
    kwargs = {"src_key_padding_mask": padding}
    results = rank_pool.run(apply_jobs.divided_calls, [3], [call(model, plan, x, **kwargs)])
    with torch.no_grad():
        expected = model(x, **kwargs)
    for (result,) in results:
        torch.testing.assert_close(result[~padding], expected[~padding])


@TOPOLOGIES
def test_a_decoder(tp_sizes: list[int], rank_pool: RankPool) -> None:
    layer = nn.TransformerDecoderLayer(8, 4, dim_feedforward=11, batch_first=True)
    model = nn.TransformerDecoder(layer, 2)
    plan = ENCODER_PLAN | {"layers.*.multihead_attn": "heads"}
    x, memory = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    causal = call(model, plan, x, memory, tgt_mask=mask, tgt_is_causal=True)
    assert_divides(rank_pool, tp_sizes, causal)
