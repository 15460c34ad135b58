"""The verdict on one output, at its bounds and beyond them."""

import pytest
import torch

from runner.build.graph_parity import GraphParity, OutputParity, _judge_one
from runner.config.schema import ParityConfig

BOUNDS = ParityConfig()
EXACT = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def judge(compiled: torch.Tensor, *, eager: torch.Tensor, exact: torch.Tensor) -> OutputParity:
    return _judge_one("y", "x[4]", (compiled, eager, exact), BOUNDS)


def with_error(size: float) -> torch.Tensor:
    """One element is off by so much; the root mean square is about 1."""
    changed = EXACT.clone()
    changed[1, 2] += size * EXACT.pow(2).mean().sqrt()
    return changed.float()


@pytest.mark.parametrize(
    ("error", "eager_error", "passed"),
    [
        (3.9e-3, 1e-3, True),
        (4.1e-3, 1e-3, False),
        (4.9e-4, 0.0, True),
        (5.1e-4, 0.0, False),
        (float("nan"), 1e-3, False),
        (float("inf"), 1e-3, False),
        (1e-3, float("nan"), False),
    ],
)
def test_an_error_may_be_a_multiple_of_that_of_eager(
    error: float, eager_error: float, passed: bool
) -> None:
    found = judge(with_error(error), eager=with_error(eager_error), exact=EXACT)
    assert found.passed is passed
    assert found.error == (pytest.approx(error, rel=0.1) if abs(error) < 1 else -1.0)


def test_a_wrong_direction_fails_however_wrong_eager_is() -> None:
    worse = EXACT + 0.3 * EXACT.flip(0)
    assert not judge(worse.float(), eager=worse.float(), exact=EXACT).passed


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -float("inf")])
def test_zeros_and_what_is_no_number_are_equal_to_themselves_alone(value: float) -> None:
    exact = EXACT.clone()
    exact[0] = value
    same = exact.float()
    assert judge(same, eager=same, exact=exact).passed
    changed = same.clone()
    changed[0, 0] = 1.0
    assert not judge(changed, eager=same, exact=exact).passed
    everywhere = torch.full_like(EXACT, value)
    found = judge(everywhere.float(), eager=everywhere.float(), exact=everywhere)
    assert (found.passed, found.error, found.cosine) == (True, 0.0, 1.0)


@pytest.mark.parametrize(
    ("num_other", "eager_other", "passed"),
    [(2, 0, True), (3, 0, False), (3, 3, True), (4, 3, False)],
)
def test_labels_may_differ_where_rounding_decides(
    num_other: int, eager_other: int, passed: bool
) -> None:
    """200 labels, of which one in a hundred may differ, or as many as rounding changed in eager."""
    exact = torch.zeros(200, dtype=torch.int64)
    eager = exact.clone()
    eager[:eager_other] = 1
    compiled = eager.clone()
    compiled[-num_other:] = 2
    found = judge(compiled, eager=eager, exact=exact)
    assert found.passed is passed
    assert found.error == pytest.approx(num_other / 200)


def test_an_output_without_elements_is_right() -> None:
    nothing = torch.zeros(0, 4)
    assert judge(nothing, eager=nothing, exact=nothing.double()).passed


def test_the_line_names_the_worst_output_or_what_failed() -> None:
    right = [OutputParity(n, "x[1]", 0.0, 0.0, c, True) for n, c in (("a", 1.0), ("b", 0.9995))]
    line = GraphParity(True, "", tuple(right)).line()
    assert line == "parity: passed; smallest cosine 0.999500 (b at x[1]), 2 comparisons"
    assert GraphParity(False, "a is wrong", tuple(right)).line() == "parity: FAILED: a is wrong"
