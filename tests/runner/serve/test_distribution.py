"""Our histogram says what the client library's says of the same values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from runner.serve.distribution import Distribution

BOUNDS = (0.5, 1, 2, 10)


@given(st.lists(st.one_of(st.floats(0, 20), st.sampled_from(BOUNDS))))
def test_it_equals_the_librarys(values: list[float]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    distribution = Distribution("waits_seconds", "Of something.", BOUNDS)
    ours.register(distribution)
    histogram = Histogram("waits_seconds", "Of something.", buckets=BOUNDS, registry=theirs)
    for value in values:
        distribution.observe(value)
        histogram.observe(value)
    told = [
        line for line in generate_latest(theirs).decode().splitlines() if "_created" not in line
    ]
    assert generate_latest(ours).decode().splitlines() == told


def test_two_of_one_name_are_refused() -> None:
    registry = CollectorRegistry()
    registry.register(Distribution("x_seconds", "", BOUNDS))
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(Distribution("x_seconds", "", BOUNDS))
