"""How far off a layer's contribution is, and how much of that its residual stream explains."""

import math

import torch

from runner.build.parity import errors_of

WANTED = torch.tensor([[3.0, -4.0, 0.0, 0.0]], dtype=torch.float64)  # a root mean square of 2.5
NONE = torch.zeros_like(WANTED)


def test_the_largest_error_counts_in_units_of_what_is_wanted() -> None:
    found = WANTED + torch.tensor([[0.0, 0.25, -0.5, 0.0]])
    assert errors_of(found, WANTED, rounding=NONE) == (0.2, 0.2)


def test_rounding_of_a_large_state_excuses_that_element_alone() -> None:
    found = WANTED + torch.tensor([[0.0, 0.25, -0.5, 0.0]])
    at_the_largest = torch.tensor([[0.0, 0.0, 0.5, 0.0]])
    assert errors_of(found, WANTED, rounding=at_the_largest) == (0.2, 0.1)
    elsewhere = torch.tensor([[100.0, 0.0, 0.0, 0.0]])
    assert errors_of(found, WANTED, rounding=elsewhere) == (0.2, 0.2)


def test_what_is_not_a_number_stays_none_and_is_within_no_bound() -> None:
    found = WANTED.clone()
    found[0, 3] = float("nan")
    error, beyond = errors_of(found, WANTED, rounding=NONE + 10)
    assert math.isnan(error)
    assert not beyond <= 1e9
