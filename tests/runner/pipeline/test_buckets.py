"""Shapes choose among the plan's buckets, and a batch takes the smallest that holds it."""

import pytest
from graph_jobs import CASES, make_job

from parallel.errors import ConfigError
from runner.pipeline.buckets import Buckets


def test_a_batch_takes_the_smallest_bucket_of_its_shapes() -> None:
    job = make_job(CASES["unet"], [1], compile={"buckets": [1, 2, 4]})
    buckets, plan = Buckets.of(job.plan), job.plan
    small, large = ((2, 8, 16),), ((2, 16, 16),)
    assert set(buckets.by_shapes) == {small, large}
    for shapes, height in ((small, 8), (large, 16)):
        assert buckets.largest(shapes) == 4
        for num_samples, size in ((1, 1), (2, 2), (3, 4), (4, 4)):
            (chosen,) = plan.buckets[buckets.choose(shapes, num_samples)]
            assert chosen.shape == (size, 2, height, 16)


def test_without_a_batch_dim_each_shape_is_a_bucket() -> None:
    job = make_job(CASES["no batch"], [1])
    buckets = Buckets.of(job.plan)
    assert [buckets.choose(((rows, 8),), 1) for rows in (3, 5)] == [0, 1]
    assert buckets.largest(((3, 8),)) == 1


def test_shapes_in_no_bucket_are_refused_with_those_that_are() -> None:
    buckets = Buckets.of(make_job(CASES["unet"], [1]).plan)
    buckets.check(((2, 8, 16),))
    with pytest.raises(ConfigError, match=r"\[2, 9, 16\] are in no bucket.*\[2, 8, 16\]; \[2, 16"):
        buckets.check(((2, 9, 16),))
