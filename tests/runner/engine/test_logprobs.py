"""Probabilities of tokens: those of transformers, at every cut, for those requests that ask."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
import torch
from checkpoints import reference_logits
from rank_pool import RankPool

from runner.engine.logprobs import TokenLogprobs, pack, packed_length, unpack
from runner.engine.request import Request
from runner.engine.sequence import Sequence

PROMPTS = [[5, 9, 2, 7], [11, 3], [20, 21, 22, 23, 24], [8, 8, 30]]
ASKED = [None, 0, 3, 20]
NUM_TOKENS = 6


def asking(num_logprobs: int | None) -> Sequence:
    return Sequence.of(Request(0, (1,), 5, num_logprobs=num_logprobs))


def test_what_is_packed_is_what_is_unpacked() -> None:
    logits = torch.tensor([[0.0, 1.0, 5.0], [1.0, 1.0, 1.0], [3.0, -9.0, 2.0], [0.0, 0.5, 0.0]])
    sequences = [asking(count) for count in (2, None, 0, 3)]
    chosen = torch.tensor([1, 0, 2, -1])
    packed = pack(logits, chosen, sequences)
    assert (packed.dtype, len(packed)) == (torch.int64, packed_length(sequences))
    expected = logits.log_softmax(-1)
    first, second, third, fourth = unpack(packed.tolist(), sequences)
    assert second is None
    assert first == TokenLogprobs(
        float(expected[0, 1]), ((2, float(expected[0, 2])), (1, float(expected[0, 1])))
    )
    assert third == TokenLogprobs(float(expected[2, 2]), ())
    assert fourth is not None  # A row that could not choose is refused elsewhere.
    assert fourth.top[0][0] == 1


def test_nothing_is_sent_where_nobody_asks() -> None:
    assert packed_length([asking(None)] * 3) == 0
    assert packed_length([asking(0)]) == 1


@pytest.mark.dist
@pytest.mark.parametrize("tp_sizes", [[1], [2], [2, 1], [1, 1]], ids=str)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "repetition_penalty": 1.3}], ids=str)
def test_equal_transformers(
    tp_sizes: list[int],
    sampling: dict[str, Any],
    rank_pool: RankPool,
    checkpoint: Callable[[str], Path],
    reference: Callable[[Path], Any],
) -> None:
    """Whatever tokens were chosen, and by which rules, these are of the model's own logits."""
    folder = checkpoint("llama")
    given = (str(folder), PROMPTS, NUM_TOKENS, sampling)
    tokens, found = rank_pool.run(rank_jobs.complete_with_logprobs, tp_sizes, *given, ASKED)[0]
    assert tokens == rank_pool.run(rank_jobs.complete, tp_sizes, *given, {})[0]
    for prompt, ids, told, count in zip(PROMPTS, tokens, found, ASKED, strict=True):
        if count is None:
            assert told == [None] * NUM_TOKENS
            continue
        logits = reference_logits(reference(folder), prompt + ids)[len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        of_chosen = expected.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor([t.chosen for t in told]), of_chosen, atol=1e-4, rtol=1e-4
        )
        values, top_ids = expected.topk(count)
        assert [[i for i, _ in t.top] for t in told] == top_ids.tolist()
        ours = torch.tensor([[value for _, value in t.top] for t in told])
        torch.testing.assert_close(ours, values, atol=1e-4, rtol=1e-4)
