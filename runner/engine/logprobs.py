"""How likely the model found its tokens: worked out where these are chosen, for who asks.

The numbers travel behind the tokens, in the same message: each rank knows from the requests how
long it is. They are of the model's own logits, before penalties, temperature and what is dropped.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from runner.engine.sequence import Sequence
from runner.engine.upload import upload_list

MAX_LOGPROBS = 20
"""Tokens beside the chosen one that a request can ask for."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities at one place of a completion.

    Attributes:
        chosen: of the token that is there.
        top: (token id, logarithm) of the likeliest tokens, in their order.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


def packed_length(sequences: Seq[Sequence]) -> int:
    """Numbers that `pack` makes; 0 where nobody asks."""
    return sum(_width(sequence) for sequence in sequences)


def pack(logits: torch.Tensor, chosen: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    """What the sequences ask for, as one row of whole numbers on the device.

    Args:
        logits: (num_samples, vocab_size).
        chosen: (num_samples,) int64; a negative id is of a row that has no probabilities.

    Returns:
        (packed_length(sequences),) int64: of each sequence that asks the chosen token's logarithm,
        then the ids of the likeliest, then theirs; logarithms as the bits of a double.
    """
    rows = [row for row, sequence in enumerate(sequences) if _width(sequence)]
    asking = upload_list(rows, torch.int64, logits.device)
    logarithms = logits[asking].float().log_softmax(-1)
    of_chosen = logarithms.gather(-1, chosen[asking].clamp(min=0)[:, None])
    most = min(max(_count(sequences[row]) for row in rows), logarithms.shape[-1])
    top, top_ids = logarithms.topk(most)
    parts: list[torch.Tensor] = []
    for place, row in enumerate(rows):
        count = _count(sequences[row])
        parts += [_bits(of_chosen[place]), top_ids[place, :count], _bits(top[place, :count])]
    return torch.cat(parts)


def unpack(packed: Seq[int], sequences: Seq[Sequence]) -> list[TokenLogprobs | None]:
    """What was packed, for each sequence; None for those that do not ask."""
    values = np.array(packed, dtype=np.int64)
    logarithms = values.view(np.float64)
    found: list[TokenLogprobs | None] = []
    start = 0
    for sequence in sequences:
        width, count = _width(sequence), _count(sequence)
        if width:
            ids, top = start + 1, start + 1 + count
            pairs = zip(values[ids:top].tolist(), logarithms[top : top + count], strict=True)
            likeliest = tuple((token_id, float(value)) for token_id, value in pairs)
            found.append(TokenLogprobs(float(logarithms[start]), likeliest))
        else:
            found.append(None)
        start += width
    return found


def _count(sequence: Sequence) -> int:
    return sequence.request.num_logprobs or 0


def _width(sequence: Sequence) -> int:
    return 0 if sequence.request.num_logprobs is None else 1 + 2 * _count(sequence)


def _bits(logarithms: torch.Tensor) -> torch.Tensor:
    return logarithms.double().view(torch.int64)
