"""Percentiles, and the rule that ends a measurement."""

import pytest

from runner.bench.stats import Summary, is_stable, summarize


def test_percentiles_are_interpolated() -> None:
    assert summarize([4.0, 1.0, 3.0, 2.0, 5.0]) == Summary(
        5, 1.0, 3.0, 3.0, pytest.approx(4.6), pytest.approx(4.8), pytest.approx(4.96), 5.0
    )
    assert summarize([1.0, 1.0, 7.0]).mean == 3.0
    assert summarize([7.0]) == Summary(1, *[7.0] * 7)


@pytest.mark.parametrize(
    ("values", "stable"),
    [
        ([], False),
        ([1.0, 1.0], False),
        ([1.0, 1.0, 1.0], True),
        ([100.0, 101.0, 102.0], True),
        ([100.0, 101.0, 103.0], False),
        ([50.0, 100.0, 101.0, 102.0], True),
        ([100.0, 100.0, 100.0, 50.0], False),
    ],
)
def test_three_in_a_row_within_two_percent(values: list[float], stable: bool) -> None:
    assert is_stable(values) is stable
