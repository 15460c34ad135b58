"""Random parameters have the plan's shapes, and are what a rank can compute with."""

import pytest
import torch

from parallel.decoder_plan import DecoderRankPlan
from parallel.plan import LocalTensor, Piece
from parallel.random_weights import random_weights
from parallel.slicing import HeadShare

CPU = torch.device("cpu")
MATRIX = LocalTensor("layers.0.up.weight", (40, 30), 0, (Piece("up", 0, (0, 40)),))
NORM = LocalTensor("norm.weight", (30,), 0, (Piece("norm"),))
WHOLE_BIAS = LocalTensor("layers.0.down.bias", (30,), 0, (Piece("bias"),))
SPLIT_BIAS = LocalTensor("layers.0.up.bias", (40,), 0, (Piece("up_bias", 0, (0, 40)),))
PADDED = LocalTensor("lm_head.weight", (8, 30), 0, (Piece("head", 0, (8, 13)),))
EMPTY = LocalTensor("embed_tokens.weight", (8, 30), 0, ())
TENSORS = (MATRIX, NORM, WHOLE_BIAS, SPLIT_BIAS, PADDED, EMPTY)


def draw(tp_rank: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    heads = HeadShare((0, 1), (0, 1), (0,))
    plan = DecoderRankPlan(tp_rank, 0, tp_rank, tp_rank, TENSORS, 0, 0, heads, (0, 1), (0, 1), 0)
    return dict(random_weights(plan, dtype=dtype, device=CPU))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_parameter_has_its_shape_and_dtype(dtype: torch.dtype) -> None:
    drawn = draw(dtype=dtype)
    assert {name: tuple(values.shape) for name, values in drawn.items()} == {
        tensor.name: tensor.shape for tensor in TENSORS
    }
    assert {values.dtype for values in drawn.values()} == {dtype}


def test_matrices_are_small_and_random_and_norms_are_one() -> None:
    drawn = draw()
    assert drawn[MATRIX.name].std().item() == pytest.approx(0.02, rel=0.1)
    assert abs(drawn[MATRIX.name].mean().item()) < 0.002
    assert len(drawn[MATRIX.name].unique()) > 1000
    assert 0 < drawn[WHOLE_BIAS.name].abs().max() < 0.1
    assert drawn[NORM.name].eq(1).all()


def test_padding_is_zero() -> None:
    drawn = draw()
    assert drawn[PADDED.name][:5].ne(0).all()
    assert drawn[PADDED.name][5:].eq(0).all()
    assert drawn[EMPTY.name].eq(0).all()


def test_equal_calls_yield_equal_numbers() -> None:
    first, second = draw(), draw()
    assert all(torch.equal(values, second[name]) for name, values in first.items())


def test_ranks_share_what_is_whole_and_differ_in_what_is_split() -> None:
    first, second = draw(0), draw(1)
    shared = [name for name, values in first.items() if torch.equal(values, second[name])]
    assert shared == [NORM.name, WHOLE_BIAS.name, EMPTY.name]
