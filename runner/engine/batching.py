"""From scheduled sequences to the flat tensors of one step."""

from collections.abc import Sequence as Seq
from itertools import accumulate

import torch

from runner.engine.scheduler import Scheduled
from runner.models.batch import Batch


def make_batch(scheduled: Seq[Scheduled], block_size: int, device: torch.device) -> Batch:
    """Lay a step's tokens out one sequence after the other."""
    token_ids: list[int] = []
    positions: list[int] = []
    variants: list[int] = []
    slots: list[int] = []
    last_rows: list[int] = []
    for part in scheduled:
        sequence = part.sequence
        span = range(sequence.num_computed, sequence.num_computed + part.num_tokens)
        token_ids += sequence.token_ids[span.start : span.stop]
        positions += span
        variants += [sequence.rope_variant] * len(span)
        slots += (sequence.blocks[p // block_size] * block_size + p % block_size for p in span)
        if part.samples:
            last_rows.append(len(token_ids) - 1)

    def tensor(
        values: list[int] | list[list[int]], dtype: torch.dtype = torch.int64
    ) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    widest = max(len(part.sequence.blocks) for part in scheduled)
    tables = [s.sequence.blocks + [0] * (widest - len(s.sequence.blocks)) for s in scheduled]
    query_lens = tuple(part.num_tokens for part in scheduled)
    kv_lens = tuple(part.sequence.num_computed + part.num_tokens for part in scheduled)
    return Batch(
        token_ids=tensor(token_ids),
        positions=tensor(positions),
        rope_variants=tensor(variants),
        slots=tensor(slots),
        block_tables=tensor(tables, torch.int32),
        query_offsets=tensor(list(accumulate(query_lens, initial=0)), torch.int32),
        kv_lengths=tensor(list(kv_lens), torch.int32),
        query_lens=query_lens,
        kv_lens=kv_lens,
        logits_rows=tensor(last_rows),
    )
