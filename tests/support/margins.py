"""Greedy tokens of two ways to compute one model, as far as these can be the same.

Where two tokens are nearly as likely, an error within its bound may choose the other one.
"""

from collections.abc import Sequence
from typing import Any

from checkpoints import reference_logits


def clear_tokens(model: Any, prompt: Sequence[int], tokens: Sequence[int], *, margin: float) -> int:
    """How many of a greedy continuation's first tokens no error within `margin` changes.

    Args:
        model: as transformers runs it.
        tokens: the continuation.
        margin: of the likeliest token's logit over the second, relative to the root mean square of
            all logits.
    """
    logits = reference_logits(model, [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
    best, second = logits.topk(2).values.unbind(-1)
    clear = best - second > margin * logits.pow(2).mean(-1).sqrt()
    return len(tokens) if clear.all() else int(clear.int().argmin())


def assert_same_where_clear(
    model: Any,
    prompts: Sequence[Sequence[int]],
    found: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    *,
    margin: float,
) -> None:
    """Nearly all tokens must be clear, or there would be nothing to compare."""
    assert [len(tokens) for tokens in found] == [len(tokens) for tokens in expected]
    counts = [
        clear_tokens(model, prompt, tokens, margin=margin)
        for prompt, tokens in zip(prompts, expected, strict=True)
    ]
    assert sum(counts) >= 0.8 * sum(map(len, expected)), f"clear tokens: {counts} of {expected}"
    for prompt, ours, theirs, count in zip(prompts, found, expected, counts, strict=True):
        assert ours[:count] == theirs[:count], (
            f"after {prompt}: {ours}, expected {theirs}, of which {count} are clear by {margin}"
        )
