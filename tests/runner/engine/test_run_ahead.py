"""Steps that are laid out before the host has read the tokens of those before choose the same."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
from rank_pool import RankPool

from runner.engine.logprobs import TokenLogprobs

PROMPTS = [[5, 9, 2, 7], [11, 3], [20, 21, 22, 23, 24], [8, 8, 30], [40 + i for i in range(30)]]
NUM_TOKENS = 12
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.2, "seed": 5},
    {"repetition_penalty": 1.7},
    {"temperature": 2.0, "top_k": 20, "repetition_penalty": 1.4, "seed": 9},
    {},
]


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
    found, num_steps = rank_pool.run(rank_jobs.complete_ahead_or_not, tp_sizes, *given)[0]
    (at_once, told_at_once), (ahead, told_ahead) = found
    assert ahead == at_once
    assert at_once[0] == plain[0][: plain[0].index(plain[0][5]) + 1]
    assert at_once[4] == plain[4][: len(at_once[4])]
    # In other company the last bits of a product may differ.
    pairs = zip(flat(told_ahead), flat(told_at_once), strict=True)
    assert all(ours.chosen == pytest.approx(theirs.chosen, abs=1e-4) for ours, theirs in pairs)
    assert num_steps[1] > num_steps[0], "whoever a stop token ends has a part too many"
