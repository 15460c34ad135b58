"""Choose the next tokens from logits.

Random numbers come from (seed, position) alone, so that a completion does not depend on the batch,
the cut or the host. The order is that of transformers: repetition penalty, temperature, top-k,
top-p, min-p.
"""

from collections.abc import Sequence as Seq

import numpy as np
import torch

from runner.engine.request import SamplingParams
from runner.engine.sequence import NOT_FINITE, Sequence
from runner.engine.upload import upload_list


def choose_greedily(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token of every row, or `NOT_FINITE`; can be captured in a CUDA graph.

    Shapes: (num_samples, vocab_size) -> (num_samples,) int64.
    """
    # What is not a number is the largest of its row.
    largest, chosen = logits.max(-1)
    return torch.where(largest.isfinite(), chosen, NOT_FINITE)


def sample(
    logits: torch.Tensor,
    greedy: torch.Tensor,
    last_ids: torch.Tensor,
    sequences: Seq[Sequence],
) -> torch.Tensor:
    """The next token of every sequence.

    Args:
        logits: (num_samples, vocab_size).
        greedy: what `choose_greedily` says of them.
        last_ids: (num_samples,) int64, the last tokens of the sequences, which the host need not
            have read.
        sequences: as they are when the step that computed `logits` has been scheduled.

    Returns:
        (num_samples,) int64 on the device of `logits`; `NOT_FINITE` where it is that in `greedy`.
    """
    params = [sequence.request.sampling for sequence in sequences]
    if all(p.temperature == 0 and p.repetition_penalty == 1.0 for p in params):
        return greedy
    # A copy: the penalties are written in place, and a stage's output cannot be written to.
    logits = _penalize(logits.to(torch.float32, copy=True), last_ids, sequences)
    chosen = logits.argmax(-1)
    random_rows = [row for row, p in enumerate(params) if p.temperature > 0]
    if random_rows:
        uniforms = [uniform(params[row].seed, sequences[row].num_computed) for row in random_rows]
        rows = upload_list(random_rows, torch.int64, logits.device)
        drawn = _draw(logits[rows], [params[row] for row in random_rows], uniforms)
        chosen = chosen.index_copy(0, rows, drawn)
    return torch.where(greedy == NOT_FINITE, greedy, chosen)


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) that belongs to a position of a sequence: Philox, keyed by the
    seed.
    """
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _penalize(
    logits: torch.Tensor, last_ids: torch.Tensor, sequences: Seq[Sequence]
) -> torch.Tensor:
    """Make tokens that a sequence already holds less likely, where it asks for that."""
    for row, sequence in enumerate(sequences):
        penalty = sequence.request.sampling.repetition_penalty
        if penalty != 1.0:
            known = upload_list(sorted(set(sequence.token_ids)), torch.int64, logits.device)
            # One that is there twice gets the same value twice.
            seen = torch.cat([known, last_ids[row : row + 1]])
            kept = logits[row, seen]
            logits[row, seen] = torch.where(kept < 0, kept * penalty, kept / penalty)
    return logits


def _draw(logits: torch.Tensor, params: Seq[SamplingParams], uniforms: Seq[float]) -> torch.Tensor:
    """Invert the cumulative distribution of the tokens that are left, the likeliest first."""

    def column(values: Seq[float]) -> torch.Tensor:
        return upload_list(values, torch.float64, logits.device)[:, None]

    scaled = logits.double() / column([p.temperature for p in params])
    scaled, token_ids = scaled.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(logits.shape[-1], device=logits.device)
    vocab_size = logits.shape[-1]
    beyond_k = place >= column([p.top_k or vocab_size for p in params])
    probabilities = scaled.masked_fill(beyond_k, -torch.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    dropped = before >= column([p.top_p for p in params])
    dropped |= probabilities < column([p.min_p for p in params]) * probabilities[:, :1]
    dropped[:, 0] = False
    cumulative = probabilities.masked_fill(dropped, 0.0).cumsum(-1)
    targets = column(uniforms) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, targets, right=True).clamp_(max=vocab_size - 1)
    return token_ids.gather(-1, chosen).squeeze(-1)
