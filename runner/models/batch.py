"""The tokens of one step, flat, as every stage sees them.

Who is in a batch is decided by `runner.engine.scheduler`; this is its form on the device.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """One step's tokens of all its sequences, one sequence after the other.

    Attributes:
        token_ids: (num_tokens,) int64.
        positions: (num_tokens,) int64, place of each token in its sequence.
        rope_variants: (num_tokens,) int64, which rotary frequencies its sequence uses.
        slots: (num_tokens,) int64, where its key and value are written: block * block_size +
            offset.
        block_tables: (num_seqs, max_blocks) int64, the KV blocks of each sequence in order.
        query_lens: tokens of each sequence in this step.
        kv_lens: tokens of each sequence in the KV cache after this step's are written.
        logits_rows: (num_samples,) int64, the tokens whose logits are wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    rope_variants: torch.Tensor
    slots: torch.Tensor
    block_tables: torch.Tensor
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    logits_rows: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)
