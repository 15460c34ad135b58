"""Every family equals transformers, at every cut: logits in float32 and greedy tokens."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
from checkpoints import FAMILIES, reference_greedy, reference_logits
from rank_pool import RankPool

pytestmark = pytest.mark.dist

# Lengths are unequal, and lie on both sides of windows and of the lengths where ropes change.
PROMPTS = [[3 + (7 * i + n) % 120 for i in range(n)] for n in (11, 1, 33)]
NUM_TOKENS = 64

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
# longest sequence. So the two agree on sequences of that length, and on those up to 16 tokens,
# where both have the original frequencies.
DYNAMIC_LENGTH = 34
DYNAMIC_SHORT = [prompt[:4] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def expected(
    checkpoint: Callable[[str], Path], reference: Callable[[Path], Any]
) -> Callable[[str], list[list[int]]]:
    """The greedy continuations of a variant by transformers."""

    def continue_prompts(name: str) -> list[list[int]]:
        model = reference(checkpoint(name))
        if name == "llama_dynamic":
            return [reference_greedy(model, prompt, 12) for prompt in DYNAMIC_SHORT]
        return [reference_greedy(model, prompt, NUM_TOKENS) for prompt in PROMPTS]

    return cache(continue_prompts)


@pytest.mark.parametrize(("name", "tp_sizes"), MATRIX)
def test_equals_transformers(
    name: str,
    tp_sizes: list[int],
    rank_pool: RankPool,
    checkpoint: Callable[[str], Path],
    reference: Callable[[Path], Any],
    expected: Callable[[str], list[list[int]]],
) -> None:
    folder = checkpoint(name)
    dynamic = name == "llama_dynamic"
    settings = {"model.max_model_len": DYNAMIC_LENGTH} if dynamic else {}
    got = rank_pool.run(rank_jobs.logits, tp_sizes, str(folder), PROMPTS, settings)[-1]
    for prompt, ours in zip(PROMPTS, got, strict=True):
        padding = [9] * (DYNAMIC_LENGTH - len(prompt)) if dynamic and len(prompt) > 16 else []
        theirs = reference_logits(reference(folder), prompt + padding)[: len(prompt)]
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()

    prompts, length = (DYNAMIC_SHORT, 12) if dynamic else (PROMPTS, NUM_TOKENS)
    # Fewer tokens a step than the longest prompt has, so that prompts run in chunks.
    chunked = settings | {"scheduler.max_num_batched_tokens": 20}
    args = (str(folder), prompts, length, {}, chunked)
    assert rank_pool.run(rank_jobs.complete, tp_sizes, *args)[0] == expected(name)
