"""Numbers in a benchmark's text."""

import pytest

from runner.cli.bench_text import number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (15070.4, "15,070"),
        (743.2, "743"),
        (41.26, "41.3"),
        (3.484, "3.48"),
        (0.1236, "0.124"),
        (0.01236, "0.0124"),
        (0.00069, "0.00069"),
        (0.0, "0"),
    ],
)
def test_three_digits_and_all_before_the_point(value: float, text: str) -> None:
    assert number(value) == text
