"""Whatever the model and the cut, the ranks return what the undivided model returns."""

from dataclasses import replace
from statistics import median
from typing import Any

import graph_jobs
import pytest
import torch
from graph_jobs import CASES, Case, expected_of, make_job, make_samples
from rank_pool import RankPool

from parallel.errors import RankLostError
from runner.pipeline.batching_policy import BatchingPolicy
from runner.pipeline.rank import PipelineReport

pytestmark = pytest.mark.dist

FULL = pytest.mark.full

CUTS = [
    *(pytest.param("unet", [1] * size) for size in (1, 2, 3, 4)),
    pytest.param("branches", [1]),
    pytest.param("branches", [1, 1, 1]),
    pytest.param("no batch", [1, 1]),
    pytest.param("vision", [1, 1]),
    pytest.param("text", [1, 1, 1]),
    pytest.param("vision", [2]),
    pytest.param("vision", [2, 2]),
    pytest.param("vision", [2, 1]),
    pytest.param("text", [2]),
    pytest.param("text", [1, 2]),
    pytest.param("no batch", [3]),
    *(
        pytest.param(name, tp_sizes, marks=FULL)
        for name in ("vision", "text", "no batch")
        for tp_sizes in ([1, 1, 1, 1], [3], [2, 2], [2, 1], [1, 2], [3, 2])
    ),
]

MIXED = [(0, 4), (1, 3), (0, 1), (1, 4), (1, 1), (0, 3), (0, 2), (1, 2)]
"""Shapes in turn, in full and ragged batches; more batches than there are slots and stages."""


def assert_streams(
    pool: RankPool,
    case: Case,
    tp_sizes: list[int],
    sections: dict[str, dict[str, Any]] | None = None,
) -> None:
    """A stream of batches of several sizes and, where the case has them, shapes."""
    job = make_job(case, [1])
    counts = MIXED if case.dims else [(0, count) for _, count in MIXED]
    if not job.plan.is_batched:
        counts = [(kind, 1) for kind, _ in counts]
    batches = make_samples(job, counts)
    reply = pool.run(graph_jobs.stream, tp_sizes, case, batches, sections)[0]
    assert reply is not None
    found, report = reply
    assert report.num_batches == len(batches)
    assert len(report.busy_s) == sum(tp_sizes)
    assert all(0 < busy <= report.seconds for busy in report.busy_s)
    assert 0 <= report.bubble < 1
    for batch, outputs in zip(batches, found, strict=True):
        assert_equal(outputs, expected_of(case.module, job, batch))


def assert_equal(found: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> None:
    assert len(found) == len(expected)
    for got, wanted in zip(found, expected, strict=True):
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted, strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            error = (a.double() - b.double()).abs().max()
            assert error <= 1e-4 * b.double().abs().max()


@pytest.mark.parametrize(("name", "tp_sizes"), CUTS, ids=str)
def test_a_divided_model_returns_what_the_model_returns(
    name: str, tp_sizes: list[int], rank_pool: RankPool
) -> None:
    assert_streams(rank_pool, CASES[name], tp_sizes)


def test_a_batch_runs_in_the_smallest_bucket_that_holds_it(rank_pool: RankPool) -> None:
    sections = {"compile": {"buckets": None}}
    assert_streams(rank_pool, CASES["branches"], [1, 1], sections)


def test_batches_that_are_on_their_way_are_answered_in_order(rank_pool: RankPool) -> None:
    answered = rank_pool.run(graph_jobs.order_of_answers, [1, 1, 1], CASES["unet"], 24)[0]
    assert answered == list(range(24))


def test_an_idle_pipeline_stays_alive(rank_pool: RankPool) -> None:
    """A transfer may take 5 s, and for 8 s there is nothing to transfer."""
    tp_sizes = [1] * rank_pool.size
    before, after = rank_pool.run(graph_jobs.idle, tp_sizes, CASES["chain"], 8.0, 5.0)[0]
    assert torch.equal(before, after)


@pytest.mark.parametrize("tp_sizes", [[1], [1, 1], [2, 2]], ids=str)
def test_a_pipeline_that_nobody_asks_ends(tp_sizes: list[int], rank_pool: RankPool) -> None:
    assert rank_pool.run(graph_jobs.leave_at_once, tp_sizes, CASES["no batch"])[0] == 0


@pytest.mark.parametrize("tp_sizes", [[1, 1], [2, 2]], ids=str)
def test_what_rank_0_raises_beside_the_pipeline_ends_all_ranks(
    tp_sizes: list[int], rank_pool: RankPool
) -> None:
    ends = rank_pool.run(graph_jobs.raise_in_use, tp_sizes, CASES["no batch"])
    assert ends == ["'mine'", *["ended"] * (len(ends) - 1)]


def test_a_batch_that_raises_fails_alone_on_one_cpu_rank() -> None:
    answers = graph_jobs.one_bad_batch(CASES["fails"], bad=1)
    assert answers == ["NoneType", "IndexError", "NoneType", "NoneType"]


def test_nobody_waits_on_when_the_pipeline_breaks_and_it_takes_nothing_more() -> None:
    pipeline, answers = graph_jobs.interrupt(CASES["fails"], at=1)
    # The first batch was good; whether its result was back in time is nobody's promise.
    assert answers[0] in {"NoneType", "RankLostError"}
    assert answers[1:] == ["RankLostError"] * 3
    with pytest.raises(RankLostError, match="ended before"):
        pipeline.submit(0, [[torch.zeros(4, dtype=torch.int64)]])


@pytest.mark.full
def test_two_stages_on_two_cores_are_at_least_half_again_as_fast_as_one(
    rank_pool: RankPool,
) -> None:
    """One thread a rank; runs of both in turn, since what else the machine does comes and goes."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(4):
        for stages, found in seconds.items():
            reports = rank_pool.run(graph_jobs.throughput, [1] * stages, 12, 3)[0]
            found += [report.seconds for report in reports]
    assert median(seconds[1]) >= 1.5 * median(seconds[2]), seconds


def test_a_bubble_is_predicted_of_what_the_stages_took() -> None:
    """As in `test_a_pipeline_played_by_hand`: 1 and 3 a micro-batch, three of them."""
    report = PipelineReport(3, 12.0, (3.0, 9.0), (1, 1))
    assert report.bubble == pytest.approx(1 - 12 / 24)
    assert report.predicted_bubble == pytest.approx(1 - 12 / 20)
    # The slower rank of a stage sets its pace, and the faster one waits for it.
    report = PipelineReport(3, 12.0, (2.0, 3.0, 9.0), (2, 1))
    assert report.predicted_bubble == pytest.approx(1 - 14 / 30)
    assert PipelineReport(0, 0.0, (0.0, 0.0), (1, 1)).predicted_bubble == 0


@pytest.mark.parametrize("tp_sizes", [[1, 1], pytest.param([1, 1, 1], marks=FULL)], ids=str)
def test_a_stream_of_mixed_shapes_through_dynamic_batching(
    tp_sizes: list[int], rank_pool: RankPool
) -> None:
    """500 requests of four shapes over several stages, in batches with whoever comes along."""
    case = replace(CASES["unet"], dims={"height": [8, 16, 24, 32]})
    job = make_job(case, [1])
    samples = [sample for (sample,) in make_samples(job, [(n * 7 % 4, 1) for n in range(500)])]
    policy = BatchingPolicy(max_batch_size=4, max_queue_delay_ms=20, max_queue_size=500)
    reply = rank_pool.run(graph_jobs.mixed_stream, tp_sizes, case, samples, policy)[0]
    assert reply is not None
    found, counts = reply
    for sample, outputs in zip(samples, found, strict=True):
        assert_equal([outputs], expected_of(case.module, job, [sample]))
    assert counts.completed == 500
    assert counts.batches < 400
