"""Steps that are laid out before the host has read the tokens of those before choose the same."""

from collections.abc import Callable
from itertools import chain, count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import rank_jobs
import torch
from rank_pool import RankPool

from parallel.context import ParallelContext
from parallel.launch import RankEnv
from parallel.topology import Topology
from runner.engine import stage_runner
from runner.engine.loading import load_stage
from runner.engine.logprobs import TokenLogprobs
from runner.engine.rank import make_engine
from runner.engine.sampler import choose_greedily
from runner.engine.sequence import NOT_FINITE

PROMPTS = [[5, 9, 2, 7], [11, 3], [20, 21, 22, 23, 24], [8, 8, 30], [40 + i for i in range(30)]]
NUM_TOKENS = 12
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.2, "seed": 5},
    {"repetition_penalty": 1.7},
    {"temperature": 2.0, "top_k": 20, "repetition_penalty": 1.4, "seed": 9},
    {},
]


def test_a_row_without_numbers_fails_alone_and_the_device_goes_on(
    checkpoint: Callable[[str], Path],
) -> None:
    """What marks it is no token: the step that follows would look it up."""
    job = rank_jobs.prepare(str(checkpoint("llama")), [1], {})
    context = ParallelContext.open(Topology.of([1]), RankEnv(0, 1), device_type="cpu")
    expected = rank_jobs.complete_job(context, job, PROMPTS[1:2], NUM_TOKENS, {})
    calls = count()

    def choose(logits: torch.Tensor) -> torch.Tensor:
        chosen = choose_greedily(logits)
        return torch.cat([torch.tensor([NOT_FINITE]), chosen[1:]]) if next(calls) == 3 else chosen

    with rank_jobs.run_ahead(True), patch.object(stage_runner, "choose_greedily", choose):
        found = rank_jobs.complete_job(context, job, PROMPTS[:2], NUM_TOKENS, {})
    assert found is not None
    assert expected is not None
    assert found[0][3:] == [NOT_FINITE]
    assert found[1] == expected[0]


def test_what_is_under_way_of_requests_that_have_ended_is_no_work(
    checkpoint: Callable[[str], Path],
) -> None:
    """Else an idle server would count its waiting as a step."""
    job = rank_jobs.prepare(str(checkpoint("llama")), [1], {})
    context = ParallelContext.open(Topology.of([1]), RankEnv(0, 1), device_type="cpu")
    plain = rank_jobs.complete_job(context, job, PROMPTS[:1], NUM_TOKENS, {})
    assert plain is not None
    stops = frozenset({plain[0][4]})
    front = rank_jobs.ListFront(rank_jobs.requests_of(job, PROMPTS[:1], NUM_TOKENS, {}, stops))
    with rank_jobs.run_ahead(True):
        engine = make_engine(job, load_stage(job, context), front)
    engine.admit(front.next())
    while engine.has_work:
        front.take(engine.step())
    assert front.next().leave
    assert len(engine._under_way) == 1
    engine.rest()
    assert not engine._under_way


def flat(told: list[list[TokenLogprobs]]) -> list[TokenLogprobs]:
    return list(chain.from_iterable(told))


@pytest.mark.dist
@pytest.mark.parametrize("tp_sizes", [[1], [2]], ids=str)
def test_the_same_tokens_whether_steps_run_ahead_or_not(
    tp_sizes: list[int], rank_pool: RankPool, checkpoint: Callable[[str], Path]
) -> None:
    model = str(checkpoint("llama"))
    plain = rank_pool.run(rank_jobs.complete, [1], model, PROMPTS, NUM_TOKENS, WAYS[0], {})[0]
    # One that the first prompt's completion comes to in the middle.
    stops = frozenset({plain[0][5]})
    given = (model, PROMPTS, NUM_TOKENS, WAYS, stops, {"scheduler.max_num_seqs": 3})
    found = rank_pool.run(rank_jobs.complete_ahead_or_not, tp_sizes, *given)[0]
    (at_once, told_at_once), (ahead, told_ahead) = found
    assert ahead == at_once
    assert at_once[0] == plain[0][: plain[0].index(plain[0][5]) + 1]
    assert at_once[4] == plain[4][: len(at_once[4])]
    # In other company the last bits of a product may differ.
    pairs = zip(flat(told_ahead), flat(told_at_once), strict=True)
    assert all(ours.chosen == pytest.approx(theirs.chosen, abs=1e-4) for ours, theirs in pairs)
