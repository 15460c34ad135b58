"""When two models' logits say the same."""

import math

import pytest
import torch

from runner.build.whole_parity import judge
from runner.config.schema import ParityConfig

BOUNDS = ParityConfig()
NUM_POSITIONS, VOCAB = 50, 11


def logits() -> torch.Tensor:
    return torch.randn(NUM_POSITIONS, VOCAB, generator=torch.Generator().manual_seed(3))


def test_equal_logits_agree() -> None:
    plain = logits()
    found = judge(plain.clone(), plain, torch.bfloat16, BOUNDS)
    assert (found.num_positions, found.top1, found.passed) == (NUM_POSITIONS, 1.0, True)
    assert abs(found.kl) < 1e-12


def test_two_tokens_that_the_dtype_cannot_tell_apart_count_as_the_same() -> None:
    """8.0 and 8.03125 are neighbours in bfloat16, and far apart in float32."""
    plain = torch.full((NUM_POSITIONS, VOCAB), -9.0)
    plain[:, 4], plain[:, 7] = 8.03125, 8.0
    swapped = plain.clone()
    swapped[:, 4], swapped[:, 7] = 8.0, 8.03125
    assert judge(swapped, plain, torch.bfloat16, BOUNDS).top1 == 1.0
    assert judge(swapped, plain, torch.bfloat16, BOUNDS).passed
    assert judge(swapped, plain, torch.float32, BOUNDS).top1 == 0.0
    assert not judge(swapped, plain, torch.float32, BOUNDS).passed


def test_another_likeliest_token_at_one_position_is_one_share_less() -> None:
    plain = logits()
    compiled = plain.clone()
    compiled[8, plain[8].argmin()] = plain[8].max() + 1
    found = judge(compiled, plain, torch.bfloat16, BOUNDS)
    assert found.top1 == 1 - 1 / NUM_POSITIONS
    assert not found.passed
    lenient = BOUNDS.model_copy(update={"min_top1": 0.97, "max_kl": 1.0})
    assert judge(compiled, plain, torch.bfloat16, lenient).passed


def test_distributions_may_differ_where_the_likeliest_token_does_not() -> None:
    plain = torch.zeros(2, 2)
    plain[:, 0] = math.log(3.0)  # probabilities 3/4 and 1/4
    compiled = torch.zeros(2, 2)
    compiled[:, 0] = math.log(9.0)  # 9/10 and 1/10
    found = judge(compiled, plain, torch.float32, BOUNDS)
    expected = 0.75 * math.log(0.75 / 0.9) + 0.25 * math.log(0.25 / 0.1)
    assert found.top1 == 1.0
    assert abs(found.kl - expected) < 1e-6
    assert not found.passed
    assert "top-1 agreement 1.000, KL divergence 0.0923 over 2 positions" in found.complaint()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_finite_number_fails_and_can_be_written_as_json(wrong: float) -> None:
    compiled = logits()
    compiled[5, 2] = wrong
    found = judge(compiled, logits(), torch.float32, BOUNDS)
    assert not found.passed
    assert found.kl == -1.0
