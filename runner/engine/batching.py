"""From scheduled sequences to the flat tensors of one step."""

from collections.abc import Sequence as Seq

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

    def tensor(values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    widest = max(len(part.sequence.blocks) for part in scheduled)
    tables = [s.sequence.blocks + [0] * (widest - len(s.sequence.blocks)) for s in scheduled]
    return Batch(
        token_ids=tensor(token_ids),
        positions=tensor(positions),
        rope_variants=tensor(variants),
        slots=tensor(slots),
        block_tables=tensor(tables),
        query_lens=tuple(part.num_tokens for part in scheduled),
        kv_lens=tuple(part.sequence.num_computed + part.num_tokens for part in scheduled),
        logits_rows=tensor(last_rows),
    )
