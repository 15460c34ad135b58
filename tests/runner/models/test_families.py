"""Every family equals transformers, at every cut: logits in float32 and greedy tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
from checkpoints import FAMILIES, reference_greedy, reference_logits
from rank_pool import RankPool

pytestmark = pytest.mark.dist

# Lengths are unequal, and lie on both sides of windows and of the lengths where ropes change.
PROMPTS = [[3 + (7 * i + n) % 120 for i in range(n)] for n in (11, 1, 33)]
NUM_TOKENS = 16

CUTS = [[1], [2], [3], [1, 1], [2, 2], [3, 3], [1, 3], [2, 1]]
PAIRWISE = [
    (name, CUTS[(i + step) % len(CUTS)]) for i, name in enumerate(FAMILIES) for step in (0, 3, 5)
]
REST = [(name, cut) for name in FAMILIES for cut in CUTS if (name, cut) not in PAIRWISE]

MATRIX = [
    *(pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in PAIRWISE),
    *(pytest.param(*case, id=f"{case[0]}-{case[1]}", marks=pytest.mark.full) for case in REST),
]

# transformers makes the frequencies of dynamic rope for the length at hand; ours are made for the
# longest sequence, so a sequence of that length is what the two can be compared on.
DYNAMIC_LENGTH = 34


@pytest.mark.parametrize(("name", "tp_sizes"), MATRIX)
def test_equals_transformers(
    name: str,
    tp_sizes: list[int],
    rank_pool: RankPool,
    checkpoint: Callable[[str], Path],
    reference: Callable[[Path], Any],
) -> None:
    folder = checkpoint(name)
    model = reference(folder)
    settings = {"model.max_model_len": DYNAMIC_LENGTH} if name == "llama_dynamic" else {}
    got = rank_pool.run(rank_jobs.logits, tp_sizes, str(folder), PROMPTS, settings)[-1]
    for prompt, ours in zip(PROMPTS, got, strict=True):
        padding = [9] * (DYNAMIC_LENGTH - len(prompt)) if settings and len(prompt) > 16 else []
        theirs = reference_logits(model, prompt + padding)[: len(prompt)]
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    if not settings:
        args = (str(folder), PROMPTS, NUM_TOKENS, {}, {"scheduler.max_num_batched_tokens": 20})
        tokens = rank_pool.run(rank_jobs.complete, tp_sizes, *args)[0]
        assert tokens == [reference_greedy(model, prompt, NUM_TOKENS) for prompt in PROMPTS]
