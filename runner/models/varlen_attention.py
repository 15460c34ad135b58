"""Attention of whole steps on a GPU, by torch's FlashAttention for sequences of different lengths.

It takes float16 and bfloat16 on GPUs from compute capability 8.0, and head sizes that are multiples
of 8 up to 256; `supports` tells. Not here: decoding in Triton (`runner.models.triton_attention`).
"""

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from parallel.slicing import HeadShare
from runner.models.attention import groups_are_even, write_kv
from runner.models.batch import Batch

_PAGE_ROWS = 256
"""FlashAttention 2 reads pages only if their size is a multiple of this."""


class VarlenAttention:
    """One call for all sequences of a step.

    A step of new prompts attends to its own keys and values. In one that goes on with sequences,
    these are first gathered from the cache; sizes come from the host, so that is no step for a CUDA
    graph. Only decoding with blocks of a multiple of 256 tokens reads the cache in place, with
    lengths from the device.
    """

    def __init__(self, heads: HeadShare, device: torch.device) -> None:
        self._is_even = groups_are_even(heads)
        self._query_to_kv = torch.tensor(heads.query_to_kv, device=device)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: torch.Tensor,
        batch: Batch,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """See `runner.models.attention.Attention`."""
        write_kv(k, v, cache, batch.slots)
        real = sum(batch.query_lens)
        if real == 0:
            return torch.zeros_like(q).flatten(1)
        # Torch counts the tokens before the own one; -1: all of them.
        sides = (-1 if window is None else window - 1, 0)
        if self._reads_pages(cache, batch):
            output = _decode_pages(q[:real], cache, batch, scale, sides)
        else:
            output = self._attend(q[:real], k[:real], v[:real], cache, batch, scale, sides)
        if real < len(q):
            output = torch.cat([output, torch.zeros_like(q[real:])])
        return output.flatten(1)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: torch.Tensor,
        batch: Batch,
        scale: float,
        sides: tuple[int, int],
    ) -> torch.Tensor:
        """To the step's own keys where all sequences are new, else to what the cache holds."""
        num_seqs = len(batch.query_lens)
        offsets = kv_offsets = batch.query_offsets[: num_seqs + 1]
        if batch.query_lens != batch.kv_lens:
            k, v = _gather(cache, batch)
            ends = torch.cumsum(batch.kv_lengths[:num_seqs], 0, dtype=torch.int32)
            kv_offsets = F.pad(ends, (1, 0))
        if not self._is_even:
            k, v = k[:, self._query_to_kv], v[:, self._query_to_kv]
        output = varlen_attn(
            q,
            k,
            v,
            offsets,
            kv_offsets,
            max(batch.query_lens),
            max(batch.kv_lens),
            scale=scale,
            window_size=sides,
            enable_gqa=True,
        )
        assert isinstance(output, torch.Tensor)  # A pair only where more was asked for.
        return output

    def _reads_pages(self, cache: torch.Tensor, batch: Batch) -> bool:
        """Whether this is a decoding step that the kernel can take from the cache as it is."""
        only_decodes = all(query_len == 1 for query_len in batch.query_lens)
        return only_decodes and self._is_even and cache.shape[2] % _PAGE_ROWS == 0


def supports(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Whether torch's FlashAttention takes these."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _decode_pages(
    q: torch.Tensor, cache: torch.Tensor, batch: Batch, scale: float, sides: tuple[int, int]
) -> torch.Tensor:
    """Decode from the cache in place: q (num_seqs, num_query, head_dim) -> its shape.

    One query at the end of its sequence sees all of it, so that no mask is needed without a window;
    the kernel packs the heads of a group only then. One split: torch 2.13 is silently wrong, or
    gives NaN, with more over pages (pytorch issue 194167).
    """
    num_seqs = len(batch.query_lens)
    offsets = batch.query_offsets[: num_seqs + 1]
    output = varlen_attn(
        q,
        cache[0],
        cache[1],
        offsets,
        offsets,  # Not used: the lengths are in seqused_k.
        1,
        max(batch.kv_lens),
        scale=scale,
        window_size=(-1, -1) if sides[0] < 0 else sides,
        enable_gqa=True,
        seqused_k=batch.kv_lengths[:num_seqs],
        block_table=batch.block_tables,
        num_splits=1,
    )
    assert isinstance(output, torch.Tensor)  # A pair only where more was asked for.
    return output


def _gather(cache: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all sequences one after the other: (sum(kv_lens), num_kv, head_dim)."""
    block_size = cache.shape[2]
    parts = [
        cache[:, table[: -(-kv_len // block_size)]].flatten(1, 2)[:, :kv_len]
        for table, kv_len in zip(batch.block_tables, batch.kv_lens, strict=True)
    ]
    k, v = torch.cat(parts, dim=1).unbind()
    return k, v
