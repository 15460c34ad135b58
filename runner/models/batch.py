"""The tokens of one step, flat, as every stage sees them.

Who is in a batch is decided by `runner.engine.scheduler`; this is its form on the device.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """One step's tokens of all its sequences, one sequence after the other.

    A step may be padded to a bucket: the rows of `token_ids`, `positions`, `rope_variants` and
    `slots` beyond the last sequence's are padding, whose keys and values go to a block that no
    sequence reads and whose hidden states nobody looks at.

    Attributes:
        token_ids: (num_tokens,) int64.
        positions: (num_tokens,) int64, place of each token in its sequence.
        rope_variants: (num_tokens,) int64, which rotary frequencies its sequence uses.
        slots: (num_tokens,) int64, where its key and value are written: block * block_size +
            offset.
        block_tables: (num_seqs, max_blocks) int32, the KV blocks of each sequence in order.
        query_offsets: (num_seqs + 1,) int32, where the rows of each sequence begin, and the end.
        kv_lengths: (num_seqs,) int32, tokens of each sequence in the KV cache after this step's
            are written; `kv_lens` on the device.
        query_lens: tokens of each sequence in this step; known on the host.
        kv_lens: as `kv_lengths`; in a captured step the longest that a sequence may become.
        logits_rows: (num_samples,) int64, the tokens whose logits are wanted.
        is_mixed: a captured step in which sequences have any numbers of tokens; only the device
            knows them, and `query_lens` is empty.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    rope_variants: torch.Tensor
    slots: torch.Tensor
    block_tables: torch.Tensor
    query_offsets: torch.Tensor
    kv_lengths: torch.Tensor
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    logits_rows: torch.Tensor
    is_mixed: bool = False

    @property
    def num_tokens(self) -> int:
        """Rows of the step, padding included."""
        return len(self.token_ids)
