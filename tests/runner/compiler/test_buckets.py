"""The numbers of rows that a model is compiled for."""

import pytest

from parallel.errors import ConfigError
from runner.compiler.buckets import buckets_of


@pytest.mark.parametrize(
    ("largest", "buckets"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (20, (1, 2, 4, 8, 16, 20)),
    ],
)
def test_powers_of_two_and_the_largest_step(largest: int, buckets: tuple[int, ...]) -> None:
    assert buckets_of(None, largest) == buckets


def test_those_that_are_given() -> None:
    assert buckets_of([1, 6, 20], 20) == (1, 6, 20)


@pytest.mark.parametrize("given", [[1, 6], [1, 32]])
def test_the_last_one_must_be_the_largest_step(given: list[int]) -> None:
    message = rf"compile.buckets ends with {given[-1]}, .*max_num_batched_tokens=20"
    with pytest.raises(ConfigError, match=message):
        buckets_of(given, 20)
