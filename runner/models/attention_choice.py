"""Which attention a rank runs, by its device, its dtype and what a step consists of.

Not here: the attentions themselves (`attention`, `varlen_attention`, `triton_attention`).
"""

import importlib.util
import logging
from dataclasses import replace
from itertools import takewhile
from typing import Literal

import torch

from parallel.errors import ConfigError
from parallel.slicing import HeadShare
from runner.models.attention import Attention, GatherAttention
from runner.models.batch import Batch

_log = logging.getLogger(__name__)


class StepAttention:
    """One attention for tokens that come alone, another for those that come in chunks.

    The scheduler puts decoding sequences first, so a mixed step is cut in two. A step in which
    every sequence has one token goes to `decode` whole, with its padding.
    """

    def __init__(self, decode: Attention, chunks: Attention) -> None:
        self._decode = decode
        self._chunks = chunks
        self._last: tuple[Batch, Batch, Batch] | None = None

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
        alone = sum(1 for _ in takewhile(lambda query_len: query_len == 1, batch.query_lens))
        if alone in (0, len(batch.query_lens)):
            attend = self._decode if alone else self._chunks
            return attend(q, k, v, cache, batch, scale=scale, window=window)
        head, tail = self._cut(batch, alone)
        first = self._decode(
            q[:alone], k[:alone], v[:alone], cache, head, scale=scale, window=window
        )
        rest = self._chunks(
            q[alone:], k[alone:], v[alone:], cache, tail, scale=scale, window=window
        )
        return torch.cat([first, rest])

    def _cut(self, batch: Batch, count: int) -> tuple[Batch, Batch]:
        """The first `count` sequences of one token each, and the others; once for all layers."""
        if self._last is None or self._last[0] is not batch:
            head = _part(batch, slice(None, count), slice(None, count))
            tail = _part(batch, slice(count, None), slice(count, None))
            tail = replace(tail, query_offsets=batch.query_offsets[count:] - count)
            self._last = batch, head, tail
        return self._last[1], self._last[2]


def make_attention(
    heads: HeadShare,
    device: torch.device,
    *,
    dtype: torch.dtype,
    block_size: int,
    head_dim: int,
    decode: Literal["triton", "varlen"] = "triton",
) -> Attention:
    """The attention of one rank.

    On the CPU, `GatherAttention`. On a GPU, decoding runs in Triton and chunks of prompts in
    torch's FlashAttention; where that does not take the dtype or head size, `GatherAttention` does
    it; where Triton is not installed, FlashAttention decodes, too.

    Args:
        block_size: tokens of a KV block.
        decode: what decodes on a GPU; "varlen" is for comparison.

    Raises:
        ConfigError: FlashAttention shall decode, but cannot with these sizes.
    """
    gather = GatherAttention(heads, device)
    if device.type != "cuda":
        return gather
    # Both are of no use, and Triton is not installed, where there is no GPU.
    from runner.models.varlen_attention import VarlenAttention, supports

    chunks: Attention = gather
    if supports(dtype, head_dim, device):
        chunks = VarlenAttention(heads, device)
    else:
        _log.info("prompts: SDPA, as FlashAttention does not take %s x %d", dtype, head_dim)
    if decode == "triton" and importlib.util.find_spec("triton") is not None:
        from runner.models.triton_attention import TritonDecodeAttention

        kernel = TritonDecodeAttention(
            heads, device, dtype=dtype, block_size=block_size, head_dim=head_dim
        )
        return StepAttention(kernel, chunks)
    if chunks is gather or block_size % 256:
        raise ConfigError(
            "decoding without Triton needs float16 or bfloat16 and a kv_cache.block_size in "
            f"multiples of 256, not {dtype} and {block_size}; install triton"
        )
    _log.info("decoding: FlashAttention, not Triton")
    return chunks


def _part(batch: Batch, sequences: slice, rows: slice) -> Batch:
    """Some sequences of a step with their rows; its samples are left out, and offsets are those of
    the whole.
    """
    return replace(
        batch,
        token_ids=batch.token_ids[rows],
        positions=batch.positions[rows],
        rope_variants=batch.rope_variants[rows],
        slots=batch.slots[rows],
        block_tables=batch.block_tables[sequences],
        kv_lengths=batch.kv_lengths[sequences],
        query_lens=batch.query_lens[sequences],
        kv_lens=batch.kv_lens[sequences],
        logits_rows=batch.logits_rows[:0],
    )
